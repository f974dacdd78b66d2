"""The file of a media index: one row of fixed size per video, and packet tables behind them.

Tables are read when a sample needs them: a set of 10^6 videos costs 10^6 rows of memory and no
opened file.
"""

import functools
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pipelines.cache import checksum, content_of, replace_bytes, unwritable
from pipelines.errors import DataError
from pipelines.media import MediaInfo, StreamKind
from pipelines.packets import PacketTable

_LOG = logging.getLogger(__name__)
_MAGIC = b"accel media index 4\n"
_ROW = np.dtype(
    [
        ("path", "<u8"),  # hash of the path
        ("size_bytes", "<i8"),
        ("time_ns", "<i8"),  # of the last change
        ("num_frames", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("kind", "<i4"),
        ("first_number", "<i4"),
        ("table_at", "<i8"),  # from the start of the tables
        ("table_bytes", "<i4"),  # 0 = none
    ]
)
Results = dict[int, tuple[MediaInfo, int]]
"""What is known of each path (by hash), and the time stamp that goes with it."""
Problems = dict[int, str]
"""Why a path (by hash) cannot be used."""
Stamp = tuple[int, int]
"""Size and time of the last change, ns, of a file; (-1, -1) = not known."""
Content = tuple[npt.NDArray[Any], list[StreamKind], Problems]
"""Rows, one per video in the order of the list; kinds; problems."""


class MediaIndex(Sequence[MediaInfo]):
    """What is in each file of a list, in its order; tables are read from disk when asked for."""

    def __init__(
        self,
        path: Path,
        rows: npt.NDArray[Any],
        kinds: Sequence[StreamKind],
        problems: Problems | None = None,
    ) -> None:
        self.path, self._rows, self._kinds = path, rows, tuple(kinds)
        self.problems: dict[int, str] = {}
        """Why a video (by its place in the list) cannot be used; it has 0 frames here."""
        if problems:
            bad = np.flatnonzero(rows["num_frames"] == 0).tolist()
            self.problems = {k: problems[int(rows["path"][k])] for k in bad}
        self._handle = path.open("rb")
        self._tables_at = int.from_bytes(self._handle.read(len(_MAGIC) + 8)[-8:], "little")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> MediaInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[MediaInfo]: ...
    def __getitem__(self, index: int | slice) -> MediaInfo | list[MediaInfo]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        row = self._rows[index].item()
        if problem := self.problems.get(index):
            raise DataError(f"video {index} cannot be used: {problem}")
        _, size_bytes, _, num_frames, width, height, kind, first_number, place, count = row
        table = None
        if count:
            packed = os.pread(self._handle.fileno(), count, self._tables_at + place)
            try:
                table = PacketTable.unpack(packed)
            except (zlib.error, ValueError) as error:
                problem = f"{self.path}: the media index is damaged ({error}); delete it."
                raise DataError(problem) from error
        facts = (width, height, num_frames, size_bytes, table, first_number)
        return MediaInfo(self._kinds[kind], *facts)

    def stamp(self, index: int) -> Stamp:
        """Of the file as it was when it was indexed."""
        return stamp_in(self._rows[index])

    @property
    def num_frames(self) -> npt.NDArray[np.int32]:
        """[videos] frames of each."""
        frames: npt.NDArray[np.int32] = self._rows["num_frames"]
        return frames

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The different (width, height), px."""
        rows = self._usable
        both = rows["width"].astype(np.int64) << 32 | rows["height"]
        return [(size >> 32, size & 0xFFFFFFFF) for size in np.unique(both).tolist()]

    @property
    def are_frames(self) -> bool:
        """Whether the videos are folders of frames."""
        return any(kind.frame_name for kind, _ in self.kinds)

    @functools.cached_property
    def kinds(self) -> list[tuple[StreamKind, int]]:
        """The different kinds, and one video of each."""
        present, first = np.unique(self._rows["kind"], return_index=True)
        pairs = zip(present.tolist(), first.tolist(), strict=True)
        return [(self._kinds[kind], index) for kind, index in pairs if kind >= 0]

    def whole_files(self, *, cut: bool) -> dict[str, int]:
        """Reason -> number of videos that are decoded from the start of their file.

        Args:
            cut: see `StreamKind.whole_reason`.
        """
        rows = self._usable
        both = rows["kind"].astype(np.int64) << 1 | (rows["table_bytes"] > 0)
        found: dict[str, int] = {}
        for value, count in zip(*np.unique(both, return_counts=True), strict=True):
            kind = self._kinds[int(value) >> 1]
            reason = kind.whole_reason(packets_known=bool(value & 1), cut=cut)
            if reason is not None:
                found[reason] = found.get(reason, 0) + int(count)
        return found

    @property
    def _usable(self) -> npt.NDArray[Any]:
        return self._rows[self._rows["num_frames"] > 0] if self.problems else self._rows


def stamp_in(row: Any) -> Stamp:
    """Of the file of a row, as it was when it was indexed."""
    return int(row["size_bytes"]), int(row["time_ns"])


def write_index(
    path: Path,
    keys: Sequence[int],
    results: Results,
    problems: Problems | None = None,
    stamps: Mapping[int, Stamp] | None = None,
) -> None:
    """Write an index file.

    Args:
        path: of the file.
        keys: hash of the path of each video.
        results, problems: each key is in one of them.
        stamps: of those problems that stay while the file stays as it is.
    """
    problems, stamps = problems or {}, stamps or {}
    rows = np.zeros(len(keys), _ROW)
    kinds: dict[StreamKind, int] = {}
    tables: list[bytes] = []
    place = 0
    written: dict[int, Any] = {}
    for number, key in enumerate(keys):
        if key in problems:
            rows[number] = (key, *stamps.get(key, (-1, -1)), 0, 0, 0, -1, 0, 0, 0)
            continue
        if key not in written:
            info, time_ns = results[key]
            packed = info.packets.pack() if info.packets else b""
            tables.append(packed)
            kind = kinds.setdefault(info.kind, len(kinds))
            facts = (info.num_frames, info.width, info.height, kind, info.first_number)
            written[key] = (key, info.size_bytes, time_ns, *facts, place, len(packed))
            place += len(packed)
        rows[number] = written[key]
    _store(path, rows, list(kinds), problems, tables)


def mark_unusable(path: Path, found: Mapping[int, str]) -> None:
    """Note in an index file why videos (by place in the list) must not be read as they are now."""
    content = read_index(path)
    if content is None:
        return
    rows, kinds, problems = content
    rows = rows.copy()
    with path.open("rb") as handle:
        handle.seek(len(_MAGIC))
        handle.seek(int.from_bytes(handle.read(8), "little"))
        tables = handle.read()
    for place, reason in found.items():
        key = rows["path"][place]
        same = np.flatnonzero(rows["path"] == key)  # listed twice
        for name in ("num_frames", "width", "height"):
            rows[name][same] = 0
        rows["kind"][same] = -1
        problems[int(key)] = reason
    _store(path, rows, kinds, problems, [tables])


def _store(
    path: Path,
    rows: npt.NDArray[Any],
    kinds: Sequence[StreamKind],
    problems: Problems,
    tables: Sequence[bytes],
) -> None:
    """Magic, place of the tables (8 bytes), kinds and problems as JSON, rows, tables."""
    head_facts = {
        "rows": len(rows),
        "checksum": zlib.crc32(rows.tobytes()),
        "kinds": [astuple(kind) for kind in kinds],
        "problems": {str(key): problem for key, problem in problems.items()},
    }
    head = json.dumps(head_facts).encode() + b"\n"
    tables_at = len(_MAGIC) + 8 + len(head) + rows.nbytes
    parts = [_MAGIC, tables_at.to_bytes(8, "little"), head, rows.tobytes(), *tables]
    try:
        replace_bytes(path, parts)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def read_index(path: Path, num_rows: int | None = None) -> Content | None:
    """The content of an index file; None = there is none that can be used."""
    try:
        with path.open("rb") as handle:
            if handle.readline() != _MAGIC:
                raise ValueError("another version")
            tables_at = int.from_bytes(handle.read(8), "little")
            facts = json.loads(handle.readline())
            rows_end = handle.tell() + facts["rows"] * _ROW.itemsize
            content = content_of(handle, rows_end)
            rows = np.frombuffer(content, _ROW, facts["rows"], handle.tell())
            kinds = [StreamKind(*fields) for fields in facts["kinds"]]
            problems = {int(key): text for key, text in facts.get("problems", {}).items()}
            end = tables_at + int((rows["table_at"] + rows["table_bytes"]).max(initial=0))
            size_bytes = os.fstat(handle.fileno()).st_size
            whole = rows_end == tables_at and size_bytes == end
            same = checksum(handle, rows.nbytes) == facts["checksum"]
        if not whole or not same or len(rows) == 0:
            raise ValueError("cut off or damaged")
        if num_rows not in (None, len(rows)):
            raise ValueError(f"expected {num_rows} rows, got {len(rows)}")
        return rows, kinds, problems
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s: ignoring an unreadable media index (%s)", path, error)
        return None
