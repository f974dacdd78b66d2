"""Every backend returns exactly the frames asked for, from the packets they need.

ACCEL_TEST_VIDEOS=<folder> adds every video below the folder.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines import decode, packets
from pipelines.datasets import VIDEO_SUFFIXES
from pipelines.decode import DecodeCounts, read_frames
from pipelines.geometry import View
from pipelines.media import MediaInfo, open_video, probe
from pipelines.source import Sample, Steps
from pipelines.trim import trimmed_stream

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
    counts = DecodeCounts()
    for indices in requests(len(reference)):
        frames = read_frames(whole_frames(path, info, indices), counts)
        for frame, index in zip(frames, indices, strict=True):
            assert np.array_equal(frame, reference[int(index)]), int(index)
    assert counts.keys() == {"whole" if info.kind.codec == "mpeg4" else "trimmed"}


def test_conversion_to_rgb_starts_no_threads(
    make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyAV's default is a pool of one thread per core (on one core this test cannot fail)."""
    path = make_video("a.mp4", codec="libx264")
    kept = decode._reformatter()  # its threads would live as long as it
    monkeypatch.setattr(decode, "_reformatter", lambda: kept)
    before = set(os.listdir("/proc/self/task"))
    read_frames(whole_frames(path, probe(path), np.arange(4)))
    assert set(os.listdir("/proc/self/task")) <= before


VFR_TIMES = np.cumsum(np.arange(60) % 5 + 1).tolist()
# Not HEVC in AVI: FFmpeg does not write it.
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
    "hevc-closed": (
        "a.mp4", "libx265", {"x265-params": "keyint=10:open-gop=0:log-level=none"}, {}
    ),
    "mpeg4-b-avi": ("a.avi", "mpeg4", {"bf": "2", "g": "12"}, {}),
    "mpeg4-b-mp4": ("a.mp4", "mpeg4", {"bf": "2", "g": "12"}, {}),
    "mpeg2-ps": ("a.mpg", "mpeg2video", {"bf": "2", "g": "12"}, {}),
    "av1": ("a.mp4", "libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}, {}),
    "h264-avi": ("a.avi", "libx264", {"g": "12", "bf": "0"}, {}),
    "h264-b-avi": ("a.avi", "libx264", {"g": "12", "bf": "2"}, {}),
    "hevc-mkv": ("a.mkv", "libx265", {"x265-params": "keyint=10:open-gop=0:log-level=none"}, {}),
    "mpeg4-b-mkv": ("a.mkv", "mpeg4", {"bf": "2", "g": "12"}, {}),
    "av1-mkv": ("a.mkv", "libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}, {}),
    "av1-avi": ("a.avi", "libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}, {}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "15"}, {}),
    "vp9-odd-size": ("a.webm", "libvpx-vp9", {"g": "15"}, {"width": 98, "height": 70}),
    "vp8": ("a.webm", "libvpx", {"g": "15"}, {}),
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
    with open_video(path) as container:
        reference = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [read_code(frame) for frame in reference] == [(77, k) for k in range(info.num_frames)]
    counts = DecodeCounts()
    singles = [np.array([k]) for k in range(info.num_frames)]
    for indices in [*requests(info.num_frames), *singles]:
        frames = read_frames(whole_frames(path, info, indices), counts)
        for frame, index in zip(frames, indices, strict=True):
            assert np.array_equal(frame, reference[int(index)]), int(index)
    # Packets of MPEG-TS and MPEG-PS are scattered over the file.
    whole = path.suffix in (".ts", ".mpg") or codec == "mpeg4"
    assert counts.keys() == {"whole" if whole else "trimmed"}


def test_only_the_needed_packets_are_read(
    make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    pread = os.pread
    monkeypatch.setattr("os.pread", lambda *args: read.append(args[1]) or pread(*args))
    for codec, options in (
        ("libx264", {"g": "10", "bf": "2", "sc_threshold": "0"}),
        ("libvpx-vp9", {"g": "10"}),
    ):
        path = make_video("a.mkv", codec=codec, num_frames=200, options=options)
        info = probe(path)
        assert info.packets is not None and len(info.packets.keyframes) == 20
        table = info.packets
        for frame in (0, 9, 10, 57, 199):
            (span,) = table.spans([frame])
            assert len(span) <= 11 and span[0] in table.keyframes
            assert table.ranks[span[0]] <= frame and table.ranks[span[-1]] == frame
        assert [len(span) <= 6 for span in table.spans([3, 4, 150])] == [True, True]
        assert sum(len(span) for span in table.spans(range(200))) == 200
        read.clear()
        read_frames(whole_frames(path, info, np.array([5, 195])))
        assert 0 < sum(read) < path.stat().st_size / 4


def test_frames_of_an_open_gop_start_one_keyframe_earlier() -> None:
    #                    I0 P3 B1 B2 I6 B4 B5 P9 B7 B8: frames 4 and 5 refer to 3 and 6
    ranks, sizes = [0, 3, 1, 2, 6, 4, 5, 9, 7, 8], [1] * 10
    table = packets.make_table(list(range(10)), sizes, ranks, [0, 4], b"")
    assert table is not None and not table.closed
    assert [span.tolist() for span in table.spans([4])] == [[0, 1, 2, 3, 4, 5]]
    assert [span.tolist() for span in table.spans([7])] == [[4, 7, 8]]
    assert [span.tolist() for span in table.spans([1, 8])] == [[0, 1, 2], [4, 7, 8, 9]]
    assert [span.tolist() for span in table.spans([5, 6])] == [[0, 1, 2, 3, 4, 5, 6]]
    again = packets.PacketTable.unpack(table.pack())
    assert again.ranks.tolist() == ranks and again.offsets.tolist() == list(range(10))
    assert packets.make_table([0, 1], [1, 1], [0, 1], [], b"") is None  # no keyframe
    assert packets.make_table([0, 1], [1, 1], [0, 1], [1], b"") is None  # none for frame 0


def test_frames_that_do_not_come_are_decoded_from_the_start(
    make_video: Callable[..., Path],
    read_code: Callable[[np.ndarray], tuple[int, int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A container that calls a packet a keyframe that is none."""
    path = make_video("a.mp4", codec="libx264", num_frames=30, options={"g": "30", "bf": "0"})
    info = probe(path)
    assert info.packets is not None
    lying = replace(info.packets, keyframes=np.array([0, 17], np.int32))
    counts = DecodeCounts()
    (frame,) = read_frames(whole_frames(path, replace(info, packets=lying), np.array([20])), counts)
    assert read_code(frame) == (0, 20)
    assert counts == {"unexpected": 1} and "decoding whole" in caplog.text


@pytest.mark.needs_dali_video
@pytest.mark.parametrize("case", ["vp9", "vp9-alt-ref", "vp9-odd-size", "vp8", "mjpeg"])
def test_dali_decodes_the_same_frames(
    make_video: Callable[..., Path],
    read_code: Callable[[np.ndarray], tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    """DALI on the cut stream gives the bits of DALI on the whole file."""
    from pipelines.dali_video import DaliVideo

    name, codec, options, more = CLIPS[case]
    path = make_video(name, codec=codec, video=5, options=options, num_frames=60, **more)
    info = probe(path)
    assert info.kind.dali_cpu_problem is None and info.kind.trimmable
    uncut = replace(info, kind=replace(info.kind, trimmable=False))
    decoder = DaliVideo(
        max_samples=2,
        max_frames=8,
        threads=1,
        size=64,
        antialias=True,
        steps=Steps(resize=False, crop=False, scale=False, flip=False, repeat=True, num_views=1),
    )
    for indices in requests(60):
        samples = [whole_frames(path, each, indices) for each in (info, uncut)]
        (cut,), (whole,) = decoder.finish(decoder.submit(samples)).numpy()
        assert np.array_equal(cut, whole)
        assert [read_code(frame) for frame in cut] == [(5, int(k)) for k in indices]
    decoder.close()


@pytest.mark.parametrize(
    "case", ["h264-gop12-b2", "h264-vfr", "hevc-closed", "vp9", "vp8", "mjpeg", "av1"]
)
def test_the_cut_stream_is_a_file_with_the_same_frames(
    make_video: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """What is handed to decoders that never seek (DALI on the CPU, NVDEC), read by FFmpeg."""
    name, codec, options, more = CLIPS[case]
    path = make_video(name, codec=codec, options=options, num_frames=60, **more)
    info = probe(path)
    assert info.kind.trimmable
    with open_video(path) as container:
        reference = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for indices in requests(60):
        unique = np.unique(indices).astype(np.int64)
        encoded, places = trimmed_stream(whole_frames(path, info, unique), unique)
        cut = tmp_path / "cut.mkv"
        cut.write_bytes(encoded.tobytes())
        with open_video(cut) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for place, index in zip(places, unique, strict=True):
            assert np.array_equal(frames[place], reference[index])
