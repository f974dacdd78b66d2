"""From the `data` section to the videos of both splits: lists, class folders, generated sets."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.annotations import VideoSet, read_class_names, read_list
from pipelines.config import DataConfig
from pipelines.deny_list import read_deny_list
from pipelines.errors import AnnotationError, DataError, counted, why
from pipelines.list_cache import cached_list

_LOG = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)


_Splits = tuple[VideoSet, VideoSet, tuple[str, ...]]


@dataclass(frozen=True)
class Dataset:
    """The videos of both splits, with the same classes."""

    train: VideoSet
    val: VideoSet
    class_names: tuple[str, ...]
    """Class k is label k; the decimal number where no name is known."""

    cache_dir: Path
    """Where the media index is kept."""

    frame_name: str = ""
    """Names of the files in folders of frames; "" = as in the first folder."""

    max_bad_fraction: float = 0.0
    """Share of a split's videos that may be unusable (`pipelines.quarantine.tolerated`)."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_videos(self) -> dict[str, int]:
        """Of each split."""
        return {"train": len(self.train), "val": len(self.val)}

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's names and labels, in order."""
        return {"train": self.train.fingerprint, "val": self.val.fingerprint}


def open_dataset(data: DataConfig, *, progress: bool = True) -> Dataset:
    """The videos of a configuration.

    Reads lists and folder names only (and writes a generated set if there is none yet); the media
    themselves are checked by `pipelines.loader.build_loader`.

    Args:
        data: the configuration section.
        progress: show a bar while generating, if stderr is a terminal.

    Raises:
        ValueError: neither a folder nor lists are configured.
        DataError: a list, or the folder, that cannot be used.
    """
    train, val, class_names = _splits(data, progress)
    if data.deny_list:
        train = _without_denied(train, val, data)
    facts = (data.resolved_cache_dir(), data.frame_name, data.max_bad_fraction)
    return Dataset(train, val, class_names, *facts)


def _without_denied(train: VideoSet, val: VideoSet, data: DataConfig) -> VideoSet:
    path = train.root / data.deny_list
    denied = read_deny_list(path)
    encoded = {name.encode("utf-8", "surrogateescape") for name in denied}
    refused = [
        str(name, "utf-8", "surrogateescape") for name in val.encoded_names() if name in encoded
    ]
    if refused:
        what = f"{counted(len(refused), 'validation video')} in the deny-list {path}"
        raise DataError(
            f"{what}, e.g. {refused[0]}: {denied[refused[0]].rstrip('.')}. Mend or replace what is "
            "denied under the same name, or take its line out of the deny-list: what cannot be "
            f"decoded then counts as a wrong answer. {_how_to_leave_out(val.root, data)}"
        )
    keep = np.array([name not in encoded for name in train.encoded_names()], np.bool_)
    left_out = len(train) - int(keep.sum())
    _LOG.warning("%s: %d of %d training videos left out", path, left_out, len(train))
    return train.selected(keep)


def _how_to_leave_out(root: Path, data: DataConfig) -> str:
    """A validation video, for good."""
    if data.val_list:
        return f"Or take it out of {data.val_list}."
    if _has_split_folders(root):
        return f"Or delete it from {root / 'val'}."
    return (
        "To delete it would draw other validation videos of its class; `accel data prepare` writes "
        "lists, which keep the split."
    )


def _has_split_folders(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "val").is_dir()


def _splits(data: DataConfig, progress: bool) -> _Splits:
    if data.generate == "motion8":
        from pipelines.synthetic import generate_motion8

        root = generate_motion8(data.resolved_cache_dir(), progress=progress)
        return _from_lists(root, root / "train.txt", root / "val.txt", data, root / "classes.txt")
    if not data.root and not (data.train_list and Path(data.train_list).is_file()):
        raise ValueError(
            "data.root: expected the folder of the videos, got ''; pass --data.root, or "
            "--data.generate=motion8 for a generated set."
        )
    root = Path(data.root).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"data.root: expected a folder, got '{root}'.")
    classes_file = root / data.classes_file if data.classes_file else None
    if data.train_list:
        return _from_lists(root, root / data.train_list, root / data.val_list, data, classes_file)
    return _from_folders(root, data, classes_file)


def _from_lists(
    root: Path, train_list: Path, val_list: Path, data: DataConfig, classes_file: Path | None
) -> _Splits:
    names = _declared_names(data, classes_file)
    train, val = (_read_list(path, root, len(names), data) for path in (train_list, val_list))
    if not names:
        largest = int(np.argmax(train.labels))
        count = int(train.labels[largest]) + 1
        if count > max(len(train), 1000):  # a slip of the pen, not a class count
            raise AnnotationError(
                train_list,
                f"label {count - 1} of '{train[largest].name}' with only {len(train)} videos; give "
                "--data.num_classes if this is meant.",
            )
        names = _numbered(count)
        beyond = int(np.argmax(val.labels))
        if val.labels[beyond] >= count:
            raise AnnotationError(
                val_list,
                f"label {val.labels[beyond]} of '{val[beyond].name}' does not occur in "
                f"{train_list} (labels below {count}); give --data.num_classes if this is meant.",
            )
    return train, val, names


def _read_list(path: Path, root: Path, num_classes: int, data: DataConfig) -> VideoSet:
    facts = (str(root), num_classes, data.allow_outside_root, data.kind)

    def parse() -> VideoSet:
        return read_list(
            path,
            root=root,
            num_classes=num_classes,
            allow_outside_root=data.allow_outside_root,
            kind=data.kind,
        )

    cache_dir = data.resolved_cache_dir()
    return cached_list(path, cache_dir=cache_dir, facts=repr(facts), build=parse)


def _declared_names(data: DataConfig, classes_file: Path | None) -> tuple[str, ...]:
    if classes_file is None:
        return _numbered(data.num_classes)
    names = read_class_names(classes_file)
    if data.num_classes not in (0, len(names)):
        raise AnnotationError(
            classes_file,
            f"expected {data.num_classes} class names (data.num_classes), got {len(names)}.",
        )
    return names


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(count))


def _from_folders(root: Path, data: DataConfig, classes_file: Path | None) -> _Splits:
    split_folders = _has_split_folders(root)
    train_root = root / "train" if split_folders else root
    names = _declared_names(data, classes_file) if classes_file else _subfolders(train_root)
    if data.num_classes not in (0, len(names)):
        raise AnnotationError(
            train_root, f"expected {data.num_classes} classes (data.num_classes), got {len(names)}."
        )
    train = _class_folder_rows(root, train_root, names, data.kind)
    if split_folders:
        val = _class_folder_rows(root, root / "val", names, data.kind)
    else:
        val = _held_out(train, data.val_fraction)
        held_out = set(val)
        train = [row for row in train if row not in held_out]
    for split, rows in (("training", train), ("validation", val)):
        if not rows:
            raise DataError(
                f"{root}: no {split} video; expected files like <class>/<clip>.mp4, or folders of "
                "frames <class>/<clip>/."
            )
    return VideoSet(root, train), VideoSet(root, val), names


def _subfolders(folder: Path) -> tuple[str, ...]:
    names = (name for name in _listed(folder) if not name.startswith("."))
    return tuple(name for name in names if os.path.isdir(folder / name))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {why(error)}.") from error


def _class_folder_rows(
    root: Path, folder: Path, names: tuple[str, ...], kind: str
) -> list[tuple[str, int]]:
    unknown = sorted(set(_subfolders(folder)) - set(names))
    if unknown:
        raise AnnotationError(folder, f"the class folder '{unknown[0]}' is not among the classes.")
    rows = {"videos": [], "frames": []}  # type: dict[str, list[tuple[str, int]]]
    for label, class_name in enumerate(names):
        class_folder = folder / class_name
        if not os.path.isdir(class_folder):
            continue
        for name in _listed(class_folder):
            path = class_folder / name
            row = (path.relative_to(root).as_posix(), label)
            if name.startswith("."):
                continue
            if any("\ud800" <= letter <= "\udfff" for letter in row[0]):  # os.listdir escapes
                raise DataError(f"{root}: the name {row[0]!r} is no UTF-8 text; rename it.")
            if path.suffix.lower() in VIDEO_SUFFIXES:
                rows["videos"].append(row)
            elif os.path.isdir(path):
                rows["frames"].append(row)
    if kind == "auto" and rows["videos"] and rows["frames"]:
        raise DataError(
            f"{folder}: both video files (e.g. {rows['videos'][0][0]}) and folders (e.g. "
            f"{rows['frames'][0][0]}); pass --data.kind=videos or frames."
        )
    return rows[kind] if kind != "auto" else rows["videos"] or rows["frames"]


def _held_out(rows: list[tuple[str, int]], fraction: float) -> list[tuple[str, int]]:
    """A share of each class, chosen by a hash of the names; at least one of two or more."""
    chosen = []
    for label in sorted({label for _, label in rows}):
        members = [row for row in rows if row[1] == label]
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        members.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
        chosen += members[:count]
    return sorted(chosen, key=lambda row: (row[1], row[0]))
