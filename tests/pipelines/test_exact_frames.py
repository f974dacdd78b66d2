"""Every backend returns exactly the frames asked for.

ACCEL_TEST_VIDEOS=<folder> adds every video below the folder.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets import VIDEO_SUFFIXES
from pipelines.fallback import read_frames
from pipelines.geometry import View
from pipelines.media import MediaInfo, open_video, probe
from pipelines.source import Sample, Steps

HMDB = Path(__file__).parents[1] / "data" / "hmdb51"
FOLDERS = [HMDB, *map(Path, filter(None, [os.environ.get("ACCEL_TEST_VIDEOS")]))]
VIDEOS = sorted(
    path for folder in FOLDERS for path in folder.rglob("*") if path.suffix in VIDEO_SUFFIXES
)


def whole_frames(path: Path, info: MediaInfo, indices: np.ndarray) -> Sample:
    size = (info.width, info.height)
    view = View(size, (0, 0, *size), flip=False)
    return Sample(0, path, np.asarray(indices, np.int64), (view,), 0, info)


def requests(num_frames: int) -> list[np.ndarray]:
    """Segments, neighbors, single frames, the last frame, a repeated frame."""
    rng = np.random.default_rng(num_frames)
    count = min(8, num_frames)
    spread = [np.sort(rng.choice(num_frames, count, replace=False)) for _ in range(3)]
    last = num_frames - 1
    return [*spread, np.arange(count), np.array([last]), np.array([last // 2, last]), np.zeros(3)]


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_real_clips_equal_a_full_decode(path: Path) -> None:
    with open_video(path) as container:
        reference = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    info = probe(path)
    assert info.num_frames == len(reference)
    for indices in requests(len(reference)):
        frames = read_frames(whole_frames(path, info, indices))
        for frame, index in zip(frames, indices, strict=True):
            assert np.array_equal(frame, reference[int(index)]), int(index)


VFR_TIMES = np.cumsum(np.arange(60) % 5 + 1).tolist()
CLIPS = {
    "h264-gop12-b2": ("a.mp4", "libx264", {"g": "12", "bf": "2"}, {}),
    "h264-gop250-b3": ("a.mp4", "libx264", {"g": "250", "bf": "3"}, {}),
    "h264-open-gop": ("a.mkv", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}, {}),
    "h264-intra": ("a.mov", "libx264", {"g": "1"}, {}),
    "h264-ts": ("a.ts", "libx264", {"g": "12", "bf": "2"}, {}),
    "h264-vfr": ("a.mp4", "libx264", {"g": "7"}, {"times": VFR_TIMES}),
    "h264-late-start": ("a.mkv", "libx264", {"g": "9"}, {"times": list(range(50, 110))}),
    "h264-odd-size": ("a.mp4", "libx264", {"g": "12"}, {"width": 98, "height": 70}),
    "h264-444-odd": (
        "a.mp4", "libx264", {"g": "12"}, {"width": 97, "height": 63, "pixel_format": "yuv444p"}
    ),
    "h264-10-bit": ("a.mkv", "libx264", {"g": "12"}, {"pixel_format": "yuv420p10le"}),
    "hevc": ("a.mp4", "libx265", {"x265-params": "keyint=10:log-level=none"}, {}),
    "mpeg4-b-avi": ("a.avi", "mpeg4", {"bf": "2", "g": "12"}, {}),
    "mpeg4-b-mp4": ("a.mp4", "mpeg4", {"bf": "2", "g": "12"}, {}),
    "mpeg2-ps": ("a.mpg", "mpeg2video", {"bf": "2", "g": "12"}, {}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "15"}, {}),
    "vp9-alt-ref": ("a.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "20"}, {}),
    "vp8-alt-ref": ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}, {}),
    "mjpeg": ("a.avi", "mjpeg", {}, {"pixel_format": "yuvj420p"}),
    "one-frame": ("a.mp4", "libx264", {}, {"num_frames": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CLIPS)
def test_coded_frames_arrive(
    make_video: Callable[..., Path],
    read_code: Callable[[np.ndarray], tuple[int, int]],
    case: str,
) -> None:
    name, codec, options, more = CLIPS[case]
    path = make_video(name, codec=codec, video=77, options=options, **{"num_frames": 60, **more})
    info = probe(path)
    assert info.num_frames == more.get("num_frames", 60)
    for indices in requests(info.num_frames):
        frames = read_frames(whole_frames(path, info, indices))
        assert [read_code(frame) for frame in frames] == [(77, int(k)) for k in indices]


@pytest.mark.needs_dali
@pytest.mark.parametrize("case", ["vp9", "vp9-alt-ref", "mjpeg", "vp8-alt-ref"])
def test_dali_decodes_the_same_frames(
    make_video: Callable[..., Path],
    read_code: Callable[[np.ndarray], tuple[int, int]],
    case: str,
) -> None:
    from pipelines.dali_video import DaliVideo

    name, codec, options, more = CLIPS[case]
    path = make_video(name, codec=codec, video=5, options=options, num_frames=60, **more)
    info = probe(path)
    if info.dali_cpu_problem:
        pytest.skip(info.dali_cpu_problem)
    decoder = DaliVideo(
        max_samples=1,
        threads=1,
        size=64,
        antialias=True,
        steps=Steps(resize=False, crop=False, scale=False, flip=False, repeat=True, num_views=1),
    )
    for indices in requests(60):
        ((frames,),) = decoder.run([whole_frames(path, info, indices)]).numpy()
        assert [read_code(frame) for frame in frames] == [(5, int(k)) for k in indices]
    decoder.close()
