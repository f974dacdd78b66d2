"""`accel data check` finds what decoders hide; the deny-list keeps it out of training."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from accel.cli.main import main
from pipelines.annotations import VideoSet
from pipelines.audit import audit
from pipelines.config import DataConfig
from pipelines.datasets import open_dataset
from pipelines.deny_list import read_deny_list
from pipelines.errors import AnnotationError, DataError

MakeVideo = Callable[..., Path]


def write_list(root: Path, names: list[str], file: str = "list.txt") -> None:
    (root / file).write_text("".join(f"{name} {k % 2}\n" for k, name in enumerate(names)))


def black_tail(path: Path, pixel_format: str = "yuv420p") -> None:
    """Ten frames of a picture, then four black ones."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixel_format
        for index in range(14):
            pixels = np.full((64, 96, 3), 128 if index < 10 else 0, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def test_damage_is_found_and_denied(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video("good.mp4", codec="libx264")
    make_video("vfr.mp4", codec="libx264", num_frames=5, times=[0, 1, 2, 9, 10])
    black_tail(tmp_path / "tail.mp4")
    path = make_video("cut.webm")
    path.write_bytes(path.read_bytes()[:-300])
    shutil.copy(make_video("noise.webm", num_frames=30), tmp_path / "noise.webm.copy")
    with av.open(str(tmp_path / "noise.webm.copy")) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = (tmp_path / "noise.webm").read_bytes()
    (tmp_path / "noise.webm").write_bytes(content.replace(packets[20], bytes(len(packets[20]))))
    names = ["good.mp4", "vfr.mp4", "tail.mp4", "cut.webm", "noise.webm", "gone.mp4", "good.mp4"]
    write_list(tmp_path, names)

    arguments = ["data", "check", "--root", str(tmp_path), "--list", "list.txt", "--threads", "2"]
    assert main(arguments) == 3
    output = capsys.readouterr().out
    assert "note vfr.mp4: its frame rate varies" in output
    assert "bad  tail.mp4: its last 4 of 14 frames are black" in output
    assert "1 line with a path listed before" in output and "7 lines checked, 4 videos" in output
    denied = read_deny_list(tmp_path / "deny.txt")
    assert denied.keys() == {"tail.mp4", "cut.webm", "noise.webm", "gone.mp4"}
    assert "header declares" in denied["cut.webm"] and "No such file" in denied["gone.mp4"]

    lists = {"train_list": "list.txt", "val_list": "val.txt", "deny_list": "deny.txt"}
    data = DataConfig(root=str(tmp_path), **lists)
    write_list(tmp_path, ["good.mp4", "vfr.mp4"], "val.txt")
    dataset = open_dataset(data)
    assert [record.name for record in dataset.train] == ["good.mp4", "vfr.mp4", "good.mp4"]
    assert [record.label for record in dataset.train] == [0, 1, 0]
    write_list(tmp_path, ["good.mp4", "tail.mp4"], "val.txt")
    with pytest.raises(DataError, match=r"1 validation video in .* e\.g\. tail\.mp4: its last 4"):
        open_dataset(data)
    (tmp_path / "deny.txt").write_text("no tab\n")
    with pytest.raises(AnnotationError, match=r"deny\.txt:1: expected .*, got 'no tab'"):
        open_dataset(data)


def test_black_frames_and_garbage_are_found_in_every_form(
    tmp_path: Path, make_video: MakeVideo, make_frames: Callable[..., Path]
) -> None:
    """10-bit video, MPEG-TS, folders of frames, a JPEG that lacks its last part, noise in MJPEG."""
    black_tail(tmp_path / "ten.mp4", "yuv420p10le")
    for name in ("tail", "dark", "noise", "good"):
        make_frames(name, num_frames=12)
    black = Image.new("RGB", (96, 64))
    for number in range(1, 13):
        black.save(tmp_path / "dark" / f"{number:05d}.jpg")
        if number > 8:
            black.save(tmp_path / "tail" / f"{number:05d}.jpg")
    path = tmp_path / "noise" / "00005.jpg"
    rng = np.random.default_rng(0)
    clear = Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8))
    clear.save(path, quality=90)
    path.write_bytes(path.read_bytes()[:-2000] + b"\xff\xd9")  # a cut file with an end
    wrong = np.asarray(Image.open(path)).astype(int) - np.asarray(clear)
    assert np.abs(wrong[32:]).mean() > 20  # Pillow says nothing
    mjpeg = make_video("mj.avi", codec="mjpeg", pixel_format="yuvj420p")
    with av.open(str(mjpeg)) as container:
        packet = next(each for each in container.demux(video=0) if each.size and each.pts == 4)
        place, size = packet.pos + packet.size // 2, packet.size // 4
    content = bytearray(mjpeg.read_bytes())
    noise = rng.integers(0, 255, size, np.uint8).tobytes().replace(b"\xff", b"\0")
    content[place : place + size] = noise
    mjpeg.write_bytes(content)
    stream = make_video("cut.ts", codec="libx264", num_frames=30)
    stream.write_bytes(stream.read_bytes()[: 188 * 20 + 50])

    write_list(tmp_path, ["mj.avi", "ten.mp4", "cut.ts"], "files.txt")
    lines = [f"{name} 12 0\n" for name in ("tail", "dark", "noise", "good")]
    (tmp_path / "folders.txt").write_text("".join(lines))
    options = ["--root", str(tmp_path), "--threads", "1", "--list", "files.txt", "folders.txt"]
    assert main(["data", "check", *options]) == 3
    denied = read_deny_list(tmp_path / "deny.txt")
    assert denied.keys() == {"mj.avi", "ten.mp4", "cut.ts", "tail", "dark", "noise"}
    assert denied["ten.mp4"] == denied["tail"].replace("of 12", "of 14")
    assert denied["tail"] == "its last 4 of 12 frames are black"
    assert denied["dark"] == "all its frames are black"
    assert denied["noise"] == "00005.jpg is damaged, although it decodes"
    assert "ends in the middle of a packet of 188 bytes" in denied["cut.ts"]
    assert "cannot be decoded" in denied["mj.avi"]


def test_a_good_set_and_its_statistics(
    tmp_path: Path,
    make_video: MakeVideo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    names = [make_video(f"{k}.webm", num_frames=10 + k).name for k in range(3)]
    write_list(tmp_path, names)
    options = ["--root", str(tmp_path), "--list", "list.txt"]
    for quick in ([], ["--quick"]):
        assert main(["data", "check", *options, *quick]) == 0
        assert not (tmp_path / "deny.txt").exists()
    assert main(["data", "stats", *options]) == 0
    output = capsys.readouterr().out
    assert "videos     3" in output and "10 to 12, median 11" in output
    assert "96 x 64" in output and "vp9 yuv420p in matroska,webm, e.g. 0.webm" in output
    assert main(["data", "stats", "--root", str(tmp_path / "none"), "--list", "x"]) == 2

    (tmp_path / "bad.webm").write_bytes(b"x" * 100)
    write_list(tmp_path, ["bad.webm", *names])
    write_list(tmp_path, ["bad.webm"], "bad.txt")
    capsys.readouterr()
    assert main(["data", "stats", *options, "bad.txt"]) == 3
    output = capsys.readouterr().out
    assert "videos     4" in output and "10 to 12, median 11" in output
    assert output.count("1 cannot be used and are not counted below, e.g. bad.webm: ") == 2
    assert "2 videos cannot be used; `accel data check --root" in output
    assert "list.txt bad.txt`" in output and "--data.deny_list" in output


def test_folders_are_checked_frame_by_frame(
    tmp_path: Path, make_frames: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "missing", "short", "cut", "size"):
        make_frames(name, num_frames=9)
    (tmp_path / "missing" / "00005.jpg").unlink()
    cut = tmp_path / "cut" / "00006.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    Image.new("RGB", (60, 40)).save(tmp_path / "size" / "00003.jpg")
    lines = "good 9 0\nmissing 9 1\nshort 8 0\ncut 9 1\nsize 9 0\n"
    (tmp_path / "list.txt").write_text(lines)
    assert main(["data", "check", "--root", str(tmp_path), "--list", "list.txt"]) == 3
    assert "note short: the folder has more frames than the 8" in capsys.readouterr().out
    assert read_deny_list(tmp_path / "deny.txt").keys() == {"missing", "cut", "size"}


def test_a_process_that_cannot_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError) as caught:
        list(audit(VideoSet(tmp_path, [("a.mp4", 0)]), threads=1, progress=False))
    start = "the process that reads the videos ended with exit code 1 while it was reading none of "
    assert str(caught.value).startswith(f"{start}them. What it printed")
