"""`accel data check` and `prepare`: lists of parts of folders, full disks, options, deny-lists."""

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from accel.cli.main import main
from pipelines import progress
from pipelines.annotations import read_list
from pipelines.decode import read_frames
from pipelines.deny_list import read_deny_list
from pipelines.geometry import View
from pipelines.media import open_video
from pipelines.progress import progress_bar
from pipelines.shards import probe_record
from pipelines.source import Sample

MakeFrames = Callable[..., Path]
MakeVideo = Callable[..., Path]
ReadCode = Callable[[np.ndarray], tuple[int, int]]


@pytest.mark.parametrize("packed", [[], ["--shards", "2"], ["--codec", "copy", "--shards", "2"]])
def test_parts_of_a_folder_are_videos_of_their_own(
    tmp_path: Path, make_frames: MakeFrames, read_code: ReadCode, packed: list[str]
) -> None:
    make_frames("in/a", num_frames=30, video=3)
    lists = {"train.txt": "a 0 10 0\na 10 10 1\na 20 10 2\n", "val.txt": "a 0 12 0\na 10 10 1\n"}
    for name, text in lists.items():
        (tmp_path / "in" / name).write_text(text)
    out = tmp_path / "out"
    options = ["--root", str(tmp_path / "in"), "--list", *lists, "--out", str(out)]
    for _ in range(2):  # the second time, everything is there
        assert main(["data", "prepare", *options, *packed]) == 0
        expected = {"train.txt": [(0, 10), (10, 10), (20, 10)], "val.txt": [(0, 12), (10, 10)]}
        for name, parts in expected.items():
            records = read_list(out / name, root=out)
            assert [record.label for record in records] == list(range(len(parts)))
            for record, (first, count) in zip(records, parts, strict=True):
                info = probe_record(record, "")
                assert info.num_frames == count
                view = View((96, 64), (0, 0, 96, 64), flip=False)
                frames = read_frames(Sample(0, record.path, np.arange(count), (view,), 0, info))
                assert [read_code(f) for f in frames] == [(3, first + k) for k in range(count)]


def test_every_part_of_a_folder_is_checked(
    tmp_path: Path, make_frames: MakeFrames, capsys: pytest.CaptureFixture[str]
) -> None:
    make_frames("a", num_frames=20)
    make_frames("b", num_frames=20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "00003.jpg").write_bytes(b"")
    (tmp_path / "train.txt").write_text(
        "empty 0 5 0\na 0 10 0\na 10 10 1\nb 0 10 1\nb 0 10 2\nb 10 10 0\n"
    )
    (tmp_path / "val.txt").write_text("b 0 10 2\n")
    arguments = ["data", "check", "--root", str(tmp_path), "--list", "train.txt", "val.txt"]
    assert main(arguments) == 3
    assert read_deny_list(tmp_path / "deny.txt").keys() == {"empty", "a"}
    output = capsys.readouterr().out
    assert "train.txt: 1 line with a path listed before" in output
    assert "train.txt: 1 video with two labels, e.g. b" in output
    assert f"val.txt: 1 video also in {tmp_path / 'train.txt'}, e.g. b" in output


def test_copies_have_the_colors_of_the_original_and_outlive_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From BT.709, full range and JPEG; the copies are BT.601, whose matrix is another one."""
    stripes = [(200, 30, 40), (30, 180, 60), (40, 60, 210), (220, 210, 40), (90, 90, 90)]
    picture = np.repeat(np.array(stripes, np.uint8), 32, axis=0)[None].repeat(96, axis=0)
    root, out = tmp_path / "in", tmp_path / "out"
    (root / "frames").mkdir(parents=True)
    for number in (1, 2):
        Image.fromarray(picture).save(root / "frames" / f"{number:05d}.jpg", quality=95)
    for name, matrix, limits in (("hd.mp4", "ITU709", "MPEG"), ("full.mp4", "ITU601", "JPEG")):
        with av.open(str(root / name), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25, options={"crf": "5"})
            stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            codec = stream.codec_context
            codec.colorspace = 1 if matrix == "ITU709" else 6
            codec.color_range = 2 if limits == "JPEG" else 1
            for _ in range(2):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                options = {"dst_colorspace": matrix, "dst_color_range": limits}
                container.mux(stream.encode(frame.reformat(format="yuv420p", **options)))
            container.mux(stream.encode(None))
    lists = {"files.txt": "hd.mp4 0\nfull.mp4 0\n", "frames.txt": "frames 2 0\n"}
    copies = []
    for name, text in lists.items():
        (root / name).write_text(text)
        options = ["--root", str(root), "--list", name, "--out", str(out / name)]
        assert main(["data", "prepare", *options, "--quality", "5"]) == 0
        copies += [record.path for record in read_list(out / name / name, root=out / name)]
    for copy in copies:
        with open_video(copy) as container:
            (shown, _) = (f.to_ndarray(format="rgb24") for f in container.decode(video=0))
        wrong = np.abs(shown.astype(int) - picture).reshape(96, 5, 32, 3)[:, :, 8:-8]
        assert wrong.mean(axis=(0, 2, 3)).max() < 5, copy.name  # of each stripe

    (root / "hd.mp4").unlink()
    options = ["--root", str(root), "--list", "files.txt", "--out", str(out / "files.txt")]
    assert main(["data", "prepare", *options, "--quality", "5"]) == 0
    assert "0 copies written, 2 kept, 0 failed" in capsys.readouterr().out
    (root / "files.txt").write_text("never.mp4 0\n")
    assert main(["data", "prepare", *options, "--quality", "5"]) == 3
    assert "not copied: never.mp4: No such file" in capsys.readouterr().out


def test_progress_in_a_log_file_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar(2, "preparing", "video") as bar:
        bar.update()
    assert not capsys.readouterr().err  # it took no minute
    monkeypatch.setattr(progress, "_LOG_INTERVAL_S", 0.0)
    with progress_bar(2, "preparing", "video") as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.replace("\r", "").splitlines()
    assert re.fullmatch(r"preparing: 1 of 2, .*video/s, \d\d:\d\d left", lines[1])
    with progress_bar(2, "preparing", "video", show=False) as bar:
        bar.update()
    assert not capsys.readouterr().err


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Nobody can write larger files: as on a full disk, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("packed", [[], ["--shards", "2"], ["--codec", "copy", "--shards", "2"]])
def test_prepare_stops_at_a_full_disk(
    tmp_path: Path,
    make_video: MakeVideo,
    capsys: pytest.CaptureFixture[str],
    packed: list[str],
) -> None:
    names = [make_video(f"in/{k}.mp4", codec="libx264", video=k).name for k in range(6)]
    (tmp_path / "in" / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    out = tmp_path / "out"
    options = ["--root", str(tmp_path / "in"), "--list", "list.txt", "--out", str(out), *packed]
    arguments = ["data", "prepare", *options, "--threads", "1"]
    with largest_file(1500):  # enough for the settings
        assert main(arguments) == 3
    error = capsys.readouterr().err
    assert f"{out}: cannot be written: " in error and "the same command goes on" in error
    assert error.count("\n") == 1 and not (out / "list.txt").exists()
    assert main(arguments) == 0
    assert "6 copies written, 0 kept" in capsys.readouterr().out and not [*out.rglob("*.part-*")]


def test_a_full_cache_folder_or_deny_list_is_one_sentence(
    tmp_path: Path,
    make_video: MakeVideo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    make_video("a.webm", num_frames=3)
    (tmp_path / "list.txt").write_text("a.webm 0\ngone.webm 0\n")
    options = ["--root", str(tmp_path), "--list", "list.txt"]
    with largest_file(10):
        assert main(["data", "stats", *options]) == 3
        assert "the cache folder cannot be written: File too large" in capsys.readouterr().err
        assert main(["data", "check", *options]) == 3
    output = capsys.readouterr()
    assert "bad  gone.webm" in output.out and "deny-list cannot be written" in output.err


@pytest.mark.parametrize(
    ("command", "options", "problem"),
    [
        ("check", ["--threads", "-2"], "error: --threads: expected 0..1024, got -2"),
        ("prepare", ["--threads", "-1"], "error: --threads: expected 0..1024, got -1"),
        ("stats", ["--frame-name", "img_{}_{}.jpg"], "error: --frame-name: expected a file name"),
        ("check", ["--frame-name", "img.jpg"], "error: --frame-name: expected a file name"),
        ("prepare", ["--shards", "0"], "--shards: expected a number of videos >= 1, got 0"),
        ("prepare", ["--codec", "copy"], "--shards: expected it with --codec copy"),
        ("prepare", ["--quality", "52"], "--quality: expected 0..51, got 52"),
        ("prepare", ["--quality", "-1", "--codec", "vp9"], "--quality: expected 0..63, got -1"),
        ("check", ["--out", "list.txt"], "--out: expected another file than the lists"),
    ],
)
def test_wrong_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    problem: str,
) -> None:
    (tmp_path / "list.txt").write_text("a.webm 0\n")
    out = ["--out", str(tmp_path / "out")] * (command == "prepare")
    arguments = ["--root", str(tmp_path), "--list", "list.txt", *out, *options]
    assert main(["data", command, *arguments]) == 2
    assert problem in capsys.readouterr().err
    assert (tmp_path / "list.txt").read_text() == "a.webm 0\n"
