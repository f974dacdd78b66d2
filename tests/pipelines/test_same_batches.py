"""The asked frames at the asked crop, the same for any backend, number of threads and of ranks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import decoders
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.fallback import apply_views
from pipelines.loader import Loader, build_loader
from pipelines.source import Sample

MakeVideo = Callable[..., Path]
MakeDataset = Callable[[Sequence[Path]], Dataset]
ReadCode = Callable[[np.ndarray], tuple[int, int]]
VFR = {"times": [0, 1, 3, 4, 9, 10, 11, 20, 21, 30, 32, 33, 40, 41, 60, 61]}
ODD = {"width": 67, "height": 65}
SETS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vp9": [
        ("cfr.webm", {"options": {"g": "6"}}),
        ("vfr.webm", {"options": {"g": "6"}, **VFR}),
        ("hidden.webm", {"options": {"auto-alt-ref": "1", "lag-in-frames": "12", "g": "9"}}),
        ("odd.webm", ODD),
        ("one.webm", {"num_frames": 1}),
        ("in.mp4", {"options": {"g": "5"}}),
    ],
    "h264": [
        ("b.mp4", {"options": {"g": "6", "bf": "2"}}),
        ("b-vfr.mkv", {"options": {"g": "6", "bf": "3"}, **VFR}),
        ("open.mkv", {"options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}}),
        ("odd.mp4", {**ODD, "pixel_format": "yuv444p"}),
        ("one.mp4", {"num_frames": 1}),
        ("long.mp4", {"options": {"g": "250", "bf": "3"}}),
    ],
    "hevc": [
        ("b.mp4", {"options": {"x265-params": "keyint=6:bframes=3:log-level=none"}}),
        ("one.mkv", {"num_frames": 1, "options": {"x265-params": "log-level=none"}}),
    ],
    "av1": [
        ("a.mp4", {"options": {"g": "6", "preset": "12", "svtav1-params": "lp=1"}}),
        ("vfr.mkv", {"options": {"g": "6", "preset": "12", "svtav1-params": "lp=1"}, **VFR}),
    ],
    "mpeg4": [
        ("b.avi", {"options": {"g": "6", "bf": "2"}}),
        ("one.mp4", {"num_frames": 1}),
    ],
}  # fmt: skip
CODECS = {"vp9": "libvpx-vp9", "h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
# mean difference in gray levels from frames of PyAV scaled by torch
BACKENDS = [
    pytest.param("dali", 2.0, marks=pytest.mark.needs_dali_video),
    pytest.param("pyav", 0.5, marks=pytest.mark.needs_dali),
    pytest.param("torch", 0.0),
]
CASES = [
    pytest.param(name, *backend.values, marks=backend.marks, id=f"{name}-{backend.values[0]}")
    for name in SETS
    for backend in BACKENDS
    if backend.values[0] != "dali" or name == "vp9"  # what DALI decodes on a CPU
]


def open_loader(dataset: Dataset, backend: str, split: str, **changes: Any) -> Loader:
    name = "pyav" if backend == "torch" else backend
    threads = changes.pop("threads", 1)
    arguments: dict[str, Any] = {
        "sampling": SamplingConfig(num_segments=4, short_videos="first_frame"),
        "augment": AugmentConfig(size=64, resize=64, scales=(1.0, 0.8)),
        "loader": LoaderConfig(threads=threads, decoder=name, timeout_s=60.0),  # type: ignore[arg-type]
        "seed": 5,
        "micro_batch": 2,
        "global_batch": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(dataset, split=split, **(arguments | changes))  # type: ignore[arg-type]


Clips = dict[tuple[str, int, int], np.ndarray]
"""(split, epoch, sample id) -> its clip."""


def read_all(loaders: dict[str, list[Loader]]) -> tuple[Clips, dict[tuple[str, int, int], Sample]]:
    clips: Clips = {}
    samples = {}
    for split, of_ranks in loaders.items():
        for loader in of_ranks:
            for epoch in (0, 3) if split == "train" else (0,):
                for index, batch in enumerate(loader.epoch(epoch)):
                    pairs = zip(loader.samples(epoch, index), batch.clips.numpy(), strict=True)
                    for sample, clip in pairs:
                        key = (split, epoch, sample.sample_id)
                        assert key not in clips
                        clips[key], samples[key] = clip, sample
            loader.close()
    return clips, samples


@pytest.mark.parametrize(("name", "backend", "tolerance"), CASES)
def test_asked_frames_and_crops(
    make_video: MakeVideo,
    make_dataset: MakeDataset,
    read_code: ReadCode,
    name: str,
    backend: str,
    tolerance: float,
) -> None:
    square = {"width": 64, "height": 64, "num_frames": 16, "codec": CODECS.get(name, name)}
    paths = [
        make_video(file, **{**square, "video": 40 + k, **options})
        for k, (file, options) in enumerate(SETS[name])
    ]
    paths = (paths * 4)[: max(4, len(paths) // 4 * 4)] if len(paths) < 4 else paths
    dataset = make_dataset(paths)
    videos = len(SETS[name])
    expected: Clips = {}
    for world_size, micro_batch, threads in ((1, 4, 1), (2, 2, 3), (4, 1, 2)):
        loaders = {
            split: [
                open_loader(
                    dataset, backend, split,
                    threads=threads, rank=rank, world_size=world_size, micro_batch=micro_batch,
                )
                for rank in range(world_size)
            ]
            for split in ("train", "val")
        }  # fmt: skip
        clips, samples = read_all(loaders)
        if not expected:
            expected = clips
            assert {key[2] for key in clips if key[0] == "val"} == set(range(len(paths)))
            for (split, _, sample_id), sample in samples.items():
                clip, frames = clips[split, _, sample_id], read_frames(sample)
                wanted = sample.frame_indices.tolist()
                codes = [read_code(frame) for frame in frames]
                assert codes == [(40 + sample_id % videos, k) for k in wanted]
                (view,) = apply_views(frames, sample.views, size=64, antialias=True)
                assert np.abs(clip.astype(int) - view).mean() <= tolerance
                if split == "val":  # whole frames: the pixels say which ones they are
                    assert [read_code(frame) for frame in clip] == codes
        assert clips.keys() == expected.keys()
        assert all(np.array_equal(clips[key], expected[key]) for key in clips)
