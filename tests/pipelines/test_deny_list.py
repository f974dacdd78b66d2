"""Deny-lists belong to people and to `accel data check` alike: whose lines change, and when."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from accel.cli.main import main
from pipelines.config import DataConfig
from pipelines.datasets import open_dataset
from pipelines.deny_list import read_deny_list, update_deny_list
from pipelines.errors import AnnotationError, DataError

MakeVideo = Callable[..., Path]


def test_mended_videos_leave_the_list_and_lines_written_by_hand_stay(
    tmp_path: Path, make_video: MakeVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deny.txt"
    for name in "abc":
        make_video(f"{name}.webm", num_frames=3)
        (tmp_path / f"{name}.txt").write_text(f"{name}.webm 0\n")
    sound = [(tmp_path / f"{name}.webm").read_bytes() for name in "ab"]
    for name in "ab":
        (tmp_path / f"{name}.webm").write_bytes(b"x" * 100)
    path.write_text("# Anna's\r\nc.webm\twrong label\tmy note\r\n\r\nb.webm\tseen by Anna\r\n")
    arguments = ["data", "check", "--root", str(tmp_path), "--threads", "1", "--list"]
    assert main([*arguments, "a.txt", "b.txt", "c.txt"]) == 3
    output = capsys.readouterr().out
    assert "3 lines checked, 2 videos cannot be used\nnote c.webm: nothing was found; no " in output
    assert f"deny-list: {path} (--data.deny_list), 3 videos in it" in output
    by_hand = "# Anna's\nc.webm\twrong label\tmy note\n\nb.webm\tseen by Anna\n"
    assert path.read_text().startswith(f"{by_hand}a.webm\t")
    assert read_deny_list(path)["c.webm"] == "wrong label my note"

    for name, content in zip("ab", sound, strict=True):
        (tmp_path / f"{name}.webm").write_bytes(content)
    assert main([*arguments, "b.txt"]) == 0  # has not looked at a
    assert main([*arguments, "a.txt", "--quick"]) == 0  # nor at all of it
    assert read_deny_list(path).keys() == {"a.webm", "b.webm", "c.webm"}
    capsys.readouterr()
    assert main([*arguments, "a.txt"]) == 0
    assert "mended a.webm: it is taken off the deny-list" in capsys.readouterr().out
    assert path.read_text() == by_hand
    (tmp_path / "a.webm").unlink()
    path.write_text("no tab\n")
    assert main([*arguments, "a.txt"]) == 3  # before anything is looked at
    output = capsys.readouterr()
    assert "deny.txt:1: expected" in output.err and not output.out
    assert path.read_text() == "no tab\n"


def test_lines_of_a_check_are_replaced_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    assert update_deny_list(path, {"a": "cut\noff", "#b": "black"}, None).entries == 2
    path.write_text(path.read_text() + "#c\tcomment\n  # too\nd\tmine\n")
    assert read_deny_list(path) == {"a": "cut off", "#b": "black", "d": "mine"}
    before = path.stat().st_mtime_ns
    assert update_deny_list(path, {"a": "cut off"}, ["a"]) == (3, [], [])
    assert path.stat().st_mtime_ns == before
    assert update_deny_list(path, {"a": "gone", "e": "gone", "d": "x"}, None) == (3, ["#b"], [])
    lines = [line.partition("\t")[0] for line in path.read_text().splitlines()]
    assert lines == ["a", "#c", "  # too", "d", "e"]
    assert read_deny_list(path) == {"a": "gone", "d": "mine", "e": "gone"}


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\tb.mp4", "a\rb.mp4", " a.mp4"])
def test_names_that_no_deny_list_can_hold_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deny.txt"
    with pytest.raises(DataError, match=r"which no list can hold; rename it"):
        update_deny_list(path, {"fine": "why", name: "why"}, None)
    assert not path.exists()
    update_deny_list(path, {"a\u2028b": "is cut\noff"}, None)
    assert read_deny_list(path) == {"a\u2028b": "is cut off"}


def test_a_deny_list_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    for name in ("in/0/a.mp4", "in/0/b.mp4"):
        make_video(name, codec="libx264", num_frames=2)
    path = tmp_path / "in" / "deny.txt"
    data = DataConfig(root=str(path.parent), deny_list="deny.txt")
    with pytest.raises(AnnotationError) as caught:
        open_dataset(data)
    assert str(caught.value) == f"{path}: the deny-list cannot be read: No such file or directory."
    path.write_bytes(b"a.mp4\t\xe4\n")
    with pytest.raises(AnnotationError, match=r"deny\.txt: expected UTF-8 text"):
        open_dataset(data)


@pytest.mark.parametrize(
    ("names", "lists", "advice"),
    [
        (["0/a.mp4", "0/b.mp4"], {}, "lists, which keep the split."),
        (["train/0/a.mp4", "val/0/b.mp4"], {}, "Or delete it from {root}/val."),
        (
            ["a.mp4", "b.mp4"],
            {"train_list": "a.txt", "val_list": "b.txt"},
            "Or take it out of b.txt.",
        ),
    ],
)
def test_what_to_do_with_a_denied_validation_video(
    tmp_path: Path, names: list[str], lists: dict[str, str], advice: str
) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (tmp_path / f"{path.stem}.txt").write_text(f"{name}\t0\n")
    data = DataConfig(root=str(tmp_path), **lists)
    (video,) = open_dataset(data).val
    (tmp_path / "deny.txt").write_text(f"{video.name}\tcopy it again.\n")
    with pytest.raises(DataError) as caught:
        open_dataset(replace(data, deny_list="deny.txt"))
    start = f"1 validation video in the deny-list {tmp_path / 'deny.txt'}, e.g. {video.name}: "
    assert str(caught.value).startswith(f"{start}copy it again. Mend or replace what is denied ")
    assert str(caught.value).endswith(advice.format(root=tmp_path))
