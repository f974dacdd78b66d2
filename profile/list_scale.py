"""What long lists cost: the start of a run, and every clip, from 1 000 to 2 000 000 listed videos.

    python profile/list_scale.py [--lines 1000 1000000] [--start 240000 2000000] [--json]

A few small videos are written and listed again and again, so every list needs the same decoding.
Cost per clip: the loaders of all lengths take turns in one process, batch by batch, so what else
the machine does falls on all of them; ratios are of the medians. Start: a process of its own opens
the lists and builds both loaders twice over; the second time the caches are warm.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.loader import Loader, build_loader

_MEDIA = 8
_MICRO_BATCH = 8
_START = """
import json, sys, time
sys.path[:0] = [{here!r}, {root!r}]
from list_scale import memory_bytes, open_lists, open_loaders
import nvidia.dali, torch
before, start = memory_bytes(), time.perf_counter()
dataset = open_lists({folder!r}, {lines})
dataset.fingerprints
loaders = open_loaders(dataset)
built = time.perf_counter() - start
next(loaders[0].epoch(0))
first = time.perf_counter() - start
after = memory_bytes()
print(json.dumps({{"start_s": built, "first_batch_s": first, "peak_bytes": after["peak"],
    "own_bytes": after["own"], "own_imports_bytes": before["own"],
    "imports_bytes": before["peak"]}}))
"""


def memory_bytes() -> dict[str, int]:
    """Of this process: the most it has held, and what of it no other process could share."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    own = [line.split()[1] for line in rollup.splitlines() if line.startswith("Private_Dirty")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "own": 1024 * sum(map(int, own))}


def write_media(folder: Path) -> None:
    """Small VP9 videos of 24 frames."""
    import av
    import numpy as np

    for number in range(_MEDIA):
        rng = np.random.default_rng(number)
        with av.open(str(folder / f"{number}.webm"), "w") as container:
            options = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
            stream = container.add_stream("libvpx-vp9", rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            image = rng.integers(0, 255, (96, 128, 3), np.uint8)
            for shift in range(24):
                frame = av.VideoFrame.from_ndarray(np.roll(image, shift, 1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def write_list(folder: Path, lines: int) -> None:
    """A list of so many lines, with names as long as those of Kinetics."""
    path = folder / f"{lines}.txt"
    if path.exists():
        return
    for number in range(_MEDIA):
        link = folder / f"playing_squash_or_racquetball_{number:011d}_000010_000020.webm"
        if not link.exists():
            link.symlink_to(folder / f"{number}.webm")
    names = [f"playing_squash_or_racquetball_{k:011d}_000010_000020.webm" for k in range(_MEDIA)]
    with path.open("w", encoding="utf-8") as handle:
        for k in range(lines):
            handle.write(f"{names[k % _MEDIA]} {k % 400}\n")


def open_lists(folder: str, lines: int) -> Dataset:
    """A training list of so many lines, and a validation list of a thousand."""
    return open_dataset(
        DataConfig(
            root=folder,
            train_list=f"{lines}.txt",
            val_list="1000.txt",
            num_classes=400,
            cache_dir=f"{folder}/cache",
        ),
        progress=False,
    )


def open_loaders(dataset: Dataset) -> list[Loader]:
    """The loaders of both splits, decoding with one thread."""
    return [
        build_loader(
            dataset,
            split=split,  # type: ignore[arg-type]
            sampling=SamplingConfig(num_segments=8),
            augment=AugmentConfig(size=64, resize=64, scales=(1.0,)),
            loader=LoaderConfig(threads=1, prefetch=1, decoder="dali"),
            seed=0,
            micro_batch=_MICRO_BATCH,
            global_batch=_MICRO_BATCH,
        )
        for split in ("train", "val")
    ]


def measure_start(folder: Path, lines: int) -> dict[str, float]:
    """Seconds and bytes of a start with warm caches."""
    write_list(folder, lines)
    here = Path(__file__).resolve().parent
    script = _START.format(here=str(here), root=str(here.parent), folder=str(folder), lines=lines)
    for _ in range(2):
        answer = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure_clips(folder: Path, lengths: list[int], batches: int) -> dict[int, float]:
    """Median seconds per clip of each list, measured in turns."""
    runs = {}
    for lines in lengths:
        write_list(folder, lines)
        runs[lines] = open_loaders(open_lists(str(folder), lines))[0]
    times: dict[int, list[float]] = {lines: [] for lines in lengths}
    shortest = min(loader.batches_per_epoch for loader in runs.values())
    for turn in range(batches):
        # Where a list is read from makes no difference: each turn begins an epoch elsewhere.
        for lines in lengths if turn % 2 else lengths[::-1]:
            iterator = runs[lines].epoch(turn, start=turn % max(1, shortest - 8))
            next(iterator)  # threads and pipelines are under way
            start = time.process_time()
            for _ in range(4):
                next(iterator)
            times[lines].append((time.process_time() - start) / (4 * _MICRO_BATCH))
            iterator.close()  # type: ignore[attr-defined]
    return {lines: statistics.median(values[1:]) for lines, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--start", type=int, nargs="*", default=[240_000, 2_000_000])
    parser.add_argument("--batches", type=int, default=40, help="turns of 4 batches each")
    parser.add_argument("--folder", help="keep media, lists and caches here")
    parser.add_argument("--json", action="store_true", help="last line of stdout: the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "0.webm").exists():
            write_media(folder)
        write_list(folder, 1000)
        starts = {lines: measure_start(folder, lines) for lines in options.start}
        clips = measure_clips(folder, options.lines, options.batches)
    for lines, found in starts.items():
        print(
            f"{lines:9} lines: start {found['start_s']:.2f} s, first batch after "
            f"{found['first_batch_s']:.2f} s, peak {found['peak_bytes'] / 2**20:.0f} MiB "
            f"(imports alone {found['imports_bytes'] / 2**20:.0f}), not shared "
            f"{found['own_bytes'] / 2**20:.0f} ({found['own_imports_bytes'] / 2**20:.0f}) MiB"
        )
    shortest = clips[min(clips)]
    for lines, seconds in clips.items():
        ratio = seconds / shortest
        print(f"{lines:9} lines: {1000 * seconds:.3f} ms CPU per clip, {ratio:.3f} of the shortest")
    if options.json:
        ratios = {lines: seconds / shortest for lines, seconds in clips.items()}
        print(json.dumps({"start": starts, "ms_per_clip": clips, "ratio": ratios}))


if __name__ == "__main__":
    main()
