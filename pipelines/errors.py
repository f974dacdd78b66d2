"""Errors of lists and media files: where, got, expected, what to do."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

_MOST_REASONS = 10  # rows of a table


class DataError(Exception):
    """Data that cannot be used. `train.py` ends with exit code 3."""

    exit_code = 3


class HangError(DataError):
    """Videos that are not read in time."""


class AnnotationError(DataError):
    """A list file, or one line of it (1-based), that cannot be used."""

    def __init__(self, path: Path | str, problem: str, line: int | None = None) -> None:
        where = shown(path) if line is None else f"{shown(path)}:{line}"
        super().__init__(f"{where}: {problem}")
        self.path = Path(path)
        self.line = line
        self.problem = problem


class MediaError(DataError):
    """A media file that cannot be decoded as asked."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{shown(path)}: {problem}")
        self.path = Path(path)
        self.problem = problem


def shown(name: Path | str) -> str:
    """A name as messages have it: on one line, whatever is in it."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], str(name))


def counted(number: int, what: str) -> str:
    """ "1 video", "2 videos"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def why(error: BaseException) -> str:
    """What an error of the system or of FFmpeg says, without the path that messages name anyway."""
    return getattr(error, "strerror", None) or str(error)


def too_many_unusable(
    found: Sequence[MediaError], *, total: int, tolerated: int, what: str = "videos"
) -> DataError:
    """The error of a set that has more unusable videos than it may: one line per reason.

    Args:
        found: one error per video.
        total: videos of the set.
        tolerated: of them may be unusable.
        what: they are, e.g. "training videos".

    Returns:
        The error itself where there is only one. Reasons that differ in numbers alone count as
        one; the most frequent ten are listed, each with its first video.
    """
    if len(found) == 1:
        return found[0]
    groups = defaultdict(list)
    for error in found:
        groups[re.sub(r"\d+", "0", error.problem)].append(error)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"  {len(group):6}  {group[0]}" for group in ordered[:_MOST_REASONS]]
    if rest := sum(map(len, ordered[_MOST_REASONS:])):
        lines.append(f"  {rest:6}  for other reasons")
    return DataError(
        f"{len(found)} of {total} {what} cannot be used, allowed {tolerated} "
        "(data.max_bad_fraction); `accel data check` names each.\n"
        + "\n".join(["  videos  the first of them, and the reason", *lines])
    )
