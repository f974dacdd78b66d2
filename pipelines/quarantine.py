"""Videos that cannot be used: which and why, in a file that all processes of a run share."""

import contextlib
import csv
import io
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from pipelines.annotations import VideoSet
from pipelines.cache import file_lock, replace_bytes
from pipelines.errors import DataError, MediaError, shown, too_many_unusable
from pipelines.order import Split

_LOG = logging.getLogger(__name__)
_TOLERATED = 10  # videos, in sets of which they are no more than a tenth
_TITLES: dict[str, str] = {"train": "training", "val": "validation"}
_EFFECTS: dict[str, str] = {"train": "another one stands in", "val": "it counts as wrong"}


@dataclass(frozen=True)
class Unusable:
    """One video that cannot be used."""

    split: str
    sample_id: int
    """Index into the records of the split."""

    path: str
    """As listed."""

    reason: str


_HEADER = [field.name for field in fields(Unusable)]


def tolerated(num_videos: int, fraction: float) -> int:
    """How many videos of a set may be unusable.

    Args:
        num_videos: in the set.
        fraction: of the set, 0..1. Ten videos are tolerated too where they are no more than a
            tenth of the set; 0 = none at all.
    """
    return max(int(fraction * num_videos), min(_TOLERATED, num_videos // 10)) if fraction else 0


class Quarantine:
    """The videos of a split that were found to be unusable; what is in it stays in it.

    Args:
        videos: of the split.
        split: "train" or "val".
        max_bad_fraction: see `tolerated`.
        path: CSV file (split, sample_id, path, reason) of the run, for both splits; read now, and
            replaced with every new entry. None = no file.

    Raises:
        DataError: more videos are listed than tolerated, or the file is of other videos.
    """

    def __init__(
        self,
        videos: VideoSet,
        *,
        split: Split,
        max_bad_fraction: float = 0.0,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self._videos = videos
        self._split = split
        self._tolerated = tolerated(len(videos), max_bad_fraction)
        self._entries: dict[int, Unusable] = {}
        self._new: list[Unusable] = []
        self._lock = threading.Lock()
        self.refresh()

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tolerated(self) -> int:
        """How many videos may be unusable."""
        return self._tolerated

    @property
    def entries(self) -> list[Unusable]:
        """By sample id."""
        with self._lock:
            return [self._entries[sample_id] for sample_id in sorted(self._entries)]

    def add(self, sample_id: int, reason: str) -> None:
        """Leave a video out from now on.

        Raises:
            DataError: that would be more than tolerated, with what other processes have found
                (MediaError if it is the only one); nothing has changed, nor has the file, so a run
                continues once the video is repaired.
        """
        self.add_all([(sample_id, reason)])

    def add_all(self, found: Iterable[tuple[int, str]]) -> None:
        """`add` several, with one change of the file."""
        entries = [
            Unusable(self._split, sample_id, self._videos[sample_id].name, _one_line(reason))
            for sample_id, reason in found
            if sample_id not in self._entries
        ]
        if not entries:
            return
        if self.path is None:
            self._check(entries)
            self._keep(entries)
        else:
            with _locked(self.path):
                stored = _read(self.path)
                known = {(e.split, e.sample_id) for e in stored}
                merged = stored + [e for e in entries if (e.split, e.sample_id) not in known]
                own = self._own(merged)
                self._check(own)  # before it is written: a resumed run would refuse the file
                if len(merged) > len(stored):
                    _write(self.path, sorted(merged, key=lambda e: (e.split, e.sample_id)))
                self._keep(own)
        for entry in entries[:3]:
            facts = (entry.sample_id, shown(entry.path), _EFFECTS[self._split], entry.reason)
            _LOG.warning("%s video %d (%s) cannot be used, %s: %s", _TITLES[self._split], *facts)
        if len(entries) > 3:
            _LOG.warning("and %d more", len(entries) - 3)

    def refresh(self) -> None:
        """Take over what other processes have found.

        Raises:
            DataError: see `Quarantine`.
        """
        if self.path is None:
            return
        entries = self._own(_read(self.path))
        self._check(entries)
        self._keep(entries)

    def _own(self, stored: list[Unusable]) -> list[Unusable]:
        """Those of this split; they must be of these videos."""
        entries = [entry for entry in stored if entry.split == self._split]
        for entry in entries:
            known = entry.sample_id < len(self._videos)
            if not known or self._videos[entry.sample_id].name != entry.path:
                raise DataError(
                    f"{self.path}: has {shown(entry.path)} as {_TITLES[self._split]} video "
                    f"{entry.sample_id}, which it is not: the videos have changed since (files "
                    "gone or added, another list); undo that, choose another --out, or delete "
                    f"{self.path}."
                )
        return entries

    def take_new(self) -> list[Unusable]:
        """The entries since the last call."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def summary(self) -> list[dict[str, Any]]:
        """The entries as plain data, for reports."""
        return [vars(entry) for entry in self.entries]

    def _keep(self, entries: list[Unusable]) -> None:
        with self._lock:
            new = [entry for entry in entries if entry.sample_id not in self._entries]
            # Replaced, never changed: other threads ask it meanwhile.
            self._entries = self._entries | {entry.sample_id: entry for entry in new}
            self._new += new

    def _check(self, found: list[Unusable]) -> None:
        """Refuse entries that would be too many."""
        new = [entry for entry in found if entry.sample_id not in self._entries]
        entries = new + self.entries
        if not new or len(entries) <= self._tolerated:
            return
        raise too_many_unusable(
            [MediaError(self._videos[entry.sample_id].path, entry.reason) for entry in entries],
            total=len(self._videos),
            tolerated=self._tolerated,
            what=f"{_TITLES[self._split]} videos",
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the file, if its folder can be written."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path.with_name(f".{path.name}.lock")))
        except OSError as error:  # a run does not end for it, as in `_write`
            _LOG.error("%s: no lock can be made beside it (%s)", path, error)
        yield


def _read(path: Path) -> list[Unusable]:
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as handle:
            rows = list(csv.reader(handle))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except csv.Error as error:
        raise DataError(f"{path}: {error}; repair or delete the file.") from error
    try:
        if rows[:1] != [_HEADER]:
            raise ValueError("another header" if rows else "the file is empty")
        return [Unusable(row[0], int(row[1]), row[2], row[3]) for row in rows[1:]]
    except (ValueError, IndexError) as error:
        problem = f"expected the columns {','.join(_HEADER)} ({error}); repair or delete the file."
        raise DataError(f"{path}: {problem}") from error


def _write(path: Path, entries: list[Unusable]) -> None:
    text = io.StringIO(newline="")
    # Names in quotes: there may be line breaks in them.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_HEADER)
    writer.writerows(astuple(entry) for entry in entries)
    try:
        replace_bytes(path, [text.getvalue().encode("utf-8", "surrogateescape")])
    except OSError as error:
        _LOG.error("%s cannot be written (%s); the run goes on without it", path, error)
