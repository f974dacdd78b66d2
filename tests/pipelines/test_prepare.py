"""`accel data prepare`: the same frames in smaller files with short GOPs; can be repeated."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from accel.cli.main import main
from pipelines.annotations import read_list
from pipelines.cache import file_lock
from pipelines.config import DataConfig
from pipelines.datasets import open_dataset
from pipelines.media import open_video, probe

MakeVideo = Callable[..., Path]
ReadCode = Callable[[np.ndarray], tuple[int, int]]


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_copies_have_the_same_frames(
    tmp_path: Path,
    make_video: MakeVideo,
    make_frames: Callable[..., Path],
    read_code: ReadCode,
    capsys: pytest.CaptureFixture[str],
    codec: str,
) -> None:
    times = np.cumsum(np.arange(40) % 3 + 1).tolist()
    make_video("in/a/vfr.mkv", codec="libx264", num_frames=40, video=1, times=times)
    make_video("in/b.webm", num_frames=1, video=2)
    wide = {"width": 130, "height": 98, "pixel_format": "yuv444p"}
    make_video("in/wide.mp4", codec="libx264", num_frames=20, video=3, **wide)
    (tmp_path / "in" / "broken.mp4").write_bytes(b"x" * 100)
    names = ["a/vfr.mkv", "b.webm", "wide.mp4", "broken.mp4", "b.webm"]
    text = "".join(f"{name} {k}\n" for k, name in enumerate(names))
    (tmp_path / "in" / "train.txt").write_text(text)
    (tmp_path / "in" / "val.txt").write_text("b.webm 1\n")
    out = tmp_path / "out"
    options = ["--root", str(tmp_path / "in"), "--list", "train.txt", "val.txt", "--out", str(out)]
    options += ["--short-side", "64", "--gop", "8", "--codec", codec, "--threads", "2"]
    assert main(["data", "prepare", *options]) == 3
    output = capsys.readouterr().out
    assert "not copied: broken.mp4" in output and "3 copies written, 0 kept, 1 failed" in output
    assert "train.txt: 1 of 5 videos are missing in the copy: results would not" in output
    assert "val.txt:" not in output and "--data.root" not in output

    copies = read_list(out / "train.txt", root=out)
    assert [record.label for record in copies] == [0, 1, 2, 4]
    for record, count, video in zip(copies, (40, 1, 20, 1), (1, 2, 3, 2), strict=True):
        info = probe(record.path)
        assert info.kind.codec == codec and info.kind.trimmable and info.kind.color_space == 6
        assert min(info.width, info.height) == 64 and info.num_frames == count
        assert info.packets is not None
        assert np.diff([*info.packets.keyframes, count]).max() <= 8
        with open_video(record.path) as container:
            frames = list(container.decode(video=0))
        steps = np.diff([frame.time for frame in frames])
        assert not len(steps) or np.ptp(steps) < 0.0015  # WebM counts milliseconds
        codes = [read_code(frame.to_ndarray(format="rgb24")) for frame in frames]
        assert codes == [(video, k) for k in range(count)]

    stamp = copies[0].path.stat().st_mtime_ns
    (tmp_path / "in" / "broken.mp4").unlink()
    make_video("in/broken.mp4", codec="libx264", num_frames=9)
    (out / "left.part-.mp4").touch()
    assert main(["data", "prepare", *options]) == 0
    output = capsys.readouterr().out
    assert "1 copies written, 3 kept, 0 failed" in output
    lists = "--data.train_list train.txt --data.val_list val.txt"
    assert f"now         --data.root {out} {lists}\n" in output
    assert (
        "missing" not in output
        and copies[0].path.stat().st_mtime_ns == stamp
        and not list(out.rglob("*.part-*"))
    )
    make_video("in/b.webm", num_frames=1, video=7)  # another video, older than the copy
    os.utime(tmp_path / "in/b.webm", (1e9, 1e9))
    with file_lock(out / ".prepare.lock"):
        (out / "made.part-.mp4").touch()
        assert main(["data", "prepare", *options]) == 3
        assert "another accel data prepare is writing to it" in capsys.readouterr().err
        assert (out / "made.part-.mp4").exists()
    assert main(["data", "prepare", *options]) == 0
    assert "1 copies written, 3 kept, 0 failed" in capsys.readouterr().out
    with open_video(copies[1].path) as container:
        (frame,) = container.decode(video=0)
    assert read_code(frame.to_ndarray(format="rgb24")) == (7, 0)
    assert main(["data", "prepare", *options, "--gop", "4"]) == 3
    assert "other settings" in capsys.readouterr().err
    assert json.loads((out / "prepared.json").read_text())["gop"] == 8


def test_folders_of_frames_become_videos(
    tmp_path: Path,
    make_frames: Callable[..., Path],
    read_code: ReadCode,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_frames("clips/a", num_frames=12, video=5)
    (tmp_path / "list.txt").write_text("clips/a 12 1\n")
    options = ["--root", str(tmp_path), "--list", "list.txt", "--out", str(tmp_path / "out")]
    assert main(["data", "prepare", *options]) == 0
    assert "/out (--data.train_list, --data.val_list: list.txt)\n" in capsys.readouterr().out
    (record,) = read_list(tmp_path / "out" / "list.txt", root=tmp_path / "out")
    assert record.name == "clips/a.mp4" and record.label == 1
    with open_video(record.path) as container:
        codes = [read_code(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    assert codes == [(5, k) for k in range(12)]


def test_a_folder_holds_copies_of_one_root(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one/a", "one/b", "two/a"):
        make_video(f"{name}.webm", num_frames=2)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    for root, name, names in (
        ("one", "train.txt", "a"),
        ("one", "more.txt", "ab"),
        ("two", "train.txt", "a"),
    ):
        (tmp_path / root / name).write_text("".join(f"{video}.webm 0\n" for video in names))
    out = tmp_path / "out"

    def prepare(root: str, name: str) -> int:
        options = ["--root", str(tmp_path / root), "--list", name, "--out", str(out)]
        return main(["data", "prepare", *options, "--threads", "1"])

    assert prepare("one", "train.txt") == 0
    assert prepare("link", "more.txt") == 0  # another list, one video more
    settings = out / "prepared.json"
    facts = json.loads(settings.read_text())
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert prepare("two", "train.txt") == 3
    error = capsys.readouterr().err
    assert f"holds copies of what is in {tmp_path}/one, not in {tmp_path}/two; use" in error
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    assert facts.pop("root") == str(tmp_path / "one")
    settings.write_text(json.dumps(facts))  # of an earlier version
    assert prepare("one", "more.txt") == 0
    assert "0 copies written, 2 kept" in capsys.readouterr().out
    assert json.loads(settings.read_text())["root"] == str(tmp_path / "one")
    settings.write_text("{")
    assert prepare("one", "more.txt") == 3
    assert "other settings" in capsys.readouterr().err


def test_two_names_for_one_copy_are_refused(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video("a.webm", num_frames=2)
    make_video("a.mp4", codec="libx264", num_frames=2)
    (tmp_path / "list.txt").write_text("a.webm 0\na.mp4 1\n")
    options = ["--root", str(tmp_path), "--list", "list.txt", "--out", str(tmp_path / "out")]
    assert main(["data", "prepare", *options]) == 3
    error = capsys.readouterr().err
    assert "would both become a.mp4; rename one, in its list too, or" in error
    options[-1] = str(tmp_path / "packed")
    assert main(["data", "prepare", *options, "--codec", "copy", "--shards"]) == 0


def test_the_lists_at_hand_are_not_overwritten(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video("a.webm", num_frames=2)
    (tmp_path / "lists").mkdir()
    for name in ("list.txt", "lists/list.txt"):
        (tmp_path / name).write_text("a.webm 0\n")
        out = tmp_path / "lists" / ".." / Path(name).parent
        options = ["--root", str(tmp_path), "--list", name, "--out", str(out)]
        assert main(["data", "prepare", *options]) == 2
        assert "--out: expected another folder than --root" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "a.webm 0\n"
    assert not list(tmp_path.rglob("prepared.json"))


@pytest.mark.parametrize("shards", [[], ["--shards", "2"]])
def test_damage_is_said_to_be_of_the_original(
    tmp_path: Path,
    make_video: MakeVideo,
    capsys: pytest.CaptureFixture[str],
    shards: list[str],
) -> None:
    path = make_video("copies/a.mp4", codec="libx264", num_frames=20)
    make_video("copies/b.mp4", codec="libx264", num_frames=3)
    with av.open(str(path)) as container:
        packet = [each for each in container.demux(video=0) if each.size][10]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place : place + size] = b"\xff" * size
    path.write_bytes(content)
    (tmp_path / "list.txt").write_text("copies/a.mp4 0\ncopies/b.mp4 0\n")
    out = tmp_path / "out"
    options = ["--root", str(tmp_path), "--list", "list.txt", "--out", str(out), *shards]
    assert main(["data", "prepare", *options]) == 3
    output = capsys.readouterr().out
    problem = "cannot be decoded: Invalid data found when processing input."
    assert f"not copied: copies/a.mp4: {problem}\n1 copies written, 0 kept, 1 failed" in output
    assert (out / "copies").exists() == (not shards)  # where they stand until they are packed


@pytest.mark.parametrize("form", ["files", "shards", "split"])
def test_class_folders_stay_the_set_they_are(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    for k in range(12):
        part = ("val/" if k < 4 else "train/") if form == "split" else ""
        make_video(f"in/{part}{'run' if k % 2 else 'jump up'}/{k} ü.webm", num_frames=3, video=k)
    source = ["--root", str(root), "--threads", "2"]
    assert main(["data", "stats", *source]) == 0
    output = capsys.readouterr().out
    assert output.count("classes    2, ") == 2 and f"{root} (validation)\n" in output
    assert main(["data", "check", *source]) == 0
    assert "12 videos checked, 0 videos cannot be used" in capsys.readouterr().out

    options = ["--out", str(out), "--codec", "vp9", *(["--shards", "5"] * (form == "shards"))]
    assert main(["data", "prepare", *source, *options]) == 0
    now = capsys.readouterr().out.partition("now ")[2].split()
    keys = dict(zip(now[::2], now[1::2], strict=True))
    copies = open_dataset(DataConfig(**{key.removeprefix("--data."): v for key, v in keys.items()}))
    originals = open_dataset(DataConfig(root=str(root)))
    assert copies.class_names == originals.class_names == ("jump up", "run")
    for one, other in ((copies.train, originals.train), (copies.val, originals.val)):
        assert one.labels.tolist() == other.labels.tolist()
        names = [re.sub(r"^\d+\.shard/", "", record.name) for record in one]
        assert names == [record.name for record in other]
    assert len(copies.val) == (4 if form == "split" else 2)
    if form != "shards":  # the folders are class folders too
        assert open_dataset(DataConfig(root=str(out))).num_classes == 2


def test_class_folders_with_a_bad_video(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(8):
        make_video(f"in/{k % 2}/{k}.webm", num_frames=3, video=k)
    root = tmp_path / "in"
    data = DataConfig(root=str(root), val_fraction=0.4)
    bad = open_dataset(data).train[0]
    bad.path.write_bytes(b"x" * 100)
    source = ["--root", str(root), "--data.val_fraction", "0.4"]
    assert main(["data", "stats", *source]) == 3
    assert f"`accel data check --root {root} --data.val_fraction 0.4`" in capsys.readouterr().out
    assert main(["data", "check", *source]) == 3
    capsys.readouterr()
    assert len(open_dataset(replace(data, deny_list="deny.txt")).train) == 3
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "prepare", *source, *out]) == 3
    assert "train.txt: 1 of 4 videos are missing in the copy" in capsys.readouterr().out

    for wrong, problem in (
        ([*source, "--out", str(root / "small")], "--out: expected a folder outside of --root"),
        ([*source, *out, "--list", "train.txt"], "--val-fraction: is for class folders"),
        ([*source[:2], *out, "--data.val_fraction", "2"], "error: --val-fraction: "),
    ):
        assert main(["data", "prepare", *wrong]) == 2
        assert problem in capsys.readouterr().err
    bad.path.rename(bad.path.with_name("a\tb.webm"))
    assert main(["data", "prepare", *source, "--out", str(tmp_path / "other")]) == 3
    assert "which no list can hold; rename it" in capsys.readouterr().err
