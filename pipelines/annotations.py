"""Lists of videos: strict parsing with `path:line:` errors."""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from pipelines.errors import AnnotationError

_LOG = logging.getLogger(__name__)
_LABEL = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class VideoRecord:
    """One video and its label."""

    name: str
    """As listed: relative to the root, with forward slashes (or absolute, where permitted)."""

    path: Path
    label: int


@dataclass(frozen=True)
class VideoSet:
    """The videos of one split, in the order of the list."""

    records: tuple[VideoRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over names, labels and order; independent of where the root is."""
        return hashlib.sha256(format_list(self.records).encode()).hexdigest()


def format_list(records: Iterable[VideoRecord]) -> str:
    """The text of a list file, one `<path><tab><label>` per line."""
    return "".join(f"{record.name}\t{record.label}\n" for record in records)


def read_list(
    path: Path, *, root: Path, num_classes: int = 0, allow_outside_root: bool = False
) -> tuple[VideoRecord, ...]:
    """The records of a list file with one `<path> <label>` per line (UTF-8).

    The two fields are separated by blanks, or by one tab when the path itself contains blanks.
    Empty lines are skipped. Repeated lines are kept and counted in the log.

    Args:
        path: the list.
        root: folder that relative paths start from.
        num_classes: labels must be below it; 0 = no bound.
        allow_outside_root: permit absolute paths and `..` that lead out of `root`.

    Raises:
        AnnotationError: the first line that cannot be used, or an empty list.
    """
    records = []
    for line_number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) != 2:
            raise AnnotationError(
                path,
                f'expected "<path> <label>", got {len(fields)} fields: {_short(line)}. '
                "Separate by one tab if the path contains blanks.",
                line_number,
            )
        name, label = fields[0].strip(), fields[1].strip()
        if not _LABEL.fullmatch(label):
            problem = f"expected a label (an integer >= 0) in the last field, got {_short(label)}."
            raise AnnotationError(path, problem, line_number)
        if num_classes and int(label) >= num_classes:
            problem = f"expected a label below {num_classes} (the number of classes), got {label}."
            raise AnnotationError(path, problem, line_number)
        if refusal := _path_problem(name, root, allow_outside_root):
            raise AnnotationError(path, refusal, line_number)
        records.append(VideoRecord(name, root / name, int(label)))
    if not records:
        raise AnnotationError(path, 'the list is empty; expected one "<path> <label>" per line.')
    repeated = len(records) - len({record.name for record in records})
    if repeated:
        _LOG.warning("%s: %d of %d lines repeat a path; kept", path, repeated, len(records))
    return tuple(records)


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
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise AnnotationError(path, f"cannot be read: {reason}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        problem = f"expected UTF-8 text, got byte 0x{content[error.start]:02x}."
        raise AnnotationError(path, problem, line_number) from error
    for line_number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield line_number, line.strip()


def _path_problem(name: str, root: Path, allow_outside_root: bool) -> str | None:
    """Why a listed path is refused, or None."""
    if not name or "\0" in name:
        return f"expected a path without NUL characters, got {_short(name)}."
    if allow_outside_root:
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
