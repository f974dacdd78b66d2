"""List files and class folders: strict parsing, errors with path and line."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.annotations import VideoSet, format_list, read_class_names, read_list
from pipelines.config import DataConfig
from pipelines.datasets import open_dataset
from pipelines.errors import AnnotationError, DataError

ROOT = Path("/videos")


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    return path


def test_list_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffa/b.mp4 3\r\n\n  c d.webm\t0 \nümlaut.avi   7\n".encode())
    records = read_list(path, root=ROOT)
    assert [(record.name, record.label) for record in records] == [
        ("a/b.mp4", 3),
        ("c d.webm", 0),
        ("ümlaut.avi", 7),
    ]
    assert records[0].path == ROOT / "a/b.mp4"


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b"a.mp4 1\nb.mp4\n", 2, "got 1 fields"),
        (b"a.mp4 1\nb.mp4 48 1\n", 2, "got 3 fields"),
        (b"a 8 9 10 1\n", 1, "got 5 fields"),
        (b"a 0 1\n", 1, "with >= 1 frames"),
        (b"left right/a.mp4 1\n", 1, "blanks, put a tab before the label"),
        (b"a.mp4 1\nleft right/a.mp4 1\n", 2, "blanks, put a tab before the label"),
        (b"a b.mp4\t\t1\n", 1, "one tab between two fields"),
        (b"a x 8 1\n", 1, "<folder> <offset> <frames> <label>"),
        (b"a.mp4 1\nb.mp4 one\n", 2, "integer >= 0"),
        (b"a.mp4 -1\n", 1, "integer >= 0"),
        (b"a.mp4 1.5\n", 1, "integer >= 0"),
        ("a.mp4 ٣\n".encode(), 1, "integer >= 0"),
        (b"a.mp4 " + b"9" * 5000 + b"\n", 1, "integer >= 0"),
        (b"a.mp4 0\nb.mp4 10\n", 2, "below 10"),
        (b"../a.mp4 0\n", 1, "leads out of the root"),
        (b"/etc/passwd 0\n", 1, "leads out of the root"),
        (b"C:\\a.mp4 0\n", 1, "leads out of the root"),
        (b"a\0b.mp4 0\n", 1, "NUL"),
        (b"a.mp4 0\n\xff\xfe 0\n", 2, "UTF-8"),
        (b"\n \n", None, "empty"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, content: bytes, line: int | None, part: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(AnnotationError) as caught:
        read_list(path, root=ROOT, num_classes=10)
    assert caught.value.line == line and part in str(caught.value)
    assert str(caught.value).startswith(f"{path}:")


def test_paths_outside_the_root_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, b"/other/a.mp4 0\n../b.mp4 1\n")
    records = read_list(path, root=ROOT, allow_outside_root=True)
    assert [str(record.path) for record in records] == ["/other/a.mp4", "/videos/../b.mp4"]


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_list(tmp_path / "none.txt", root=ROOT)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(st.characters(codec="utf-8"), max_size=200).map(str.encode),
        st.lists(
            st.sampled_from([b"a.mp4", b" ", b"\t", b"1", b"\n", b"\r", b"\0", b"-", b"..", b"/"])
        ).map(b"".join),
    )
)
def test_only_annotation_errors(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    try:
        records = read_list(path, root=ROOT, num_classes=5)
    except AnnotationError:
        return
    assert records and all(0 <= record.label < 5 for record in records)
    again = write(tmp_path, format_list(records).encode())
    assert list(read_list(again, root=ROOT, num_classes=5)) == list(records)


def test_fingerprint_knows_names_labels_and_order_but_not_the_root() -> None:
    def videos(root: str, *items: tuple[str, int]) -> VideoSet:
        return VideoSet(Path(root), items)

    base = videos("/a", ("x", 0), ("y", 1)).fingerprint
    assert videos("/b", ("x", 0), ("y", 1)).fingerprint == base
    assert videos("/a", ("y", 1), ("x", 0)).fingerprint != base
    assert videos("/a", ("x", 0), ("y", 2)).fingerprint != base


def test_class_names(tmp_path: Path) -> None:
    assert read_class_names(write(tmp_path, b"run\nrun fast\n")) == ("run", "run fast")
    with pytest.raises(AnnotationError, match=":2: the class name 'run' is listed twice"):
        read_class_names(write(tmp_path, b"run\nrun\n"))
    with pytest.raises(AnnotationError, match=r":2: .* empty line"):
        read_class_names(write(tmp_path, b"run\n\njump\n"))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_class_folders_with_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.mp4", "train/a/2.webm", "train/a/notes.txt", "val/b/3.avi")
    dataset = open_dataset(DataConfig(root=str(tmp_path)))
    assert dataset.class_names == ("a", "b")
    assert [(r.name, r.label) for r in dataset.train] == [
        ("train/a/2.webm", 0),
        ("train/b/1.mp4", 1),
    ]
    assert [r.label for r in dataset.val] == [1]
    touch(tmp_path, "val/c/4.mp4")
    with pytest.raises(AnnotationError, match="'c' is not among the classes"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_names_in_class_folders_are_text(tmp_path: Path) -> None:
    for name in (b"x/1.mp4", b"x/2.mp4", b"y\xfe/\xff.mp4"):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(DataError, match=r"'y\\udcfe/\\udcff.mp4' is no UTF-8 text; rename"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_class_folders_are_split_by_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{k}.mp4" for name in "ab" for k in range(10)), "c/0.mp4")
    dataset = open_dataset(DataConfig(root=str(tmp_path), val_fraction=0.3))
    assert [sum(r.label == k for r in dataset.val) for k in range(3)] == [3, 3, 0]
    assert len(dataset.train) == 15
    assert not {r.name for r in dataset.train} & {r.name for r in dataset.val}
    assert open_dataset(DataConfig(root=str(tmp_path), val_fraction=0.3)) == dataset


def test_lists_and_class_count(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.mp4 4\n")
    (tmp_path / "val.txt").write_text("c.mp4 5\n")
    lists = {"root": str(tmp_path), "train_list": "train.txt", "val_list": "val.txt"}
    with pytest.raises(AnnotationError, match=r"label 5 of 'c\.mp4' does not occur"):
        open_dataset(DataConfig(**lists))
    assert open_dataset(DataConfig(**lists, num_classes=6)).num_classes == 6
    with pytest.raises(AnnotationError, match=r"val.txt:1: .* below 5"):
        open_dataset(DataConfig(**lists, num_classes=5))
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.mp4 99999999\n")
    with pytest.raises(AnnotationError, match=r"label 99999999 of 'b\.mp4' with only 2 videos"):
        open_dataset(DataConfig(**lists))


def test_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: expected a folder"):
        open_dataset(DataConfig(root=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"data\.root: expected the folder"):
        open_dataset(DataConfig())
