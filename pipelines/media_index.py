"""The index of a set of videos: what is in each file, from a cache where nothing has changed.

One row of fixed size per file, and packet tables that are read when a sample needs them: a set of
10^6 videos costs 10^6 rows of memory and no opened file.
"""

import functools
import hashlib
import json
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pipelines.annotations import VideoRecord, VideoSet
from pipelines.cache import checksum, content_of, locked, replace_bytes
from pipelines.errors import DataError, MediaError
from pipelines.images import find_frame_name
from pipelines.media import MediaInfo, StreamKind
from pipelines.packets import PacketTable, media_file
from pipelines.shards import Shard, probe_record, shard_opener

_LOG = logging.getLogger(__name__)
_MAGIC = b"accel media index 3\n"
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
_STAMPS_CHECKED = 100_000
"""Larger sets are not looked at file by file when a run starts: a file that has changed is found
when it is read."""


# What is known of each path (by hash), and the time stamp that goes with it.
_Results = dict[int, tuple[MediaInfo, int]]
_Problems = dict[int, str]  # of a path (by hash)
_Content = tuple[npt.NDArray[Any], list[StreamKind], _Problems]


class MediaIndex(Sequence[MediaInfo]):
    """What is in each file of a list, in its order; tables are read from disk when asked for."""

    def __init__(
        self,
        path: Path,
        rows: npt.NDArray[Any],
        kinds: Sequence[StreamKind],
        problems: _Problems | None = None,
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


def index_videos(
    videos: VideoSet,
    *,
    cache_dir: Path,
    threads: int,
    progress: bool = True,
    frame_name: str = "",
    tolerated: int = 0,
) -> MediaIndex:
    """The index of every video, in order; from the cache where size and time are unchanged.

    Args:
        videos: files, or folders of frames.
        cache_dir: where indices are kept.
        threads: that open files.
        progress: show a bar, if stderr is a terminal.
        frame_name: names of the files in folders of frames; "" = as in the first folder.
        tolerated: how many files may be unusable: then the index names them (`problems`). They are
            looked at again with every call.

    Raises:
        MediaError: one file cannot be used.
        DataError: several cannot; the message counts them and names the first three reasons.
    """
    name = hashlib.sha256(f"{videos.digest} {frame_name}".encode()).hexdigest()
    cache_path = cache_dir / "media" / f"{name}.index"
    with locked(cache_path.with_suffix(".lock")):  # other ranks wait for the first one's work
        cached = _read(cache_path, len(videos))
        if (
            cached is None
            or (len(videos) <= _STAMPS_CHECKED and _changed(cached[0], videos))
            or _repaired(cached, videos, frame_name, tolerated)
        ):
            _probe_missing(videos, cached, cache_path, threads, progress, frame_name, tolerated)
            cached = _read(cache_path, len(videos))
            assert cached is not None
        return MediaIndex(cache_path, *cached)


def _stamp(name: str) -> tuple[int, int]:
    try:
        stat = os.stat(media_file(Path(name)))
    except (OSError, ValueError):
        return -1, -1  # probe() says why
    return stat.st_size, stat.st_mtime_ns


def _changed(rows: npt.NDArray[Any], videos: VideoSet) -> bool:
    stamps = zip(rows["size_bytes"].tolist(), rows["time_ns"].tolist(), strict=True)
    pairs = zip(videos, stamps, rows["num_frames"].tolist(), strict=True)
    return any(_stamp(os.fspath(record.path)) != stamp for record, stamp, frames in pairs if frames)


def _repaired(cached: _Content, videos: VideoSet, frame_name: str, tolerated: int) -> bool:
    """Whether a file that could not be used can be now, or there are too many of them."""
    rows, kinds, problems = cached
    bad = np.flatnonzero(rows["num_frames"] == 0).tolist()
    frame_name = frame_name or next((kind.frame_name for kind in kinds), "")
    open_shard = shard_opener()
    found = (_probed(videos[k], frame_name, open_shard) for k in bad)
    return len(problems) > tolerated or any(not isinstance(o, MediaError) for o in found)


def _path_hash(record: VideoRecord) -> int:
    facts = f"{record.path} {record.num_frames} {record.offset}"
    encoded = facts.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _probe_missing(
    videos: VideoSet,
    cached: _Content | None,
    cache_path: Path,
    threads: int,
    progress: bool,
    frame_name: str,
    tolerated: int,
) -> None:
    """Write an index of all files; those known under the same size and time are not opened."""
    known = dict(_known(cache_path, cached))
    results: _Results = {}
    missing: dict[int, VideoRecord] = {}
    for record in videos:
        key = _path_hash(record)
        stamp = _stamp(os.fspath(record.path))
        info = known.get((key, *stamp)) if known else None
        if info is not None:
            results[key] = (info, stamp[1])
        else:
            missing[key] = record
    _LOG.info("indexing %d of %d videos", len(missing), len(videos))
    frame_name = frame_name or _frame_name(videos[: 1 + tolerated])
    failures = _probe_all(missing, results, threads, progress, frame_name)
    partial = cache_path.with_suffix(".partial")
    if len(failures) > tolerated:
        _write(partial, list(results), results)
        _raise_failures(list(failures.values()), len(videos), tolerated)
    problems = {
        key: f"{error.path.name}: " * (error.path != missing[key].path) + error.problem
        for key, error in failures.items()
    }
    _write(cache_path, [_path_hash(record) for record in videos], results, problems)
    partial.unlink(missing_ok=True)


def _frame_name(videos: Sequence[VideoRecord]) -> str:
    """Names of the files in the first folder that has some; "" = these are no folders."""
    problem: MediaError | None = None
    for record in videos:
        if record.path.is_dir():
            try:
                return find_frame_name(record.path)
            except MediaError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    return ""


def _known(
    cache_path: Path, cached: _Content | None
) -> Iterator[tuple[tuple[int, int, int], MediaInfo]]:
    """What this list's index, or an attempt at it that failed, says: (path, stamp) -> info."""
    partial = cache_path.with_suffix(".partial")
    for path, content in ((partial, _read(partial)), (cache_path, cached)):
        if content is not None:
            index = MediaIndex(path, *content)
            keys = content[0][["path", "size_bytes", "time_ns"]].tolist()
            yield from ((key, index[k]) for k, key in enumerate(keys) if k not in index.problems)


def _probe_all(
    missing: dict[int, VideoRecord],
    results: _Results,
    threads: int,
    progress: bool,
    frame_name: str,
) -> dict[int, MediaError]:
    """Fills `results`; path hash -> why a file cannot be used, in two attempts."""
    failures = {}
    open_shard = shard_opener()
    hidden = not progress or not sys.stderr.isatty()
    with ThreadPoolExecutor(threads, thread_name_prefix="accel-index") as pool:
        outcomes = pool.map(
            lambda record: _probed(record, frame_name, open_shard), missing.values()
        )
        bar = tqdm(outcomes, total=len(missing), desc="indexing", unit="file", disable=hidden)
        for key, outcome in zip(missing, bar, strict=True):
            if isinstance(outcome, MediaError):
                failures[key] = outcome
            else:
                results[key] = outcome
        second = [missing[key] for key in failures]  # network disks have moments
        outcomes = pool.map(lambda record: _probed(record, frame_name, open_shard), second)
        for key, outcome in zip(list(failures), outcomes, strict=True):
            if not isinstance(outcome, MediaError):
                results[key] = outcome
                del failures[key]
    return failures


def _probed(
    record: VideoRecord, frame_name: str, open_shard: Callable[[Path], Shard]
) -> tuple[MediaInfo, int] | MediaError:
    """What is in a file, and its time stamp."""
    time_ns = _stamp(os.fspath(record.path))[1]  # before the file is read: later ones are seen
    try:
        return probe_record(record, frame_name, open_shard), time_ns
    except MediaError as error:
        return error


def _raise_failures(failures: list[MediaError], total: int, tolerated: int) -> None:
    if len(failures) == 1:
        raise failures[0]
    if failures:
        counts = Counter(str(failure) for failure in failures)  # all of a faulty shard say the same
        named = " | ".join(
            f"{reason} ({count} videos)" if count > 1 else reason
            for reason, count in list(counts.items())[:3]
        )
        more = " | ..." if len(counts) > 3 else ""
        raise DataError(
            f"{len(failures)} of {total} videos cannot be used, allowed {tolerated} "
            f"(data.max_bad_fraction): {named}{more}"
        )


def _write(
    path: Path, keys: Sequence[int], results: _Results, problems: _Problems | None = None
) -> None:
    """Magic, place of the tables (8 bytes), kinds and problems as JSON, rows, tables."""
    problems = problems or {}
    rows = np.zeros(len(keys), _ROW)
    kinds: dict[StreamKind, int] = {}
    tables: list[bytes] = []
    place = 0
    written: dict[int, Any] = {}
    for number, key in enumerate(keys):
        if key in problems:
            rows[number] = (key, -1, -1, 0, 0, 0, -1, 0, 0, 0)
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
    head_facts = {
        "rows": len(rows),
        "checksum": zlib.crc32(rows.tobytes()),
        "kinds": [astuple(k) for k in kinds],
        "problems": {str(key): problem for key, problem in problems.items()},
    }
    head = json.dumps(head_facts).encode() + b"\n"
    tables_at = len(_MAGIC) + 8 + len(head) + rows.nbytes
    replace_bytes(path, [_MAGIC, tables_at.to_bytes(8, "little"), head, rows.tobytes(), *tables])


def _read(path: Path, num_rows: int | None = None) -> _Content | None:
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
