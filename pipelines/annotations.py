"""Lists of videos: strict parsing with `path:line:` errors."""

import hashlib
import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from pipelines.errors import AnnotationError, DataError

_LOG = logging.getLogger(__name__)
_FORMS = {
    2: "<path> <label>",
    3: "<folder> <frames> <label>",
    4: "<folder> <offset> <frames> <label>",
}
_LABEL = re.compile(r"[0-9]{1,9}")
_UNLISTABLE = re.compile(r"^\s|[\t\n\r]|\s$")


@dataclass(frozen=True)
class VideoRecord:
    """One video and its label."""

    name: str
    """As listed: relative to the root, with forward slashes (or absolute, where permitted)."""

    path: Path
    label: int
    num_frames: int = 0
    """Frames of a folder of frames, as listed; 0 = not listed, or a video file."""

    offset: int = 0
    """Added to every frame number of a folder of frames."""

    @property
    def part(self) -> "Part":
        """What it shows, whatever its label is: a folder may be listed in several parts."""
        return self.name, self.offset, self.num_frames


Part = tuple[str, int, int]
"""(name, offset, frames) of a record."""

Row = tuple[str, int] | tuple[str, int, int] | tuple[str, int, int, int]
"""(name, label), or with the number of frames and the offset of a folder of frames."""


class VideoSet(Sequence[VideoRecord]):
    """The videos of one split, in the order of the list; a few bytes and the name for each."""

    def __init__(self, root: Path, rows: Iterable[Row]) -> None:
        self.root = root
        names, ends, numbers = bytearray(), array("q", [0]), array("i")
        for row in rows:
            names += row[0].encode("utf-8", "surrogateescape")
            ends.append(len(names))
            numbers.extend(row[1:] if len(row) == 4 else (*row[1:], 0, 0)[:3])
        self._names = memoryview(bytes(names))
        self._ends = np.frombuffer(ends, np.int64)
        self._numbers = np.frombuffer(numbers, np.int32).reshape(-1, 3)

    @classmethod
    def of_columns(
        cls,
        root: Path,
        ends: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int32],
        names: memoryview,
    ) -> "VideoSet":
        """The set whose `columns` these are."""
        videos = cls(root, ())
        videos._ends, videos._numbers, videos._names = ends, numbers, names
        return videos

    @property
    def columns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], memoryview]:
        """Everything but the root: [videos + 1] places of the names in the bytes of all of them,
        [videos, 3] label, frames and offset, the bytes."""
        return self._ends, self._numbers, self._names

    def selected(self, keep: npt.NDArray[np.bool_]) -> "VideoSet":
        """The videos for which `keep`, [videos], is true."""
        lengths = np.diff(self._ends)
        names = np.frombuffer(self._names, np.uint8)[np.repeat(keep, lengths)]
        ends = np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64)
        return VideoSet.of_columns(self.root, ends, self._numbers[keep], names.data)

    def encoded_names(self) -> Iterator[bytes]:
        """The names in order, as bytes (UTF-8)."""
        ends = self._ends
        for first in range(0, len(self), 10_000):
            places = ends[first : first + 10_001].tolist()
            block = bytes(self._names[places[0] : places[-1]])
            start = places[0]
            for k in range(len(places) - 1):
                yield block[places[k] - start : places[k + 1] - start]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> VideoRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[VideoRecord]: ...
    def __getitem__(self, index: int | slice) -> VideoRecord | list[VideoRecord]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        name = self._name(index)
        return VideoRecord(name, self.root / name, *self._numbers[index].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoSet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def _name(self, index: int) -> str:
        encoded = self._names[self._ends[index] : self._ends[index + 1]]
        return str(encoded, "utf-8", "surrogateescape")

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """[videos]"""
        return self._numbers[:, 0]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over names, labels and order; independent of where the root is."""
        digest = hashlib.sha256()
        names = self.encoded_names()
        for first in range(0, len(self), 10_000):
            rows = self._numbers[first : first + 10_000].tolist()
            lines = [_line(str(next(names), "utf-8", "surrogateescape"), *row) for row in rows]
            digest.update("".join(lines).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over root and list, to find what is known about these files."""
        digest = hashlib.sha256(str(self.root).encode("utf-8", "surrogateescape"))
        for part in (self._names, self._ends.data, np.ascontiguousarray(self._numbers).data):
            digest.update(b"\0")
            digest.update(part)
        return digest.hexdigest()


def format_list(records: Iterable[VideoRecord]) -> str:
    """The text of a list file, one `<path><tab>[<offset><tab>][<frames><tab>]<label>` per line."""
    return "".join(_line(r.name, r.label, r.num_frames, r.offset) for r in records)


def refuse_unlistable(name: str) -> None:
    """Raise a DataError if a list cannot hold this name."""
    if _UNLISTABLE.search(name):
        problem = "has a tab, a line break or a blank at an end"
        raise DataError(f"{name!r}: {problem}, which no list can hold; rename it.")


def _line(name: str, label: int, num_frames: int, offset: int) -> str:
    if not num_frames:
        return f"{name}\t{label}\n"
    shifted = f"{offset}\t" if offset else ""
    return f"{name}\t{shifted}{num_frames}\t{label}\n"


def read_list(
    path: Path,
    *,
    root: Path,
    num_classes: int = 0,
    allow_outside_root: bool = False,
    kind: Literal["auto", "videos", "frames"] = "auto",
) -> VideoSet:
    """The videos of a list file with one `<path> <label>` per line (UTF-8).

    Folders of frames have `<folder> <frames> <label>`, or `<folder> <offset> <frames> <label>`. The
    fields are separated by blanks, or by one tab when the path itself contains blanks. Empty lines
    are skipped. Repeated lines are kept and counted in the log.

    Args:
        path: the list.
        root: folder that relative paths start from.
        num_classes: labels must be below it; 0 = no bound.
        allow_outside_root: permit absolute paths and `..` that lead out of `root`.
        kind: "auto" = what the first line has.

    Raises:
        AnnotationError: the first line that cannot be used, or an empty list.
    """
    hashes = array("q")
    videos = VideoSet(root, _rows(path, root, num_classes, allow_outside_root, kind, hashes))
    if not len(videos):
        raise AnnotationError(path, 'the list is empty; expected one "<path> <label>" per line.')
    repeated = len(videos) - len(np.unique(np.frombuffer(hashes, np.int64)))
    if repeated:
        _LOG.warning("%s: %d of %d lines repeat a path; kept", path, repeated, len(videos))
    return videos


def _rows(
    path: Path,
    root: Path,
    num_classes: int,
    allow_outside_root: bool,
    kind: str,
    hashes: "array[int]",
) -> Iterator[Row]:
    """The rows of a list; appends a hash of what each shows."""
    forms = {"videos": (2,), "frames": (3, 4), "auto": (2, 3, 4)}[kind]
    columns = 0
    for line_number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) != columns:
            if columns or len(fields) not in forms:
                expected = _FORMS[columns or forms[0]]
                raise AnnotationError(
                    path,
                    f'expected "{expected}", got {len(fields)} fields: {_short(line)}. '
                    + _how_to_separate(line),
                    line_number,
                )
            columns = len(fields)
        name, label = fields[0].strip(), fields[-1].strip()
        if not _LABEL.fullmatch(label):
            problem = f"expected a label (an integer >= 0) in the last field, got {_short(label)}."
            raise AnnotationError(path, problem, line_number)
        if num_classes and int(label) >= num_classes:
            problem = f"expected a label below {num_classes} (the number of classes), got {label}."
            raise AnnotationError(path, problem, line_number)
        if refusal := _path_problem(name, root, allow_outside_root):
            raise AnnotationError(path, refusal, line_number)
        hashes.append(hash((name, *fields[1:-1])))  # a folder may be listed in several parts
        if columns == 2:
            yield name, int(label)
            continue
        numbers = [field.strip() for field in fields[1:-1]]
        bad = next((field for field in numbers if not _LABEL.fullmatch(field)), None)
        if bad is not None or int(numbers[-1]) == 0:
            problem = f'expected "{_FORMS[columns]}" with >= 1 frames, got {_short(line)}. '
            raise AnnotationError(path, problem + _how_to_separate(line), line_number)
        yield name, int(label), int(numbers[-1]), int(numbers[0]) if columns == 4 else 0


def _how_to_separate(line: str) -> str:
    if "\t" in line:
        return "Expected one tab between two fields."
    return (
        "If the path contains blanks, put a tab before the label (and before the number of frames, "
        "if there is one)."
    )


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a text file; line k (0-based) names label k."""
    names: dict[str, None] = {}
    for line_number, line in _lines(path):
        name = line.strip()
        if name in names:
            problem = f"the class name {_short(name)} is listed twice."
            raise AnnotationError(path, problem, line_number)
        if line_number != len(names) + 1:
            raise AnnotationError(
                path, "expected a class name, got an empty line.", line_number - 1
            )
        names[name] = None
    if not names:
        raise AnnotationError(path, "the file is empty; expected one class name per line.")
    return tuple(names)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of the lines that are not blank; handles BOM and CRLF."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for line_number, line in enumerate(handle, start=1):
                if stripped := line.strip():
                    yield line_number, stripped
    except OSError as error:
        reason = error.strerror or str(error)
        raise AnnotationError(path, f"cannot be read: {reason}.") from error
    except UnicodeDecodeError as error:
        line_number, byte = _first_bad_byte(path.read_bytes())
        problem = f"expected UTF-8 text, got byte 0x{byte:02x}."
        raise AnnotationError(path, problem, line_number) from error


def _first_bad_byte(content: bytes) -> tuple[int, int]:
    """(1-based line, byte) of the first byte that is no UTF-8."""
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1, content[error.start]
    return 1, 0  # the file was changed in between


def _path_problem(name: str, root: Path, allow_outside_root: bool) -> str | None:
    """Why a listed path is refused, or None."""
    if not name or "\0" in name:
        return f"expected a path without NUL characters, got {_short(name)}."
    # What most names are needs no closer look.
    if allow_outside_root or not (name[0] == "/" or ":" in name or ".." in name or "\\" in name):
        return None
    if PureWindowsPath(name).drive or ".." in PurePosixPath(name).parts:
        inside = False
    else:
        inside = PurePosixPath(name).is_relative_to(root) if name.startswith("/") else True
    if inside:
        return None
    return (
        f"the path {_short(name)} leads out of the root {root}; "
        "pass --data.allow_outside_root=true to permit it."
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
