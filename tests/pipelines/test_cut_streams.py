"""Streams that were cut without being encoded anew, and keyframes that are none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.decode import DecodeCounts, read_frames
from pipelines.errors import MediaError
from pipelines.geometry import View
from pipelines.matroska import MOST_FRAMES
from pipelines.media import MediaInfo, open_video, probe
from pipelines.packets import PacketTable
from pipelines.shards import make_record
from pipelines.source import Sample, Steps
from pipelines.trim import trimmed_stream

MakeVideo = Callable[..., Path]
ReadCode = Callable[[np.ndarray], tuple[int, int]]


def sample_of(path: Path, info: MediaInfo, frames: np.ndarray) -> Sample:
    size = (info.width, info.height)
    return Sample(0, path, frames, (View(size, (0, 0, *size), flip=False),), 0, info)


def copy_from(source: Path, target: Path, *, packet: int = 0, keyframe: int = 0) -> None:
    """The packets from one on, as `ffmpeg -c copy` writes them."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        packets = [each for each in read.demux(stream) if each.size]
        starts = [k for k, each in enumerate(packets) if each.is_keyframe]
        copied = written.add_stream_from_template(stream)
        for each in packets[packet or starts[keyframe] :]:
            each.stream = copied
            written.mux(each)


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts"])
@pytest.mark.parametrize(
    ("codec", "options", "place"),
    [
        ("libx264", {"preset": "fast", "g": "12", "bf": "3"}, {"packet": 5}),
        ("libx265", {"x265-params": "keyint=10:bframes=3:log-level=none"}, {"keyframe": 1}),
    ],
)
def test_frames_without_their_references_are_not_counted(
    make_video: MakeVideo,
    tmp_path: Path,
    read_code: ReadCode,
    codec: str,
    options: dict[str, str],
    place: dict[str, int],
    name: str,
) -> None:
    whole = make_video("whole.mp4", codec=codec, num_frames=40, video=9, options=options)
    path = tmp_path / name
    copy_from(whole, path, **place)
    with open_video(path) as container:
        codes = [read_code(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    first = codes[0][1]
    assert 0 < first < 20 and codes == [(9, k) for k in range(first, 40)]
    info = probe(path)
    assert info.num_frames == len(codes)
    counts = DecodeCounts()
    for frames in (np.arange(info.num_frames), *np.arange(info.num_frames)[:, None]):
        pixels = read_frames(sample_of(path, info, frames), counts)
        assert [read_code(each) for each in pixels] == [codes[k] for k in frames]
    assert counts.keys() == {"whole" if name == "cut.ts" else "trimmed"}


def test_a_stream_that_no_decoder_can_begin_is_refused(
    make_video: MakeVideo, tmp_path: Path
) -> None:
    whole = make_video("whole.webm", num_frames=12, options={"g": "50"})
    copy_from(whole, tmp_path / "cut.webm", packet=5)
    with pytest.raises(MediaError, match=r"cut\.webm: cannot be decoded"):
        probe(tmp_path / "cut.webm")


def test_intra_refresh_has_no_keyframe_to_cut_at(
    make_video: MakeVideo, read_code: ReadCode
) -> None:
    refresh = {"preset": "fast", "x264-params": "intra-refresh=1:keyint=10:bframes=0"}
    path = make_video("a.mp4", codec="libx264", num_frames=40, options=refresh)
    info = probe(path)
    assert info.packets is not None and len(info.packets.keyframes) > 1
    assert not info.kind.trimmable and info.kind.regular
    frames = np.array([5, 13, 37])
    encoded, places = trimmed_stream(sample_of(path, info, frames), frames)
    assert encoded.tobytes() == path.read_bytes() and places.tolist() == frames.tolist()
    counts = DecodeCounts()
    for frame in frames:
        (pixels,) = read_frames(sample_of(path, info, frame[None]), counts)
        assert read_code(pixels) == (0, frame)
    assert counts["unexpected"] > 0
    with pytest.raises(MediaError, match="whose packets cannot be cut out"):
        make_record("a", path, info)


@pytest.mark.needs_dali_video
def test_dali_gives_nothing_for_a_frame_that_does_not_come(make_video: MakeVideo) -> None:
    """Neither black (its default) nor the last one."""
    from pipelines.dali_video import DaliVideo

    path = make_video("a.webm", num_frames=8)
    info = replace(probe(path), num_frames=12, packets=None)
    options = {"resize": False, "crop": False, "scale": False, "flip": False, "repeat": False}
    steps = Steps(**options, num_views=1)
    decoder = DaliVideo(
        max_samples=1, max_frames=2, threads=1, size=64, antialias=True, steps=steps
    )
    with pytest.raises(RuntimeError):
        decoder.finish(decoder.submit([sample_of(path, info, np.array([3, 10]))]))
    decoder.close()


def test_more_packets_than_a_cut_file_can_hold(make_video: MakeVideo) -> None:
    path = make_video("a.webm", num_frames=4)
    info = probe(path)
    assert info.packets is not None
    count = MOST_FRAMES + 1
    ranks, zeros = np.arange(count, dtype=np.int32), np.zeros(count, np.int64)
    table = PacketTable(zeros, zeros.astype(np.int32), ranks, np.zeros(1, np.int32), b"")
    long = MediaInfo(info.kind, info.width, info.height, count, info.size_bytes, table)
    last = np.array([count - 1])
    encoded, places = trimmed_stream(sample_of(path, long, last), last)
    assert encoded.tobytes() == path.read_bytes() and places.tolist() == last.tolist()
