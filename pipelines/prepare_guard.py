"""Videos that kill the process which prepares them: found at the next start, then left out."""

import contextlib
import functools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipelines.annotations import Part, VideoRecord
from pipelines.audit import check_each
from pipelines.cache import replace_bytes
from pipelines.in_flight import InFlight, find_harmful, left_behind
from pipelines.packing import stamp_of

_LOG = logging.getLogger(__name__)
_STEM = ".prepare"
_FILE = ".harmful.json"
_Result = TypeVar("_Result")


class Guard:
    """Notes in a file what is being read. What stands there of a process that ended is read alone,
    each in a process that may die; what kills it is left out until its file changes.

    Args:
        out: folder of the copies, which no other process writes to.
        records: that are to be read.
        frame_name: names of the files in folders of frames.
    """

    def __init__(self, out: Path, records: Sequence[VideoRecord], frame_name: str) -> None:
        self._in_flight = InFlight(out, _STEM)
        self._reading: set[Part] = set()
        self._lock = threading.Lock()
        of_part = {record.part: record for record in records}
        stored = _stored(out / _FILE)
        self._harmful = {
            part: what
            for part, (stamp, what) in stored.items()
            if part in of_part and _stamp(of_part[part]) == stamp
        }
        """Of these videos, why not."""
        suspects: dict[Part, VideoRecord] = {}
        files = list(left_behind(out, _STEM))
        for _, content in files:
            parts = [(str(name), int(first), int(frames)) for name, first, frames in content or ()]
            suspects |= {part: of_part[part] for part in parts if part in of_part}
        if suspects:
            _LOG.info("a process died while it prepared videos; %d are read alone", len(suspects))
            task = functools.partial(check_each, frame_name, True)
            found = find_harmful(task, list(suspects.values()), timeout_s=None)
            new = {list(suspects)[number]: end.what for number, end in found.items()}
            self._harmful |= new
            stored |= {part: (_stamp(of_part[part]), what) for part, what in new.items()}
            if new:
                rows = [[*part, *facts] for part, facts in stored.items()]
                replace_bytes(out / _FILE, [json.dumps(rows).encode()])
        for path, _ in files:
            path.unlink(missing_ok=True)

    def call(
        self, record: VideoRecord, function: Callable[..., _Result], *arguments: Any
    ) -> _Result | str:
        """What a function that reads this video returns, or why it must not be called."""
        if what := self._harmful.get(record.part):
            return what
        with self._lock:
            self._reading.add(record.part)
            self._in_flight.write(list(self._reading))
        try:
            return function(*arguments)
        finally:
            with self._lock:
                self._reading.discard(record.part)

    def close(self) -> None:
        """Nothing is read any more."""
        self._in_flight.remove()


def _stored(path: Path) -> dict[Part, tuple[str, str]]:
    """Part -> (stamp, what it does)."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {(name, first, frames): (stamp, what) for name, first, frames, stamp, what in rows}
    return {}


def _stamp(record: VideoRecord) -> str:
    try:
        return stamp_of(record)
    except OSError:
        return ""
