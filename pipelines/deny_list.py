"""Deny-lists: videos that training must not use, one `<path><tab><reason>` per line.

People write into them, too: `accel data check` marks the lines that are its own, and changes no
others.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.annotations import refuse_unlistable
from pipelines.cache import replace_bytes
from pipelines.errors import AnnotationError, DataError, why

_MARK = "accel data check"  # a third field


class DenyListUpdate(NamedTuple):
    """What has become of a deny-list."""

    entries: int
    """Videos in it now."""

    mended: list[str]
    """Videos whose lines were taken out."""

    not_ours: list[str]
    """Videos in which nothing was found, too, but whose lines somebody else wrote: they stay."""


class _Line(NamedTuple):
    text: str
    name: str = ""
    """"" = a comment, or a blank line."""

    reason: str = ""
    marked: bool = False


def read_deny_list(path: Path) -> dict[str, str]:
    """Name -> reason. Blank lines, and those that begin with "#", are comments (a name that begins
    so is written as "./#...").

    Raises:
        AnnotationError: the file cannot be read, or a line has no tab.
    """
    return {line.name: line.reason for line in _lines(path) if line.name}


def update_deny_list(
    path: Path, found: Mapping[str, str], checked: Container[str] | None
) -> DenyListUpdate:
    """Put what a check has found into a deny-list, and take out what an earlier one had found in
    videos that are mended now. Lines that no check wrote, and comments, stay as they are.

    Args:
        path: the file; written if anything changes.
        found: name -> reason of each video that must not be used.
        checked: names of the videos that were looked at as closely as can be; None = all.

    Raises:
        AnnotationError: see `read_deny_list`.
        DataError: there is a tab or a line break in a name, or the file cannot be written.
    """
    lines = _lines(path) if path.exists() else []
    by_hand = {line.name for line in lines if line.name and not line.marked}
    new = {name: reason for name, reason in found.items() if name not in by_hand}
    kept: list[_Line] = []
    mended: list[str] = []
    not_ours: list[str] = []
    for line in lines:
        sound = line.name not in found and (checked is None or line.name in checked)
        if not line.marked:
            kept.append(line)
            if line.name and sound:
                not_ours.append(line.name)
        elif line.name in new:
            kept.append(_marked(line.name, new.pop(line.name)))
        elif sound:
            mended.append(line.name)
        elif line.name not in found:  # else it is there twice
            kept.append(line)
    kept += [_marked(name, reason) for name, reason in new.items()]
    if kept != lines:
        text = "".join(f"{line.text}\n" for line in kept)
        try:
            replace_bytes(path, [text.encode("utf-8", "surrogateescape")])
        except OSError as error:
            problem = "the deny-list cannot be written: "
            problem += f"{why(error)}; what it would hold is printed above"
            raise DataError(f"{path}: {problem}.") from error
    return DenyListUpdate(len({line.name for line in kept if line.name}), mended, not_ours)


def _marked(name: str, reason: str) -> _Line:
    refuse_unlistable(name)
    reason = " ".join(reason.split())
    shown = f"./{name}" if name.startswith("#") else name
    return _Line(f"{shown}\t{reason}\t{_MARK}", name, reason, True)


def _lines(path: Path) -> list[_Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(path, f"expected UTF-8 text ({error}).") from error
    except OSError as error:
        raise AnnotationError(path, f"the deny-list cannot be read: {why(error)}.") from error
    lines = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            lines.append(_Line(line))
            continue
        name, *fields = line.split("\t")
        if not fields:
            expected = '"<path><tab><reason>", or a comment that begins with "#"'
            raise AnnotationError(path, f"expected {expected}, got {line[:80]!r}.", number)
        marked = len(fields) > 1 and fields[-1] == _MARK
        name = name.removeprefix("./") if name.startswith("./#") else name
        lines.append(_Line(line, name, " ".join(fields[: len(fields) - marked]), marked))
    return lines
