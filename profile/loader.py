"""Clips per second of the input pipeline, beside other loaders on the same files.

    python profile/loader.py                         # generated VP9, H.264 and JPEG sets, all peers
    python profile/loader.py --sets h264_gop12 --turns 5 --json
    python profile/loader.py --root /data/set --train-list train.txt --val-list val.txt

Output: 8 frames, one from each eighth of the video, short side 256, center 224, uint8. Everyone
reads the same frames of the same files on the same number of threads or worker processes, taking
turns of one pass. `--json` adds one line of JSON as the last line of stdout.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_peers import IMAGE_READERS, VIDEO_READERS, Clip, Peer, available

from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import DataError
from pipelines.loader import Loader, build_loader
from pipelines.synthetic import dead_leaves

WIDTH, HEIGHT, FPS, SIZE = 340, 256, 30, 224
REPEATS = 8  # of each video in a pass
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "6", "crf": "33", "b": "0"}),
    "h264": ("libx264", "mp4", {"preset": "medium", "crf": "23"}),
}
# Set -> (ratio to the best sequential peer, to the best peer of all) that we ask of ourselves.
ASKS: dict[str, dict[str, float]] = {
    "vp9_gop12": {"sequential": 2.5, "best": 1.2},
    "h264_gop12": {"sequential": 2.5, "best": 1.2},
    "vp9_gop250": {"best": 1.0},
    "h264_gop250": {"best": 1.0},
    "jpeg": {"pillow": 1.5},
}


def frames_of(seed: int, count: int) -> Iterator[np.ndarray]:
    """A camera that moves over an image, with the noise of a sensor: [256, 340, 3] uint8 each."""
    rng = np.random.default_rng(seed)
    image = (dead_leaves(700, rng) * 255).astype(np.int16)
    for index in range(count):
        time_ = 2 * np.pi * index / count
        x = int(180 + 170 * np.sin(1.3 * time_ + seed))
        y = int(220 + 200 * np.cos(time_ + seed))
        noise = rng.integers(-3, 4, (HEIGHT, WIDTH, 1), dtype=np.int16)
        yield np.clip(image[y : y + HEIGHT, x : x + WIDTH] + noise, 0, 255).astype(np.uint8)


def write_set(folder: Path, name: str, videos: int, frames: int) -> None:
    """`videos` clips of `frames` frames of a set, and their list; nothing if they are there."""
    if (folder / "list.txt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(videos):
        if name == "jpeg":
            from PIL import Image

            (folder / str(seed)).mkdir(exist_ok=True)
            for index, frame in enumerate(frames_of(seed, frames)):
                Image.fromarray(frame).save(folder / f"{seed}/{index + 1:05d}.jpg", quality=90)
            lines.append(f"{seed} {frames} {seed % 2}\n")
            continue
        codec, gop = name.split("_gop")
        encoder, suffix, options = CODECS[codec]
        path = folder / f"{seed}.{suffix}"
        options = options | {"g": gop, "keyint_min": gop, "threads": "1"}
        write_video(path, frames_of(seed, frames), encoder, options)
        lines.append(f"{path.name} {seed % 2}\n")
    (folder / "list.txt").write_text("".join(lines) * REPEATS, encoding="utf-8")


def write_video(
    path: Path, frames: Iterator[np.ndarray], encoder: str, options: dict[str, str]
) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class Ours:
    """One of our loaders, endlessly from epoch to epoch."""

    def __init__(self, dataset: Dataset, decoder: str, args: argparse.Namespace) -> None:
        self.loader: Loader = build_loader(
            dataset,
            split="train",
            sampling=SamplingConfig(num_segments=args.segments),
            augment=AugmentConfig(size=SIZE, resize=256, crop="center", flip=False),
            loader=LoaderConfig(decoder=decoder, threads=args.threads),  # type: ignore[arg-type]
            seed=0,
            micro_batch=args.batch,
            global_batch=args.batch,
            device=torch.device(args.device),
        )
        self._device = args.device
        self._epochs = itertools.count(1)

    def batches(self) -> Iterator[Any]:
        """One epoch, its clips on the device."""
        for batch in self.loader.epoch(next(self._epochs)):
            yield batch.labels
        if self._device == "cuda":
            torch.cuda.synchronize()

    def cpu_s(self) -> float:
        """Processor time of this process so far."""
        return time.process_time()

    def close(self) -> None:
        """End the threads."""
        self.loader.close()


def turn(source: Ours | Peer) -> tuple[float, float]:
    """(clips/s, ms of processor time per clip) of one pass."""
    start, cpu = time.perf_counter(), source.cpu_s()
    clips = sum(len(batch) for batch in source.batches())
    return clips / (time.perf_counter() - start), 1000 * (source.cpu_s() - cpu) / clips


def measure(
    name: str, dataset: Dataset, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each of our backends, and why others of ours have none."""
    ours: dict[str, Ours] = {}
    problems: dict[str, str] = {}
    for decoder in args.decoders:
        try:
            ours[decoder] = Ours(dataset, decoder, args)
        except (DataError, ValueError) as error:
            problems[decoder] = str(error)
            print(f"{name:12} {decoder:18} not measured: {error}")
    if not ours:
        return [], problems
    loader = next(iter(ours.values())).loader
    folders = bool(dataset.train[0].path.is_dir())
    wanted = IMAGE_READERS if folders else VIDEO_READERS
    if args.peers:
        wanted = {peer: wanted[peer] for peer in args.peers if peer in wanted}
    readers, missing = available(wanted)
    for peer, reason in missing.items():
        print(f"{name:12} {peer:18} not measured: {reason}")
    samples = [sample for k in range(loader.batches_per_epoch) for sample in loader.samples(1, k)]
    clips: Sequence[Clip] = [(str(s.path), s.frame_indices.tolist()) for s in samples]
    workers = args.threads or LoaderConfig().resolved_threads()
    sources: dict[str, Ours | Peer] = dict(ours)
    for peer, reader in readers.items():
        sources[peer] = Peer(reader, clips, batch=args.batch, workers=workers, size=SIZE)
    turns: dict[str, list[tuple[float, float]]] = {source: [] for source in sources}
    for number in range(-1, args.turns):
        for key in list(turns):
            try:
                result = turn(sources[key])
            except (RuntimeError, DataError) as error:  # a worker that hangs or dies, a decoder
                reason = " ".join(str(error).split())[:200]
                print(f"{name:12} {key:18} not measured: {reason}")
                sources.pop(key).close()
                (problems if key in ours else missing)[key] = reason
                del turns[key]
                continue
            if number >= 0:  # the first starts workers, opens libraries, fills the page cache
                turns[key].append(result)
    for source_ in sources.values():
        source_.close()
    rates = {key: statistics.median(rate for rate, _ in runs) for key, runs in turns.items()}
    cpu = {key: min(cost for _, cost in runs) for key, runs in turns.items()}
    peers = {key: rates[key] for key in readers if key in rates}
    rows = []
    for decoder, source in ours.items():
        if decoder not in rates:
            continue
        best = {"best": max(peers.values(), default=0.0)}
        best["sequential"] = max((r for p, r in peers.items() if "sequential" in p), default=0.0)
        best["pillow"] = peers.get("pillow", 0.0)
        asks = ASKS.get(name, {})
        ratios = {key: rates[decoder] / best[key] for key in best if best[key]}
        rows.append(
            {
                "name": name,
                "backend": decoder,
                "description": source.loader.description,
                "clips_per_s": rates[decoder],
                "cpu_ms_per_clip": cpu[decoder],
                "peers": peers,
                "peers_cpu_ms_per_clip": {key: cpu[key] for key in peers},
                "peers_missing": missing,
                "ratio_to_best_peer": ratios.get("best"),
                "ratio_to_best_sequential_peer": ratios.get("sequential"),
                "ratio_to_pillow": ratios.get("pillow"),
                "ask": asks,
                "met": all(ratios.get(key, 0.0) >= ask for key, ask in asks.items()),
            }
        )
    for key in sources:
        spread = f"{min(runs[0] for runs in turns[key]):.1f}..{max(r[0] for r in turns[key]):.1f}"
        text = ours[key].loader.description if key in ours else ""
        print(
            f"{name:12} {key:18} {rates[key]:7.1f} clips/s ({spread}), {cpu[key]:6.1f} CPU ms", text
        )
    return rows, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(ASKS), choices=list(ASKS))
    parser.add_argument("--root", default="", help="own videos instead of generated sets")
    parser.add_argument("--train-list", default="", help="list of the training videos")
    parser.add_argument("--val-list", default="", help="list of the validation videos")
    parser.add_argument("--decoders", nargs="+", default=["auto"], help="values of loader.decoder")
    peers = [*VIDEO_READERS, *IMAGE_READERS]
    parser.add_argument("--peers", nargs="+", choices=peers, help="default: all")
    parser.add_argument("--videos", type=int, default=12, help="videos of a generated set")
    parser.add_argument("--frames", type=int, default=300, help="frames of each of them")
    parser.add_argument("--segments", type=int, default=8, help="frames per clip")
    parser.add_argument("--batch", type=int, default=4, help="clips per batch")
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the clips")
    parser.add_argument("--turns", type=int, default=3, help="passes of each loader")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    problems: dict[str, dict[str, str]] = {}  # set -> backend -> why it was not measured
    if args.root:
        lists = {"train_list": args.train_list, "val_list": args.val_list}
        dataset = open_dataset(DataConfig(root=args.root, **lists))
        rows, problems["own"] = measure("own", dataset, args)
    else:
        length = "" if args.frames == 300 else f"x{args.frames}"
        cache = DataConfig().resolved_cache_dir() / f"loader-bench-{args.videos}{length}"
        for name in args.sets:
            write_set(cache / name, name, args.videos, args.frames)
            lists = {"train_list": "list.txt", "val_list": "list.txt"}
            dataset = open_dataset(DataConfig(root=str(cache / name), **lists))
            found, problems[name] = measure(name, dataset, args)
            rows += found
    if args.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
        if args.device == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        print(json.dumps({"sets": rows, "not_measured": problems, **machine, "settings": settings}))


if __name__ == "__main__":
    main()
