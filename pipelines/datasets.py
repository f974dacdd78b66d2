"""From the `data` section to the videos of both splits: lists, class folders, generated sets."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pipelines.annotations import VideoRecord, VideoSet, read_class_names, read_list
from pipelines.config import DataConfig
from pipelines.errors import AnnotationError, DataError

VIDEO_SUFFIXES = frozenset(
    ".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)


_Splits = tuple[tuple[VideoRecord, ...], tuple[VideoRecord, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Dataset:
    """The videos of both splits, with the same classes."""

    train: VideoSet
    val: VideoSet
    class_names: tuple[str, ...]
    """Class k is label k; the decimal number where no name is known."""

    cache_dir: Path
    """Where the media index is kept."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

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
    return Dataset(VideoSet(train), VideoSet(val), class_names, data.resolved_cache_dir())


def _splits(data: DataConfig, progress: bool) -> _Splits:
    if data.generate == "motion8":
        from pipelines.synthetic import generate_motion8

        root = generate_motion8(data.resolved_cache_dir(), progress=progress)
        return _from_lists(root, root / "train.txt", root / "val.txt", data, root / "classes.txt")
    if not data.root and not data.train_list:
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
    train, val = (
        read_list(
            path,
            root=root,
            num_classes=len(names),
            allow_outside_root=data.allow_outside_root,
        )
        for path in (train_list, val_list)
    )
    if not names:
        largest = max(train, key=lambda record: record.label)
        if largest.label >= max(len(train), 1000):  # a slip of the pen, not a class count
            raise AnnotationError(
                train_list,
                f"label {largest.label} of '{largest.name}' with only {len(train)} videos; give "
                "--data.num_classes if this is meant.",
            )
        names = _numbered(largest.label + 1)
        beyond = next((record for record in val if record.label >= len(names)), None)
        if beyond:
            raise AnnotationError(
                val_list,
                f"label {beyond.label} of '{beyond.name}' does not occur in {train_list} (labels "
                f"below {len(names)}); give --data.num_classes if this is meant.",
            )
    return train, val, names


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
    split_folders = (root / "train").is_dir() and (root / "val").is_dir()
    train_root = root / "train" if split_folders else root
    names = _declared_names(data, classes_file) if classes_file else _subfolders(train_root)
    if data.num_classes not in (0, len(names)):
        raise AnnotationError(
            train_root, f"expected {data.num_classes} classes (data.num_classes), got {len(names)}."
        )
    train = _class_folder_records(root, train_root, names)
    if split_folders:
        val = _class_folder_records(root, root / "val", names)
    else:
        val = _held_out(train, data.val_fraction)
        held_out = set(val)
        train = tuple(record for record in train if record not in held_out)
    for split, records in (("training", train), ("validation", val)):
        if not records:
            raise DataError(f"{root}: no {split} video; expected files like <class>/<clip>.mp4.")
    return train, val, names


def _subfolders(folder: Path) -> tuple[str, ...]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return tuple(sorted(entry.name for entry in entries if entry.is_dir()))


def _class_folder_records(
    root: Path, folder: Path, names: tuple[str, ...]
) -> tuple[VideoRecord, ...]:
    unknown = sorted(set(_subfolders(folder)) - set(names))
    if unknown:
        raise AnnotationError(folder, f"the class folder '{unknown[0]}' is not among the classes.")
    records = []
    for label, class_name in enumerate(names):
        class_folder = folder / class_name
        files = sorted(class_folder.iterdir()) if class_folder.is_dir() else []
        for path in files:
            if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
                name = path.relative_to(root).as_posix()
                records.append(VideoRecord(name, path, label))
    return tuple(records)


def _held_out(records: tuple[VideoRecord, ...], fraction: float) -> tuple[VideoRecord, ...]:
    """A share of each class, chosen by a hash of the names; at least one of two or more."""
    chosen = []
    for label in sorted({record.label for record in records}):
        members = [record for record in records if record.label == label]
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        members.sort(key=lambda record: hashlib.sha256(record.name.encode()).digest())
        chosen += members[:count]
    return tuple(sorted(chosen, key=lambda record: (record.label, record.name)))
