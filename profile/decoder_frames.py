"""Whether every decoder gives the frames of PyAV: on the clips of tests/data, or other files.

    python profile/decoder_frames.py --device cuda --json      # NVDEC too
    python profile/decoder_frames.py my.mp4 --decoders dali_gpu

Eight frames of each file, cut but not scaled. A decoder passes when its frames differ from PyAV's
by at most --tolerance grey levels in the mean (other rounding 2, BT.601 instead of BT.709 below
10), and each is nearer to the wanted frame than to its neighbors, where those can be told apart.
What a decoder does not read (NVDEC: MPEG-4 in AVI, say) is listed and is no failure, unless it is
everything. Exit code 1: some decoder gave other frames or failed, or read nothing on a GPU.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.annotations import VideoSet
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.errors import DataError
from pipelines.loader import build_loader
from pipelines.media import probe

CLIPS = Path(__file__).resolve().parents[1] / "tests" / "data" / "hmdb51"
SUFFIXES = (".avi", ".mkv", ".mp4", ".webm")
TOLD_APART = 3.0  # grey levels between neighbors
DECODERS = ("dali", "dali_gpu")


def compare(path: Path, decoder: str, device: torch.device, cache: Path) -> dict[str, Any]:
    """Mean difference to the wanted frames, and frames that are nearer to a neighbor.

    Raises:
        ValueError, DataError: the decoder does not read such a file, or fails.
    """
    info = probe(path)
    videos = VideoSet(path.parent, [(path.name, 0)])
    loader = build_loader(
        Dataset(videos, videos, ("all",), cache),
        split="val",
        sampling=SamplingConfig(num_segments=min(8, info.num_frames)),
        augment=AugmentConfig(size=min(info.width, info.height), resize=0, flip=False),
        loader=LoaderConfig(decoder=decoder, threads=2, timeout_s=60),  # type: ignore[arg-type]
        seed=0,
        micro_batch=1,
        global_batch=1,
        device=device,
    )
    try:
        (sample,) = loader.samples(0, 0)
        (batch,) = loader.epoch(0)
        clip = batch.clips[0].cpu().numpy()  # [F, size, size, 3]
    finally:
        loader.close()
    window = sample.views[0].window
    near = [
        read_frames(replace(sample, frame_indices=_clipped(sample, by)), window=window)
        for by in (-1, 0, 1)
    ]
    differences = np.array([_difference(clip, frames) for frames in near])  # [3, F]
    apart = [_difference(near[1], frames) > TOLD_APART for frames in (near[0], near[2])]
    nearer = [
        told & (differences[k] < differences[1]) for told, k in zip(apart, (0, 2), strict=True)
    ]
    return {
        "file": path.name,
        "decoder": decoder,
        "frames": len(clip),
        "told_apart": int((apart[0] | apart[1]).sum()),
        "mean_difference": round(float(differences[1].mean()), 3),
        "wrong_frames": int((nearer[0] | nearer[1]).sum()),
    }


def _clipped(sample: Any, by: int) -> np.ndarray:
    return np.clip(sample.frame_indices + by, 0, sample.info.num_frames - 1)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[F] mean over the pixels, grey levels."""
    return np.abs(a.astype(np.int16) - b).mean(axis=(1, 2, 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: the clips of tests/data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), choices=DECODERS)
    parser.add_argument("--tolerance", type=float, default=10.0, help="grey levels, in the mean")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    files = args.files or sorted(p for p in CLIPS.iterdir() if p.suffix in SUFFIXES)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, list[str]] = {}
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        for path in files:
            for decoder in args.decoders:
                try:
                    row = compare(path.absolute(), decoder, torch.device(args.device), Path(cache))
                except (ValueError, DataError) as error:
                    reason = str(error)
                    refused = "pass --loader.decoder" in reason  # before anything was decoded
                    failures += not refused
                    left_out.setdefault(decoder, []).append(reason)
                    print(
                        f"{path.name}: {decoder}: {'not read' if refused else 'FAILED'}: {reason}"
                    )
                    continue
                good = row["mean_difference"] <= args.tolerance and not row["wrong_frames"]
                rows.append({**row, "same": good})
                failures += not good
                print(
                    f"{path.name}: {decoder}: {row['mean_difference']} levels, "
                    f"{row['wrong_frames']} of {row['frames']} frames wrong"
                )
    if args.device == "cuda" and not all(
        any(r["decoder"] == d for r in rows) for d in args.decoders
    ):
        failures += 1
    if args.json:
        print(json.dumps({"frames": rows, "left_out": left_out, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
