"""Official annotation files of known datasets, matched with the media at hand, as our lists.

Nothing is downloaded. A set's media are video files or folders of frames, named by the official
id, directly in the media folder or in class folders.
"""

import csv
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines.cache import replace_bytes
from pipelines.datasets import VIDEO_SUFFIXES
from pipelines.errors import AnnotationError, DataError

Numbering = Literal["alphabetical", "official"]
SplitName = Literal["train", "val"]

_LOG = logging.getLogger(__name__)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Entry:
    """One annotated video."""

    split: SplitName
    names: tuple[str, ...]
    """What its file (without suffix) or folder may be called; the first is the official one."""
    label: int


@dataclass(frozen=True)
class Annotations:
    """What the official files say."""

    class_names: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class DatasetFacts:
    """What is known about a dataset before looking at it."""

    title: str
    classes: int
    page: str
    """Where its authors offer it."""
    files: tuple[str, ...]
    """The official annotation files, as they are named."""
    read: Callable[[Path, Numbering, int], Annotations]
    """(folder of these files, numbering of the labels, split 1..3) -> annotations."""


@dataclass(frozen=True)
class ImportReport:
    """What an import found and wrote."""

    found: dict[str, int]
    """Videos per split."""
    missing: dict[str, list[str]]
    """Annotated videos without media, per split."""
    unused: int
    """Media that no annotation names."""
    num_classes: int


def import_dataset(
    name: str,
    annotations: Path,
    media: Path,
    *,
    numbering: Numbering = "alphabetical",
    split: int = 1,
    threads: int = 8,
) -> ImportReport:
    """Write `train.txt`, `val.txt`, `classes.txt`, `missing.txt` and `dataset.json` into `media`.

    Args:
        name: one of `DATASETS`.
        annotations: folder of the official annotation files.
        media: folder of the videos or frame folders; becomes `data.root`.
        numbering: of Something-Something V1: "alphabetical" by class name (TSM, MAS-Net, TDN,
            MSN, AMS-Net), or that of the "official" labels file (mmaction2).
        split: of UCF101 and HMDB51, 1..3.
        threads: that count frames.

    Raises:
        DataError: annotations that cannot be read, or no media at all.
    """
    facts = DATASETS[name]
    if numbering != "alphabetical" and name != "sthv1":
        raise DataError(f"numbering {numbering}: only Something-Something V1 has two numberings.")
    try:
        wanted = facts.read(annotations, numbering, split)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AnnotationError(
            annotations,
            f"these are not the official files of {facts.title} ({type(error).__name__}: {error}).",
        ) from error
    beyond = next((e for e in wanted.entries if e.label >= len(wanted.class_names)), None)
    if beyond is not None:
        raise AnnotationError(
            annotations, f"{beyond.names[0]} has label {beyond.label}, beyond the class names."
        )
    if len(wanted.class_names) != facts.classes:
        raise AnnotationError(
            annotations,
            f"{facts.title} has {facts.classes} classes, these files {len(wanted.class_names)}; "
            "another version of the lists?",
        )
    stems = _media(media)
    lines: dict[str, list[str]] = {"train": [], "val": []}
    missing: dict[str, list[str]] = {"train": [], "val": []}
    used: list[tuple[Entry, str]] = []
    for entry in wanted.entries:
        path = next((stems[stem] for stem in entry.names if stem in stems), None)
        if path is None:
            missing[entry.split].append(entry.names[0])
        else:
            used.append((entry, path))
    if not used:
        raise DataError(
            f"{media}: none of the {len(wanted.entries)} annotated videos is here; expected files "
            f"or folders named like {_example(wanted)}, directly or in class folders."
        )
    with ThreadPoolExecutor(threads) as pool:
        counts = pool.map(partial(_count_frames, media), [path for _, path in used])
        for (entry, path), frames in zip(used, counts, strict=True):
            fields = [path, str(frames), str(entry.label)] if frames else [path, str(entry.label)]
            lines[entry.split].append("\t".join(fields))
    report = ImportReport(
        found={key: len(rows) for key, rows in lines.items()},
        missing=missing,
        unused=len(stems) - len(used),
        num_classes=len(wanted.class_names),
    )
    _write(media, name, numbering, split, wanted, lines, report)
    return report


def _example(wanted: Annotations) -> str:
    return wanted.entries[0].names[0] if wanted.entries else "the official ids"


def _write(
    media: Path,
    name: str,
    numbering: str,
    split: int,
    wanted: Annotations,
    lines: dict[str, list[str]],
    report: ImportReport,
) -> None:
    facts = {
        "dataset": name,
        "numbering": numbering,
        "split": split,
        "classes": report.num_classes,
        "found": report.found,
        "missing": {key: len(ids) for key, ids in report.missing.items()},
    }
    texts = {
        "train.txt": lines["train"],
        "val.txt": lines["val"],
        "classes.txt": list(wanted.class_names),
        "missing.txt": [f"{key}\t{video}" for key, ids in report.missing.items() for video in ids],
        "dataset.json": [json.dumps(facts, indent=1)],
    }
    try:
        for file, rows in texts.items():
            replace_bytes(media / file, (f"{row}\n".encode() for row in rows))
    except OSError as error:
        raise DataError(f"{media}: lists cannot be written here: {error.strerror}.") from error


def _media(root: Path) -> dict[str, str]:
    """Name without suffix -> path relative to `root`, of videos and frame folders."""
    if not root.is_dir():
        raise DataError(f"{root}: expected the folder of the videos or frame folders.")
    found: dict[str, str] = {}
    for entry in sorted(os.scandir(root), key=lambda item: item.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not _holds_images(entry.path):
            inner = sorted(os.scandir(entry.path), key=lambda item: item.name)
            _add_media(found, inner, f"{entry.name}/")
        else:
            _add_media(found, [entry], "")
    return found


def _add_media(found: dict[str, str], entries: Sequence[os.DirEntry[str]], prefix: str) -> None:
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if entry.is_dir():
            stem = entry.name
        elif suffix.lower() not in VIDEO_SUFFIXES:
            continue
        if stem in found:
            _LOG.warning("%s and %s%s have one name; the first is used", found[stem], prefix, stem)
            continue
        found[stem] = prefix + entry.name


def _holds_images(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(_IMAGE_SUFFIXES) for entry in entries)


def _count_frames(root: Path, path: str) -> int:
    """Images in a frame folder; 0 for a video file."""
    if not (root / path).is_dir():
        return 0
    names = os.listdir(root / path)
    return sum(name.lower().endswith(_IMAGE_SUFFIXES) for name in names)


def _find(folder: Path, *names: str) -> Path:
    """The first of these files that exists in the folder."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = "it is not there" if len(names) == 1 else "found neither"
    raise DataError(f"{folder}: expected the annotation file {' or '.join(names)}; {found}.")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(path, f"cannot be read as JSON: {error}.") from error


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(1-based line, fields) of a text table."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            yield from ((reader.line_num, row) for row in reader if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(path, f"cannot be read: {error}.") from error


def _label(path: Path, line: int, name: str, labels: dict[str, int]) -> int:
    if name not in labels:
        raise AnnotationError(path, f"the class {name!r} is not among the labels.", line)
    return labels[name]


def _number(path: Path, line: int, text: str, first: int = 0) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < first:
        raise AnnotationError(path, f"expected a label >= {first}, got {text!r}.", line)
    return int(text) - first


def _something_v1(folder: Path, numbering: Numbering, split: int) -> Annotations:
    prefix = "something-something-v1-"
    names = [row[0] for _, row in _rows(_find(folder, f"{prefix}labels.csv", "labels.csv"), ";")]
    if numbering == "alphabetical":
        names = sorted(names)
    labels = {name: label for label, name in enumerate(names)}
    entries = []
    for key, file in (("train", "train.csv"), ("val", "validation.csv")):
        path = _find(folder, prefix + file, file)
        for line, row in _rows(path, ";"):
            if len(row) != 2:
                raise AnnotationError(path, f'expected "id;class", got {row}.', line)
            entries.append(Entry(_split(key), (row[0],), _label(path, line, row[1], labels)))
    return Annotations(tuple(names), tuple(entries))


def _something_v2(folder: Path, numbering: Numbering, split: int) -> Annotations:
    prefix = "something-something-v2-"
    path = _find(folder, f"{prefix}labels.json", "labels.json")
    labels = {name: _number(path, 1, str(label)) for name, label in dict(_json(path)).items()}
    names = sorted(labels, key=lambda name: labels[name])
    entries = []
    for key, file in (("train", "train.json"), ("val", "validation.json")):
        path = _find(folder, prefix + file, file)
        for line, video in enumerate(_json(path), start=1):
            name = re.sub(r"[\[\]]", "", video["template"])
            entries.append(Entry(_split(key), (video["id"],), _label(path, line, name, labels)))
    return Annotations(tuple(names), tuple(entries))


def _kinetics(folder: Path, numbering: Numbering, split: int, *, subset: bool) -> Annotations:
    clips: list[tuple[str, Entry]] = []  # class name, and an entry without label
    for key, files in (("train", ("train.csv",)), ("val", ("val.csv", "validate.csv"))):
        path = _find(folder, *files)
        table = _rows(path, ",")
        _, header = next(table, (1, []))
        columns = [_column(path, header, name) for name in _KINETICS_COLUMNS]
        for line, row in table:
            class_name, video, start, end = (row[column] for column in columns)
            times = f"{_number(path, line, start):06d}_{_number(path, line, end):06d}"
            clips.append((class_name, Entry(_split(key), (f"{video}_{times}", video), 0)))
    names = sorted({name for name, _ in clips})
    if subset:
        names = sorted(row[0] for _, row in _rows(_find(folder, "classes.txt"), "\t"))
    labels = {name: label for label, name in enumerate(names)}
    entries = [replace(entry, label=labels[name]) for name, entry in clips if name in labels]
    return Annotations(tuple(names), tuple(entries))


_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def _column(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        raise AnnotationError(path, f"lacks the column {name!r}.", 1)
    return header.index(name)


def _diving48(folder: Path, numbering: Numbering, split: int, *, version: int) -> Annotations:
    vocabulary = _json(_find(folder, "Diving48_vocab.json"))
    names = ["+".join(entry) if isinstance(entry, list) else str(entry) for entry in vocabulary]
    entries = []
    for key, file in (("train", "train"), ("val", "test")):
        path = _find(folder, f"Diving48_V{version}_{file}.json", f"Diving48_{file}.json")
        for line, video in enumerate(_json(path), start=1):
            label = _number(path, line, str(video["label"]))
            entries.append(Entry(_split(key), (video["vid_name"],), label))
    return Annotations(tuple(names), tuple(entries))


def _finegym(folder: Path, numbering: Numbering, split: int, *, classes: int) -> Annotations:
    entries = []
    for key, files in (
        ("train", (f"gym{classes}_train_element_v1.1.txt", f"gym{classes}_train_element_v1.0.txt")),
        ("val", (f"gym{classes}_val_element.txt",)),
    ):
        path = _find(folder, *files)
        for line, row in _rows(path, " "):
            if len(row) != 2:
                raise AnnotationError(path, f'expected "<element id> <label>", got {row}.', line)
            entries.append(Entry(_split(key), (row[0],), _number(path, line, row[1])))
    return Annotations(tuple(str(label) for label in range(classes)), tuple(entries))


def _ucf101(folder: Path, numbering: Numbering, split: int) -> Annotations:
    path = _find(folder, "classInd.txt")
    names = [row[1] for _, row in _rows(path, " ")]
    labels = {name: label for label, name in enumerate(names)}
    entries = []
    for key, file in (("train", "trainlist"), ("val", "testlist")):
        path = _find(folder, f"{file}0{split}.txt")
        for line, row in _rows(path, " "):
            class_name, _, video = row[0].partition("/")
            label = _label(path, line, class_name, labels)
            entries.append(Entry(_split(key), (os.path.splitext(video)[0],), label))
    return Annotations(tuple(names), tuple(entries))


def _hmdb51(folder: Path, numbering: Numbering, split: int) -> Annotations:
    ending = f"_test_split{split}.txt"
    files = sorted(path for path in folder.glob(f"*{ending}"))
    if not files:
        raise DataError(f"{folder}: expected files like brush_hair{ending}, found none.")
    names = [path.name.removesuffix(ending) for path in files]
    entries = []
    for label, path in enumerate(files):
        for line, row in _rows(path, " "):
            if len(row) < 2 or row[1] not in ("0", "1", "2"):
                raise AnnotationError(path, f'expected "<video> 0|1|2", got {row}.', line)
            if row[1] != "0":
                part: SplitName = "train" if row[1] == "1" else "val"
                entries.append(Entry(part, (os.path.splitext(row[0])[0],), label))
    return Annotations(tuple(names), tuple(entries))


def _split(key: str) -> SplitName:
    return "train" if key == "train" else "val"


_SOMETHING_V1 = ("labels.csv", "train.csv", "validation.csv")
_SOMETHING_V2 = ("labels.json", "train.json", "validation.json")

_QUALCOMM = "https://www.qualcomm.com/developer/software/something-something-v-2-dataset"
_DIVING48 = "http://www.svcl.ucsd.edu/projects/resound/dataset.html"
_FINEGYM = "https://sdolivia.github.io/FineGym/"
_KINETICS = "https://github.com/cvdfoundation/kinetics-dataset"

DATASETS: dict[str, DatasetFacts] = {
    "sthv1": DatasetFacts(
        "Something-Something V1",
        174,
        f"{_QUALCOMM} (of V2; that of V1, 20bn.com, is gone)",
        tuple(f"something-something-v1-{name}" for name in _SOMETHING_V1),
        _something_v1,
    ),
    "sthv2": DatasetFacts(
        "Something-Something V2",
        174,
        _QUALCOMM,
        tuple(f"something-something-v2-{name}" for name in _SOMETHING_V2),
        _something_v2,
    ),
    "k400": DatasetFacts(
        "Kinetics-400", 400, _KINETICS, ("train.csv", "val.csv"), partial(_kinetics, subset=False)
    ),
    "minik200": DatasetFacts(
        "mini-Kinetics-200",
        200,
        f"{_KINETICS}; its lists: https://github.com/s9xie/Mini-Kinetics-200",
        ("train.csv", "val.csv", "classes.txt"),
        partial(_kinetics, subset=True),
    ),
    "diving48_v1": DatasetFacts(
        "Diving48 V1",
        48,
        _DIVING48,
        ("Diving48_vocab.json", "Diving48_train.json", "Diving48_test.json"),
        partial(_diving48, version=1),
    ),
    "diving48_v2": DatasetFacts(
        "Diving48 V2",
        48,
        _DIVING48,
        ("Diving48_vocab.json", "Diving48_V2_train.json", "Diving48_V2_test.json"),
        partial(_diving48, version=2),
    ),
    "gym99": DatasetFacts(
        "FineGym, 99 classes",
        99,
        _FINEGYM,
        ("gym99_train_element_v1.1.txt", "gym99_val_element.txt"),
        partial(_finegym, classes=99),
    ),
    "gym288": DatasetFacts(
        "FineGym, 288 classes",
        288,
        _FINEGYM,
        ("gym288_train_element_v1.1.txt", "gym288_val_element.txt"),
        partial(_finegym, classes=288),
    ),
    "ucf101": DatasetFacts(
        "UCF101",
        101,
        "https://www.crcv.ucf.edu/data/UCF101.php",
        ("classInd.txt", "trainlist01.txt", "testlist01.txt"),
        _ucf101,
    ),
    "hmdb51": DatasetFacts(
        "HMDB51",
        51,
        "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/",
        ("<class>_test_split1.txt",),
        _hmdb51,
    ),
}
