"""Synthetic videos whose pixels say which frame of which video they are."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.annotations import VideoSet
from pipelines.datasets import Dataset

_BITS = 18  # 8 of the video, 10 of the frame
_COLUMNS = 6
WIDTH, HEIGHT = 96, 64


def coded_frame(video: int, frame: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[height, width, 3] uint8: one gray block per bit of (video, frame), 6 columns x 3 rows."""
    number = video << 10 | frame
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(_BITS):
        row, column = divmod(bit, _COLUMNS)
        rows = slice(row * height // 3, (row + 1) * height // 3)
        columns = slice(column * width // _COLUMNS, (column + 1) * width // _COLUMNS)
        image[rows, columns] = 215 if number >> bit & 1 else 40
    return image


def decoded_code(image: np.ndarray) -> tuple[int, int]:
    """(video, frame) of a whole coded frame of any size."""
    height, width = image.shape[:2]
    number = 0
    for bit in range(_BITS):
        row, column = divmod(bit, _COLUMNS)
        y, x = int((row + 0.5) * height / 3), int((column + 0.5) * width / _COLUMNS)
        number |= int(image[y - 2 : y + 3, x - 2 : x + 3].mean() > 128) << bit
    return number >> 10, number & 1023


MakeVideo = Callable[..., Path]


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """Write a coded video: make_video("a.mp4", num_frames=30, codec="libx264", ...)."""

    def make(
        name: str,
        *,
        num_frames: int = 20,
        codec: str = "libvpx-vp9",
        video: int = 0,
        width: int = WIDTH,
        height: int = HEIGHT,
        pixel_format: str = "yuv420p",
        times: Sequence[int] | None = None,
        options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            fast = {"libx264": {"preset": "ultrafast"}, "libvpx-vp9": {"cpu-used": "8"}}
            merged = {**fast.get(codec, {}), **(options or {})}
            stream = container.add_stream(codec, rate=25, options=merged)
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            for index in range(num_frames):
                pixels = coded_frame(video, index, width, height)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = times[index] if times else index
                frame.time_base = Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture
def make_frames(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of coded frames: make_frames("a", num_frames=9, frame_name=..., ...)."""

    def make(
        name: str,
        *,
        num_frames: int = 12,
        video: int = 0,
        frame_name: str = "{:05d}.jpg",
        first: int = 1,
        width: int = WIDTH,
        height: int = HEIGHT,
        mode: str = "RGB",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for index in range(num_frames):
            image = Image.fromarray(coded_frame(video, index, width, height)).convert(mode)
            image.save(folder / frame_name.format(first + index), quality=90)
        return folder

    return make


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[[Sequence[Path]], Dataset]:
    """A Dataset whose two splits both hold the given files, with labels 0, 1, 2, 0, ..."""

    def make(paths: Sequence[Path]) -> Dataset:
        names = [os.path.relpath(path, tmp_path) for path in paths]
        videos = VideoSet(tmp_path, [(name, k % 3) for k, name in enumerate(names)])
        return Dataset(videos, videos, ("a", "b", "c"), tmp_path / "cache")

    return make


@pytest.fixture
def read_code() -> Callable[[np.ndarray], tuple[int, int]]:
    return decoded_code
