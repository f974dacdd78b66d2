"""Detection sets on disk: what is refused, how it is named, and training without it."""

import json
import re
import shutil

import pytest
from PIL import Image

from accel.cli.main import main as accel
from pipelines.errors import AnnotationError, DataError, MediaError
from pipelines.moving_objects import generate_moving_objects
from pipelines.tube_data import audit_tube_set, open_tube_set

BAD = "fall/train_0000"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return generate_moving_objects(tmp_path_factory.mktemp("cache"), num_train=3, num_test=3)


@pytest.fixture
def root(source, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(source, copy)
    shutil.copytree(copy / "rgb-images", copy / "brox-images")
    return copy


def _annotate(root, change, video=BAD):
    path = root / "splitfiles" / "annotations.json"
    content = json.loads(path.read_text())
    change(content[video])
    path.write_text(json.dumps(content, indent=1))


def _box(frame, box):
    def change(video):
        video["annotations"][0]["boxes_xywh"][frame] = box

    return change


NAN = float("nan")
BOXES = [
    ([5, 5, -9, 9], r"\[5.0, 5.0, -9.0, 9.0\] \(x, y, w, h\) is empty or inverted"),
    ([5, 5, 0, 9], "is empty or inverted"),
    ([NAN, 5, 9, 9], r"\[nan, 5.0, 9.0, 9.0\] is not finite"),
    ([96, 5, 9, 9], "lies outside the image of 96 x 96 pixels"),
    ([5, -20, 9, 20], "lies outside the image of 96 x 96 pixels"),
]


@pytest.mark.parametrize(("box", "message"), BOXES)
def test_a_bad_box_is_named_and_can_be_denied(root, box, message) -> None:
    _annotate(root, _box(7, box))
    where = rf'annotations\.json.*video "{BAD}", tube 0, frame 7: the box .*{message}'
    with pytest.raises(AnnotationError, match=where) as caught:
        open_tube_set(root, "moving_objects")
    assert "1 of 6 videos cannot be used" in str(caught.value)
    (root / "deny.txt").write_text(f"{BAD}\tits box\n")
    found = open_tube_set(root, "moving_objects", deny_list="deny.txt")
    assert sum(found.training) == 2 and len(found.videos) == 5
    assert BAD not in {video.name for video in found.videos}


def test_the_line_of_a_json_file_is_named(root) -> None:
    _annotate(root, _box(7, [5, 5, 0, 9]), "slide/train_0002")
    with pytest.raises(AnnotationError) as caught:
        open_tube_set(root, "moving_objects")
    lines = (root / "splitfiles" / "annotations.json").read_text().splitlines()
    assert '"slide/train_0002"' in lines[caught.value.line - 1]
    assert f"annotations.json:{caught.value.line}: " in str(caught.value)


def test_lengths_and_sizes_that_do_not_fit(root) -> None:
    streams = ("rgb", "brox")
    assert len(open_tube_set(root, "moving_objects", streams=streams).videos) == 6
    flow = root / "brox-images" / BAD
    (flow / "00024.jpg").unlink()
    message = r"brox-images/fall/train_0000: 00024.jpg is missing: the annotation has 24 frames, "
    with pytest.raises(MediaError, match=message + "the folder 23 images"):
        open_tube_set(root, "moving_objects", streams=streams)
    shutil.rmtree(flow)
    with pytest.raises(MediaError, match=r"brox-images/fall/train_0000: no such folder"):
        open_tube_set(root, "moving_objects", streams=streams)
    shutil.copytree(root / "rgb-images" / BAD, flow)
    Image.new("RGB", (50, 40)).save(flow / "00001.jpg")
    with pytest.raises(MediaError, match="is 50 x 40 pixels, that of rgb-images 96 x 96"):
        open_tube_set(root, "moving_objects", streams=streams)
    open_tube_set(root, "moving_objects")  # rgb alone is as it was
    with pytest.raises(AnnotationError, match="expected at least 25 frames, got 24"):
        open_tube_set(root, "moving_objects", least_frames=25)


def test_test_videos_are_never_left_out(root) -> None:
    (root / "deny.txt").write_text("fall/test_0000\tdamaged\n")
    message = r"fall/test_0000: is denied \(damaged\) and not in trainlist01.txt"
    with pytest.raises(DataError, match=message):
        open_tube_set(root, "moving_objects", deny_list="deny.txt")


def test_the_audit_names_all_and_its_deny_list_serves(root, capsys) -> None:
    _annotate(root, _box(3, [NAN, 5, 9, 9]))
    shutil.rmtree(root / "brox-images" / "rise" / "train_0001")
    (root / "brox-images" / "slide" / "train_0002" / "00009.jpg").write_bytes(b"no image")
    streams = ("rgb", "brox")
    count, reasons = audit_tube_set(root, "moving_objects", streams=streams, decode=False)
    assert count == 6 and sorted(reasons) == [BAD, "rise/train_0001"]
    command = ["data", "check", "--root", str(root), "--tubes", "moving_objects"]
    assert accel([*command, "--streams", *streams]) == 3
    out = capsys.readouterr().out
    assert "6 videos checked, 3 cannot be used" in out
    assert re.search(r"bad  slide/train_0002: .*00009.jpg: cannot be read as an image", out)
    denied = (root / "deny.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in denied] == [
        BAD,
        "rise/train_0001",
        "slide/train_0002",
    ]
    assert accel([*command, "--list", "train.txt"]) == 2
    assert "expected --list or --tubes, got both" in capsys.readouterr().err


def test_a_sound_set_passes_the_audit(source, capsys) -> None:
    assert accel(["data", "check", "--root", str(source), "--tubes", "moving_objects"]) == 0
    assert "6 videos checked, 0 cannot be used" in capsys.readouterr().out
