"""Every kind of faulty video: decoded to the frames it has, or left out with a reason.

Row D1 of the fault matrix.
"""

import errno
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config import SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.errors import MediaError
from pipelines.fallback import apply_views
from pipelines.loader import Loader
from pipelines.media import probe

MakeVideo = Callable[..., Path]
MakeDataset = Callable[[Sequence[Path]], Dataset]
ReadCode = Callable[[np.ndarray], tuple[int, int]]
HMDB = Path(__file__).parents[1] / "data" / "hmdb51"


def cut(share: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def overwrite_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8000] = np.random.default_rng(0).bytes(8000)
    path.write_bytes(content)


def patched(path: Path, tag: bytes, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(tag) + offset
    content[place : place + len(value)] = value
    path.write_bytes(content)


def rotate(path: Path) -> None:
    matrix = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    patched(path, b"tkhd", 44, matrix)


def without_moov(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") - 4])


def no_frames(path: Path) -> None:
    """A whole file with a video stream and nothing in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix != ".avi" else "mjpeg", rate=25)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuv420p" if path.suffix != ".avi" else "yuvj420p"
        container.start_encoding()


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
    "tenth.mp4": ({"codec": "libx264"}, cut(0.1), "header declares"),
    "tenth.avi": (MJPEG, cut(0.1), "header declares"),
    "most.webm": ({}, cut(0.9), "header declares"),
    "no-moov.mp4": ({}, without_moov, "moov"),
    "audio.webm": ({}, audio_only, "audio only"),
    "no-frames.webm": ({}, no_frames, "End of file"),
    "no-frames.mp4": ({}, no_frames, "got none"),
    "no-frames.avi": (MJPEG, no_frames, "expected video frames, got none"),
    "one-frame.webm": ({"num_frames": 1}, None, ""),
    "webm-named.mp4": ({"container": "webm"}, None, ""),
    "text.webm": ({}, lambda path: path.write_text("no video " * 99), "cannot open it"),
    "vfr.webm": ({"times": [0, 1, 2, 7, 8, 30, 31, 50]}, None, ""),
    "odd.webm": ({"width": 97, "height": 71}, None, ""),
    "rotated.mp4": ({}, rotate, ""),
    "one-more.avi": (MJPEG, declare_frames(9), ""),
    "one-less.avi": (MJPEG, declare_frames(7), ""),
    "half.avi": (MJPEG, declare_frames(4), ""),
    "half-more.avi": (MJPEG, declare_frames(12), ""),
    "ten-bit.mp4": ({"codec": "libx264", "pixel_format": "yuv420p10le"}, None, ""),
}


def test_every_kind_of_faulty_video(
    make_video: MakeVideo,
    make_dataset: MakeDataset,
    open_loader: Callable[..., Loader],
    read_code: ReadCode,
    decoder: str,
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
    dataset = replace(make_dataset(paths), max_bad_fraction=0.6)
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


@pytest.mark.parametrize(
    ("pattern", "damage", "part"),
    [
        ("*.webm", Path.unlink, "No such file"),
        ("*.webm", lambda path: (path.unlink(), path.mkdir()), "got a folder"),
        ("*.webm", lambda path: path.write_bytes(b""), "empty"),
        ("*.webm", lambda path: path.write_text("plain text, no video " * 50), "cannot open it"),
        ("*.mp4", lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "web page"),
        ("*.mp4", lambda path: path.write_text("version https://git-lfs.github.com/"), "LFS"),
        ("*.mp4", lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nother.mp4\n"), "video file"),
        ("*.mp4", lambda path: path.write_bytes(bytes(range(256)) * 20), "video file"),
        ("*.webm", audio_only, "audio only"),
        ("*.webm", cut(0.5), "header declares"),
        ("*.mp4", cut(0.5), "header declares"),
        ("*.avi", cut(0.5), "header declares"),
        ("*.webm", overwrite_middle, "damaged"),
        ("*.mp4", lambda path: path.write_bytes(path.read_bytes()[:40]), "damaged"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, pattern: str, damage: Callable[[Path], object], part: str
) -> None:
    path = tmp_path / f"clip{pattern[1:]}"
    shutil.copy(sorted(HMDB.glob(pattern))[0], path)
    damage(path)
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert str(caught.value).startswith(f"{path}: ") and part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["*.webm", "*.mp4", "*.avi"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_indexed_or_refused(
    tmp_path: Path, pattern: str, data: st.DataObject
) -> None:
    """Any edit of a real file: a MediaError, or an index whose frames can be asked for."""
    original = sorted(HMDB.glob(pattern))[-1].read_bytes()
    content = bytearray(original[: data.draw(st.sampled_from([len(original), 5000, 300, 20]))])
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, max(0, min(len(content) - 1, 4000))))
        content[start : start + 8] = data.draw(st.binary(max_size=16))
    path = tmp_path / f"clip{pattern[1:]}"
    path.write_bytes(content)
    try:
        info = probe(path)
    except MediaError as error:
        assert str(path) in str(error)
        return
    assert info.num_frames >= 1 and info.width > 0 and info.height > 0
    assert info.packets is None or len(info.packets.packet_of_frame) == info.num_frames


CUT_WHILE_PROBED = """
import os, sys
from pathlib import Path
from pipelines import containers, media

path = Path(sys.argv[1])
content = path.read_bytes()
for module, name in (
    (containers, "_matroska_damage"), (media, "open_video"), (media, "_ranks_by_time"),
    (media, "_places"), (media, "make_table"),
):
    path.write_bytes(content)
    media.probe(path)
    function = getattr(module, name)

    def cut(*arguments):
        os.truncate(path, 5000)
        return function(*arguments)

    setattr(module, name, cut)
    try:
        print("got", media.probe(path).num_frames)
    except media.MediaError as error:
        print(error)
    setattr(module, name, function)
"""


def test_a_file_that_is_cut_while_it_is_probed(make_video: MakeVideo) -> None:
    """No read of it can kill the process, as a page of a memory map would (SIGBUS)."""
    path = make_video("a.mkv", codec="mjpeg", pixel_format="yuvj420p", width=960, height=720)
    size = path.stat().st_size
    assert size > 3 * 65_536
    command = [sys.executable, "-c", CUT_WHILE_PROBED, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, (answer.returncode, answer.stderr)
    change = f"{path}: its size changed from {size} to 5000 bytes while it was looked at"
    lines = answer.stdout.splitlines()
    assert len(lines) == 5 and all(line.startswith(change) for line in lines), lines


def test_disks_that_give_parts_or_fail(
    make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video("a.mkv", codec="mjpeg", pixel_format="yuvj420p", width=640, height=480)
    expected = probe(path)
    assert expected.packets is not None
    read, calls = os.pread, list[int]()

    def in_parts(handle: int, count: int, place: int) -> bytes:
        return read(handle, min(count, 999), place)

    monkeypatch.setattr("os.pread", in_parts)
    got = probe(path)
    assert got.packets is not None and got.packets.pack() == expected.packets.pack()

    def failing(number: int, handle: int, count: int, place: int) -> bytes:
        calls.append(place)
        if len(calls) == number:
            raise OSError(errno.EIO, "Input/output error")
        return read(handle, count, place)

    monkeypatch.setattr("os.pread", partial(failing, 0))
    probe(path)
    for number in range(1, len(calls) + 1):
        calls.clear()
        monkeypatch.setattr("os.pread", partial(failing, number))
        with pytest.raises(MediaError, match=r"a\.mkv: cannot be read: Input/output error"):
            probe(path)
