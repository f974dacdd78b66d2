"""Lists from official annotation files and the media at hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from accel.cli.main import main
from pipelines.adapters import DATASETS, import_dataset
from pipelines.annotations import read_class_names
from pipelines.errors import AnnotationError, DataError

V1_LABELS = Path(__file__).parents[1] / "data" / "label_maps" / "something_v1.txt"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def lines(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def write_something_v1(folder: Path) -> list[str]:
    names = V1_LABELS.read_text().splitlines()
    prefix = "something-something-v1-"
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}labels.csv").write_text("\n".join(names))
    camera = "Turning the camera left while filming something"
    (folder / f"{prefix}train.csv").write_text(f"1;{camera}\n2;Holding something\n3;{names[7]}")
    (folder / f"{prefix}validation.csv").write_text(f"10;{camera}\n")
    return names


def test_both_numberings_of_something_v1(tmp_path: Path) -> None:
    names = write_something_v1(tmp_path / "a")
    media = tmp_path / "frames"
    touch(media, *(f"1/{k:05d}.jpg" for k in range(1, 6)), "2/00001.jpg", "10/00001.jpg", "x.txt")
    touch(media, "99/00001.jpg")
    report = import_dataset("sthv1", tmp_path / "a", media)
    assert report.found == {"train": 2, "val": 1} and report.unused == 1
    assert report.missing == {"train": ["3"], "val": []}
    assert lines(media / "train.txt") == [["1", "5", "166"], ["2", "1", "16"]]
    assert lines(media / "val.txt") == [["10", "1", "166"]]
    assert (media / "missing.txt").read_text() == "train\t3\n"
    assert list(read_class_names(media / "classes.txt")) == sorted(names)
    # mmaction2's lists: the camera turned left is 2, the first class "Holding something".
    import_dataset("sthv1", tmp_path / "a", media, numbering="official")
    assert lines(media / "train.txt") == [["1", "5", "2"], ["2", "1", "0"]]
    assert json.loads((media / "dataset.json").read_text())["numbering"] == "official"
    with pytest.raises(DataError, match="two numberings"):
        import_dataset("sthv2", tmp_path / "a", media, numbering="official")


def write_json(folder: Path, **files: Any) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name.replace('__', '-')}.json").write_text(json.dumps(content))


def test_something_v2(tmp_path: Path) -> None:
    names = sorted(V1_LABELS.read_text().splitlines())
    prefix = "something__something__v2__"
    video = {"id": "78687", "label": "holding a cup", "template": "Holding [something]"}
    write_json(
        tmp_path / "a",
        **{
            f"{prefix}labels": {name: str(k) for k, name in enumerate(names)},
            f"{prefix}train": [video],
            f"{prefix}validation": [{**video, "id": "5"}],
        },
    )
    touch(tmp_path / "m", "78687.webm", "5.webm")
    import_dataset("sthv2", tmp_path / "a", tmp_path / "m")
    assert lines(tmp_path / "m" / "train.txt") == [["78687.webm", "16"]]
    write_json(tmp_path / "a", **{f"{prefix}train": [{"id": "1"}]})
    with pytest.raises(AnnotationError, match=r"not the official files of .* V2"):
        import_dataset("sthv2", tmp_path / "a", tmp_path / "m")


def test_kinetics_and_its_subset(tmp_path: Path) -> None:
    names = [f"class {k:03d}" for k in range(400)]
    head = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(
        head + "".join(f"{name},id{k},10,20,train\n" for k, name in enumerate(names))
    )
    (tmp_path / "val.csv").write_text(head + "class 399,-x_0,1,11,val\nclass 001,gone,1,11,val\n")
    media = tmp_path / "m"
    touch(media, "class 000/id0_000010_000020.mp4", "class 399/-x_0/img_00001.jpg")
    report = import_dataset("k400", tmp_path, media)
    assert lines(media / "train.txt") == [["class 000/id0_000010_000020.mp4", "0"]]
    assert lines(media / "val.txt") == [["class 399/-x_0", "1", "399"]]
    assert report.missing["val"] == ["gone_000001_000011"] and len(report.missing["train"]) == 399
    (tmp_path / "classes.txt").write_text("\n".join(names[200:]))
    import_dataset("minik200", tmp_path, media)
    assert lines(media / "val.txt") == [["class 399/-x_0", "1", "199"]]
    assert (media / "train.txt").read_text() == ""


def test_diving_gym_ucf_and_hmdb(tmp_path: Path) -> None:
    a, media = tmp_path / "a", tmp_path / "m"
    vocabulary = [["Back", "15som", "05Twis", str(k)] for k in range(48)]
    video = {"vid_name": "d1", "label": 47, "start_frame": 0, "end_frame": 9}
    other = {**video, "vid_name": "d2"}
    write_json(a, Diving48_vocab=vocabulary, Diving48_V2_train=[video], Diving48_V2_test=[other])
    touch(media, "d1/frames00001.jpg", "d2.mp4")
    import_dataset("diving48_v2", a, media)
    assert lines(media / "train.txt") == [["d1", "1", "47"]]
    assert (media / "classes.txt").read_text().startswith("Back+15som+05Twis+0\n")

    (a / "gym99_train_element_v1.1.txt").write_text("d1 98\n")
    (a / "gym99_val_element.txt").write_text("d2 0\n")
    import_dataset("gym99", a, media)
    assert lines(media / "val.txt") == [["d2.mp4", "0"]]
    (a / "gym99_val_element.txt").write_text("d2 99\n")
    with pytest.raises(AnnotationError, match="d2 has label 99"):
        import_dataset("gym99", a, media)

    (a / "classInd.txt").write_text("".join(f"{k + 1} Class{k}\n" for k in range(101)))
    (a / "trainlist02.txt").write_text("Class5/d1.avi 6\n")
    (a / "testlist02.txt").write_text("Class100/d2.avi\n")
    import_dataset("ucf101", a, media, split=2)
    assert lines(media / "train.txt") == [["d1", "1", "5"]]
    assert lines(media / "val.txt") == [["d2.mp4", "100"]]

    for k in range(51):
        (a / f"class{k:02d}_test_split1.txt").write_text(f"v{k}.avi {k % 3}\n")
    touch(media, "class01/v1.avi", "class02/v2.avi", "class03/v3.avi")
    report = import_dataset("hmdb51", a, media)
    assert report.found == {"train": 1, "val": 1} and report.unused == 3
    assert lines(media / "val.txt") == [["class02/v2.avi", "2"]]


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"expected the annotation file something-something-v1-l"):
        import_dataset("sthv1", tmp_path, tmp_path)
    write_something_v1(tmp_path)
    with pytest.raises(DataError, match="none of the 4 annotated videos is here"):
        import_dataset("sthv1", tmp_path, tmp_path)
    labels = tmp_path / "something-something-v1-labels.csv"
    labels.write_text(labels.read_text().replace("Holding something\n", "", 1))
    with pytest.raises(AnnotationError, match=r"train\.csv:2: the class 'Holding something'"):
        import_dataset("sthv1", tmp_path, tmp_path)
    (tmp_path / "something-something-v1-train.csv").write_text("3;Stacking number of something\n")
    with pytest.raises(AnnotationError, match="174 classes, these files 173; another version"):
        import_dataset("sthv1", tmp_path, tmp_path)
    assert main(["data"]) == main(["data", "nothing"]) == 2
    touch(tmp_path / "m", "1.mp4")
    write_something_v1(tmp_path)
    assert (
        main(
            [
                "data",
                "import",
                "sthv1",
                "--annotations",
                str(tmp_path),
                "--media",
                str(tmp_path / "m"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "train: 1 videos; 2 missing, e.g. 2, 3" in out and "174 classes" in out
    assert set(DATASETS) >= {"sthv1", "sthv2", "k400", "minik200", "gym99", "gym288", "ucf101"}


def test_a_missing_annotation_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the annotation file classInd\.txt; it is not there\."):
        import_dataset("ucf101", tmp_path, tmp_path)
