"""Every kind of faulty video and folder: decoded to the frames it has, or left out with a reason.

Rows D1 and D2 of the fault matrix.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pipelines import decoders
from pipelines.annotations import read_list
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.fallback import apply_views
from pipelines.loader import Loader, build_loader

MakeVideo = Callable[..., Path]
MakeDataset = Callable[[Sequence[Path]], Dataset]
ReadCode = Callable[[np.ndarray], tuple[int, int]]
DECODERS = [
    pytest.param("dali", marks=pytest.mark.needs_dali_video),
    pytest.param("pyav", marks=pytest.mark.needs_dali),
    "torch",
]


def open_loader(dataset: Dataset, split: str = "train", **changes: Any) -> Loader:
    decoder = changes.pop("decoder", "torch")
    name = "pyav" if decoder == "torch" else decoder
    arguments: dict[str, Any] = {
        "sampling": SamplingConfig(num_segments=4),
        "augment": AugmentConfig(size=64, resize=64, scales=(1.0,), flip=False),
        "loader": LoaderConfig(
            threads=changes.pop("threads", 2), decoder=name, timeout_s=60.0, prefetch=1
        ),
        "seed": 3,
        "micro_batch": 2,
        "global_batch": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        if decoder == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(dataset, split=split, **(arguments | changes))


def patched(path: Path, tag: bytes, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(tag) + offset
    content[place : place + len(value)] = value
    path.write_bytes(content)


def rotate(path: Path) -> None:
    matrix = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    patched(path, b"tkhd", 44, matrix)


def cut(share: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def without_moov(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") - 4])


def header_only(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75")])  # the first cluster


def audio_only(path: Path) -> None:
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), "s16", "mono")
        frame.rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def declare_frames(count: int) -> Callable[[Path], None]:
    return lambda path: patched(path, b"avih", 8 + 16, struct.pack("<I", count))


MJPEG = {"codec": "mjpeg", "pixel_format": "yuvj420p"}
VIDEOS: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
    # name: how it is made, what is done to it, part of the reason ("" = it is decoded)
    "good.webm": ({}, None, ""),
    "empty.webm": ({}, lambda path: path.write_bytes(b""), "is empty"),
    "tenth.webm": ({}, cut(0.1), "header declares"),
    "no-moov.mp4": ({}, without_moov, "moov"),
    "audio.webm": ({}, audio_only, "audio only"),
    "no-frames.webm": ({}, header_only, " "),
    "one-frame.webm": ({"num_frames": 1}, None, ""),
    "webm-named.mp4": ({"container": "webm"}, None, ""),
    "text.webm": ({}, lambda path: path.write_text("no video " * 99), "cannot open it"),
    "vfr.webm": ({"times": [0, 1, 2, 7, 8, 30, 31, 50]}, None, ""),
    "odd.webm": ({"width": 98, "height": 70}, None, ""),
    "rotated.mp4": ({}, rotate, ""),
    "one-more.avi": (MJPEG, declare_frames(9), ""),
    "one-less.avi": (MJPEG, declare_frames(7), ""),
    "half.avi": (MJPEG, declare_frames(4), ""),
    "half-more.avi": (MJPEG, declare_frames(12), ""),
    "ten-bit.mp4": ({"codec": "libx264", "pixel_format": "yuv420p10le"}, None, ""),
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_kind_of_faulty_video(
    make_video: MakeVideo, make_dataset: MakeDataset, read_code: ReadCode, decoder: str
) -> None:
    """D1: decoded to the frames it has, or left out with a reason; counted."""
    made = {n: v for n, v in VIDEOS.items() if decoder != "dali" or n != "ten-bit.mp4"}
    paths = []
    for number, (name, (options, change, _)) in enumerate(made.items()):
        options = {"num_frames": 8, "video": number, **options}
        container = options.pop("container", name.rpartition(".")[2])
        path = make_video(f"{number}.{container}", **{"codec": "libvpx-vp9", **options})
        path = path.rename(path.with_name(name))
        if change is not None:
            change(path)
        paths.append(path)
    dataset = replace(make_dataset(paths), max_bad_fraction=0.5)
    loader = open_loader(
        dataset, "val", decoder=decoder,
        sampling=SamplingConfig(num_segments=4, short_videos="first_frame"),
    )  # fmt: skip
    batches = list(loader.epoch(0))
    reasons = {entry.path: entry.reason for entry in loader.quarantine.entries}
    expected = {name: part for name, (_, _, part) in made.items() if part}
    assert reasons.keys() == expected.keys()
    assert all(part in reasons[name] for name, part in expected.items()), reasons
    samples = {s.sample_id: s for k in range(len(batches)) for s in loader.samples(0, k)}
    came = {}
    for batch in batches:
        for sample_id, clip in zip(batch.sample_ids.tolist(), batch.clips.numpy(), strict=True):
            came[sample_id] = clip
    assert {list(made)[k] for k in came} == made.keys() - reasons.keys()
    for sample_id, clip in came.items():
        frames = read_frames(samples[sample_id])
        codes = [read_code(frame) for frame in frames]
        wanted = samples[sample_id].frame_indices.tolist()
        assert codes == [(sample_id, k) for k in wanted], list(made)[sample_id]
        (view,) = apply_views(frames, samples[sample_id].views, size=64, antialias=True)
        assert np.abs(clip.astype(int) - view).mean() < 2.0, list(made)[sample_id]
    loader.close()


def first(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


FOLDERS: dict[str, tuple[Callable[[Path], object] | None, str]] = {
    "good": (None, ""),
    "no first": (first("00001.jpg"), "00001.jpg is missing"),
    "no middle": (first("00004.jpg"), "00004.jpg: cannot be read"),
    "no last": (first("00008.jpg"), "00008.jpg is missing"),
    "empty file": (lambda f: (f / "00003.jpg").write_bytes(b""), "00003.jpg: expected a JPEG"),
    "truncated": (lambda f: cut(0.4)(f / "00005.jpg"), "00005.jpg: cannot be decoded"),
    "other size": (lambda f: Image.new("RGB", (60, 40)).save(f / "00006.jpg"), "got 60 x 40"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "No such file"),
    "loop": (
        lambda f: (f.rename(f.with_name("gone")), f.symlink_to(f)), "cannot be read"
    ),
    "übergröße": (None, ""),
    "gray": (lambda f: [Image.open(p).convert("L").save(p) for p in f.iterdir()], ""),
    "cmyk": (lambda f: [Image.open(p).convert("CMYK").save(p) for p in f.iterdir()], ""),
}  # fmt: skip


@pytest.mark.parametrize(
    "decoder", [*DECODERS[1:], pytest.param("dali", marks=pytest.mark.needs_dali)]
)
def test_every_kind_of_faulty_folder(
    tmp_path: Path, make_frames: Callable[..., Path], read_code: ReadCode, decoder: str
) -> None:
    """D2: as D1."""
    lines = ""
    for number, (name, (change, _)) in enumerate(FOLDERS.items()):
        folder = make_frames(f"clips/{name}", num_frames=8, video=number, width=64)
        lines += f"clips/{name}\t8\t{number % 3}\n"
        if change is not None:
            change(folder)
    (tmp_path / "list.txt").write_text(lines)
    videos = read_list(tmp_path / "list.txt", root=tmp_path)
    dataset = Dataset(videos, videos, ("a", "b", "c"), tmp_path / "cache", max_bad_fraction=0.8)
    loader = open_loader(dataset, "val", decoder=decoder, sampling=SamplingConfig(num_segments=8))
    batches = list(loader.epoch(0))
    reasons = {entry.path[6:]: entry.reason for entry in loader.quarantine.entries}
    expected = {name: part for name, (_, part) in FOLDERS.items() if part}
    assert reasons.keys() == expected.keys()
    assert all(part in reasons[name] for name, part in expected.items()), reasons
    codes = {
        sample_id: [read_code(frame) for frame in clip]
        for batch in batches
        for sample_id, clip in zip(batch.sample_ids.tolist(), batch.clips.numpy(), strict=True)
    }
    assert codes == {
        k: [(k, f) for f in range(8)] for k, name in enumerate(FOLDERS) if name not in expected
    }
    training = open_loader(dataset, decoder=decoder, sampling=SamplingConfig(num_segments=8))
    sizes = [len(batch.labels) for batch in training.epoch(0)]
    assert sizes == [2] * 6 and training.quarantine.entries[0].split == "train"
    loader.close()
    training.close()
