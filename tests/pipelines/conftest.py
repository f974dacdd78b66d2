"""Synthetic videos whose pixels say which frame of which video they are."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import decoders
from pipelines.annotations import VideoSet
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decoders import Decoder, DecoderPlan
from pipelines.loader import Batch, Loader, build_loader
from pipelines.source import Sample

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


@pytest.fixture
def dozen(make_video: MakeVideo, make_dataset: Callable[[Sequence[Path]], Dataset]) -> Dataset:
    """Twelve VP9 clips of 8 frames; a third of them may be bad."""
    paths = [make_video(f"{k:02d}.webm", num_frames=8, video=k) for k in range(12)]
    return replace(make_dataset(paths), max_bad_fraction=0.34)


@pytest.fixture(
    params=[
        pytest.param("dali", marks=pytest.mark.needs_dali_video),
        pytest.param("pyav", marks=pytest.mark.needs_dali),
        "torch",
    ]
)
def decoder(request: pytest.FixtureRequest) -> str:
    """dali: DALI decodes and scales; pyav: PyAV decodes, DALI scales; torch: without DALI."""
    return str(request.param)


@pytest.fixture(
    params=[
        pytest.param("dali", marks=pytest.mark.needs_dali),
        pytest.param("pyav", marks=pytest.mark.needs_dali),
        "torch",
    ]
)
def image_decoder(request: pytest.FixtureRequest) -> str:
    """As `decoder`, for folders of frames, which every DALI decodes; else Pillow does."""
    return str(request.param)


@pytest.fixture
def open_loader() -> Iterator[Callable[..., Loader]]:
    """open_loader(dataset, "val", decoder=..., ...): whole frames in order, closed at the end."""
    opened: list[Loader] = []

    def open_one(
        dataset: Dataset, split: str = "train", *, decoder: str = "torch", **changes: Any
    ) -> Loader:
        name = "pyav" if decoder == "torch" else decoder
        threads = changes.pop("threads", 2)
        arguments: dict[str, Any] = {
            "sampling": SamplingConfig(num_segments=4),
            "augment": AugmentConfig(size=64, resize=64, scales=(1.0,), flip=False),
            "loader": LoaderConfig(threads=threads, decoder=name, timeout_s=60.0, prefetch=1),
            "seed": 3,
            "micro_batch": 2,
            "global_batch": 4,
        }
        with pytest.MonkeyPatch.context() as patch:
            if decoder == "torch":
                patch.setattr(decoders, "dali_installed", lambda: False)
            opened.append(build_loader(dataset, split=split, **(arguments | changes)))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


@pytest.fixture
def facts() -> Callable[[Sequence[Batch]], list[tuple[list[int], list[int], list[int]]]]:
    """Ids, labels and pixels (sums) of batches."""
    return lambda batches: [
        (b.sample_ids.tolist(), b.labels.tolist(), b.clips.long().sum((1, 2, 3, 4)).tolist())
        for b in batches
    ]


class Faults:
    """faulty({2: change}): from now on the second call of `finish` of any decoder goes wrong."""

    def __init__(self) -> None:
        self({})

    def __call__(self, changes: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.calls = 0
        self.built = 0
        self.changes = changes

    @staticmethod
    def fail(clips: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Critical error in pipeline: no longer valid")

    @staticmethod
    def lose_frames(clips: torch.Tensor) -> torch.Tensor:
        return clips[:, :, :-1]


class _FaultyDecoder:
    def __init__(self, inner: Decoder, faults: Faults) -> None:
        self._inner, self._faults = inner, faults
        faults.built += 1

    def submit(self, samples: Sequence[Sample]) -> Any:
        return self._inner.submit(samples)

    def finish(self, submitted: Any) -> torch.Tensor:
        self._faults.calls += 1
        change = self._faults.changes.get(self._faults.calls, lambda clips: clips)
        return change(self._inner.finish(submitted))

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Wraps every decoder that is built from now on; see `Faults`."""
    faults, build = Faults(), DecoderPlan.build
    monkeypatch.setattr(
        DecoderPlan, "build", lambda plan, name: _FaultyDecoder(build(plan, name), faults)
    )
    return faults
