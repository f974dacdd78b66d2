"""The media index: what is in a file, and the cache."""

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipelines import shards
from pipelines.annotations import VideoSet
from pipelines.errors import DataError, MediaError
from pipelines.index_file import MediaIndex
from pipelines.media import MediaInfo, probe
from pipelines.media_index import index_videos


def index(paths: Sequence[Path], cache: Path, threads: int = 2) -> MediaIndex:
    videos = VideoSet(Path("/"), [(str(path), 0) for path in paths])
    return index_videos(videos, cache_dir=cache, threads=threads)


MakeVideo = Callable[..., Path]
HMDB = Path(__file__).parents[1] / "data" / "hmdb51"


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.webm", "libvpx-vp9", {}),
        ("a.webm", "libvpx", {}),
        ("a.mkv", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "crf": "30"}),
        ("a.mp4", "libx264", {"g": "5", "bf": "2"}),
        ("a.avi", "mjpeg", {}),
        ("a.avi", "mpeg4", {"bf": "2"}),
    ],
)
def test_frames_are_counted(
    make_video: MakeVideo, name: str, codec: str, options: dict[str, str]
) -> None:
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = make_video(name, codec=codec, num_frames=21, options=options, pixel_format=pixel_format)
    info = probe(path)
    assert (info.num_frames, info.width, info.height) == (21, 96, 64)
    assert (info.packets is None) == (codec == "mpeg4")
    if info.packets is not None:
        shown = info.packets.ranks[info.packets.ranks >= 0]
        assert sorted(shown) == list(range(21))
        assert info.kind.regular == (len(info.packets.ranks) == 21)
    decodable = {"libvpx-vp9", "libvpx", "mjpeg"}
    assert (info.kind.dali_cpu_problem is None) == (codec in decodable and info.kind.regular)


def test_packed_b_frames_are_counted_by_decoding() -> None:
    info = probe(next(HMDB.glob("*TrumanShow*.avi")))
    assert info.num_frames == 48 and info.packets is None  # 49 packets, as the header declares


def test_index_is_cached_by_size_and_time(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [make_video(f"{k}.webm", num_frames=10 + k) for k in range(3)]
    paths.append(paths[0])
    cache = tmp_path / "cache"
    first = index(paths, cache, 2)
    assert first.num_frames.tolist() == [10, 11, 12, 10]
    assert first.sizes == [(96, 64)]
    assert [kind.codec for kind, _ in first.kinds] == ["vp9"]

    probed = []
    monkeypatch.setattr(shards, "probe", lambda path: probed.append(path) or probe(path))
    again = index(paths, cache, 2)
    assert [facts(info) for info in again] == [facts(probe(path)) for path in paths]
    assert probed == []
    make_video("1.webm", num_frames=15)
    changed = index(paths, cache, 2)
    assert probed == [paths[1]] and changed[1].num_frames == 15
    paths[2].unlink()
    make_video("0.webm", num_frames=9)
    probed.clear()
    with pytest.raises(MediaError, match=r"2\.webm"):
        index(paths, cache, 2)
    make_video("2.webm", num_frames=8)
    probed.clear()
    repaired = index(paths, cache, 2)
    assert probed == [paths[2]] and repaired.num_frames.tolist() == [9, 15, 8, 9]


def facts(info: MediaInfo) -> tuple[object, ...]:
    """Everything an index says about a file, comparable."""
    table = info.packets
    assert table is not None
    columns = (table.offsets, table.sizes, table.ranks, table.keyframes)
    return (*(vars(info) | {"packets": table.header}).values(), *(c.tolist() for c in columns))


def cut_tables(content: bytes) -> bytes:
    return content[:-1]


def flip_a_row(content: bytes) -> bytes:
    place = content.index(b'{"rows"') + 400
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"{",
        lambda content: b'{"version": 1, "entries": {"x": {}}}',
        lambda content: content[:60],
        cut_tables,
        flip_a_row,
    ],
)
def test_damaged_cache_is_rebuilt(
    make_video: MakeVideo,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    cache = tmp_path / "cache"
    paths = [make_video("a.mp4", codec="libx264", times=[0, 1, 2, 5, 9], num_frames=5)] * 9
    first = [facts(info) for info in index(paths, cache, 1)]
    (file,) = cache.rglob("*.index")
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = index(paths, cache, 1)
    assert [facts(info) for info in again] == first
    assert "unreadable media index" in caplog.text
    assert not list(cache.rglob("*.tmp-*"))


def test_damaged_packet_table_is_an_error(make_video: MakeVideo, tmp_path: Path) -> None:
    opened = index([make_video("a.webm")], tmp_path, 1)
    (file,) = tmp_path.rglob("*.index")
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes(9))
    with pytest.raises(DataError, match=r"index is damaged .* delete it"):
        opened[0]
    with file.open("r+b") as handle:
        handle.write(content)


def test_several_failures_are_one_message(make_video: MakeVideo, tmp_path: Path) -> None:
    paths = [make_video("good.webm")] + [tmp_path / f"{k}.webm" for k in range(5)]
    with pytest.raises(MediaError, match=r"0\.webm"):
        index(paths[:2], tmp_path, 2)
    with pytest.raises(
        DataError, match=r"5 of 6 videos cannot be used, allowed 0 .*\n.*\n +5  .*0\.webm: [^\n]*$"
    ):
        index(paths, tmp_path, 2)


def test_a_file_is_given_up_after_the_second_attempt(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: the first read of every file fails, as on a network disk that has its moments."""
    paths = [make_video(f"{k}.webm", num_frames=4 + k) for k in range(3)]
    read, attempts = os.pread, Counter[str]()

    def flaky(handle: int, count: int, place: int) -> bytes:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".webm"):
            attempts[name] += 1
            if attempts[name] == 1 or name.endswith(broken):
                raise OSError(errno.EIO, "Input/output error")
        return read(handle, count, place)

    monkeypatch.setattr("os.pread", flaky)
    broken = "no file"
    assert index(paths, tmp_path / "first").num_frames.tolist() == [4, 5, 6]
    attempts.clear()
    broken = "1.webm"
    with pytest.raises(MediaError, match=r"1\.webm: cannot be read: Input/output error"):
        index(paths, tmp_path / "second")
    assert attempts[str(paths[1])] == 2


def test_cache_folder_that_cannot_be_written(make_video: MakeVideo, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cache folder cannot be written.*--data\.cache_dir"):
        index([make_video("a.webm")], tmp_path / "file", 1)
