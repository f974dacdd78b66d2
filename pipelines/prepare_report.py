"""What preparing a set has brought: sizes, and clips per second before and after."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.annotations import Part, VideoRecord
from pipelines.decode import read_frames
from pipelines.geometry import View
from pipelines.media import MediaInfo
from pipelines.packets import media_file
from pipelines.sampling import segment_indices_center
from pipelines.shards import probe_record, shard_opener
from pipelines.source import Sample

_MEASURED = 16  # videos
_TURNS = 3


@dataclass(frozen=True)
class Report:
    """What came of it."""

    written: int
    kept: int
    """Found complete from an earlier run."""

    failed: dict[Part, str]
    """Why there is no copy."""

    bytes_before: int
    """Of the originals that are still there."""

    bytes_after: int
    clips_per_s_before: float
    """Of 8 segment frames, one thread, decoding only; 0 = no original is left."""

    clips_per_s_after: float


def sizes(pairs: Sequence[tuple[VideoRecord, VideoRecord]]) -> tuple[int, int]:
    """Bytes of the originals that are there, and of the files that hold the copies."""
    originals = {original.path for original, _ in pairs if original.path.exists()}
    copies = {media_file(copy.path) for _, copy in pairs}
    return sum(map(_size, originals)), sum(map(_size, copies))


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size


def rates(pairs: Sequence[tuple[VideoRecord, VideoRecord]], frame_name: str) -> tuple[float, float]:
    """Clips/s of originals and of copies: some from all over the set, read in turns; of a few turns
    the fastest, which other work has disturbed least.

    Args:
        pairs: of a video and its copy; originals may be gone.
        frame_name: names of the files in folders of frames.
    """
    places = np.linspace(0, len(pairs) - 1, min(_MEASURED, len(pairs))).astype(int)
    chosen = [pairs[place] for place in places.tolist()]
    open_shard = shard_opener()
    samples = [
        [_sample(video, probe_record(video, name, open_shard)) for video in videos]
        for videos, name in (
            ([original for original, _ in chosen if original.path.exists()], frame_name),
            ([copy for _, copy in chosen], ""),
        )
    ]
    seconds = [[_seconds(side) for side in samples] for _ in range(_TURNS)]
    before, after = (
        len(side) / max(min(turns), 1e-9)
        for side, turns in zip(samples, zip(*seconds, strict=True), strict=True)
    )
    return before, after


def _sample(record: VideoRecord, info: MediaInfo) -> Sample:
    size = (info.width, info.height)
    indices = np.unique(segment_indices_center(info.num_frames, 8))
    return Sample(0, record.path, indices, (View(size, (0, 0, *size), flip=False),), 0, info)


def _seconds(samples: Sequence[Sample]) -> float:
    start = time.perf_counter()
    for sample in samples:
        read_frames(sample)
    return time.perf_counter() - start
