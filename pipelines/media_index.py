"""The index of a set of videos: what is in each file, from a cache where nothing has changed."""

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.annotations import VideoRecord, VideoSet
from pipelines.cache import locked
from pipelines.errors import MediaError, too_many_unusable
from pipelines.images import first_frame_name
from pipelines.in_flight import InFlight, alone_s, find_harmful, left_behind
from pipelines.index_file import (
    Content,
    MediaIndex,
    Results,
    Stamp,
    read_index,
    stamp_in,
    write_index,
)
from pipelines.media import MediaInfo
from pipelines.packets import media_file
from pipelines.progress import progress_bar
from pipelines.shards import Shard, probe_record, shard_opener

_LOG = logging.getLogger(__name__)
_STAMPS_CHECKED = 100_000
"""Larger sets are not looked at file by file when a run starts: a file that has changed is found
when it is read."""


def index_videos(
    videos: VideoSet,
    *,
    cache_dir: Path,
    threads: int,
    progress: bool = True,
    frame_name: str = "",
    tolerated: int = 0,
    timeout_s: float = 300.0,
) -> MediaIndex:
    """The index of every video, in order; from the cache where size and time are unchanged.

    Args:
        videos: files, or folders of frames.
        cache_dir: where indices are kept.
        threads: that open files.
        progress: say how far it is.
        frame_name: names of the files in folders of frames; "" = as in the first folder.
        tolerated: how many files may be unusable: then the index names them (`problems`). They are
            looked at again with every call, except files that kill their reader.
        timeout_s: longest look at a file that a process was reading when it died.

    Raises:
        MediaError: one file cannot be used.
        DataError: several cannot; see `too_many_unusable`.
    """
    cache_path = index_path(videos, cache_dir, frame_name)
    with locked(cache_path.with_suffix(".lock")):  # other ranks wait for the first one's work
        cached = read_index(cache_path, len(videos))
        if (
            cached is None
            or (len(videos) <= _STAMPS_CHECKED and _changed(cached[0], videos))
            or _repaired(cached, videos, frame_name, tolerated)
        ):
            _probe_missing(
                videos, cached, cache_path, threads, progress, frame_name, tolerated, timeout_s
            )
            cached = read_index(cache_path, len(videos))
            assert cached is not None
        return MediaIndex(cache_path, *cached)


def index_path(videos: VideoSet, cache_dir: Path, frame_name: str = "") -> Path:
    """Where the index of a list is kept."""
    name = hashlib.sha256(f"{videos.digest} {frame_name}".encode()).hexdigest()
    return cache_dir / "media" / f"{name}.index"


def stamp_of(record: VideoRecord) -> Stamp:
    """Of the file as it is now."""
    try:
        stat = os.stat(media_file(record.path))
    except (OSError, ValueError):
        return -1, -1  # probe() says why
    return stat.st_size, stat.st_mtime_ns


def _changed(rows: npt.NDArray[Any], videos: VideoSet) -> bool:
    stamps = zip(rows["size_bytes"].tolist(), rows["time_ns"].tolist(), strict=True)
    pairs = zip(videos, stamps, rows["num_frames"].tolist(), strict=True)
    return any(stamp_of(record) != stamp for record, stamp, frames in pairs if frames)


def _repaired(cached: Content, videos: VideoSet, frame_name: str, tolerated: int) -> bool:
    """Whether a file that could not be used can be now, or there are too many of them."""
    rows, kinds, problems = cached
    frame_name = frame_name or next((kind.frame_name for kind in kinds), "")
    open_shard = shard_opener()

    def is_repaired(place: int) -> bool:
        if _is_harmful(rows[place]):
            return stamp_of(videos[place]) != stamp_in(rows[place])
        return not isinstance(_probed(videos[place], frame_name, open_shard), MediaError)

    bad = np.flatnonzero(rows["num_frames"] == 0).tolist()
    return len(problems) > tolerated or any(map(is_repaired, bad))


def _is_harmful(row: Any) -> bool:
    """Whether nobody may read the file as it is: the stamps of other problems are not kept."""
    return not row["num_frames"] and stamp_in(row) != (-1, -1)


def _path_hash(record: VideoRecord) -> int:
    facts = f"{record.path} {record.num_frames} {record.offset}"
    encoded = facts.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _probe_missing(
    videos: VideoSet,
    cached: Content | None,
    cache_path: Path,
    threads: int,
    progress: bool,
    frame_name: str,
    tolerated: int,
    timeout_s: float,
) -> None:
    """Write an index of all files; those known under the same size and time are not opened."""
    known = dict(_known(cache_path, cached))
    results: Results = {}
    missing: dict[int, VideoRecord] = {}
    harmful: dict[int, MediaError] = {}
    stamps: dict[int, Stamp] = {}
    for record in videos:
        key = _path_hash(record)
        stamp = stamp_of(record)
        fact = known.get((key, *stamp)) if known else None
        if isinstance(fact, str):
            harmful[key], stamps[key] = MediaError(record.path, fact), stamp
        elif fact is not None:
            results[key] = (fact, stamp[1])
        else:
            missing[key] = record
    _LOG.info("indexing %d of %d videos", len(missing), len(videos))
    frame_name = frame_name or first_frame_name(videos[: 1 + tolerated])
    left = list(left_behind(cache_path.parent, f"{cache_path.stem}.probing"))
    suspects = {k: missing[k] for _, content in left for k in content or () if k in missing}
    for key, problem in _examined(suspects, frame_name, timeout_s).items():
        record = missing.pop(key)
        harmful[key], stamps[key] = MediaError(record.path, problem), stamp_of(record)
    for path, _ in left:
        path.unlink(missing_ok=True)
    failures = _probe_all(missing, results, threads, progress, frame_name, cache_path)
    failures |= harmful
    partial = cache_path.with_suffix(".partial")
    if len(failures) > tolerated:
        known_bad = {key: error.problem for key, error in harmful.items()}
        write_index(partial, [*results, *harmful], results, known_bad, stamps)
        raise too_many_unusable(list(failures.values()), total=len(videos), tolerated=tolerated)
    problems = {
        key: f"{error.path.name}: " * (key in missing and error.path != missing[key].path)
        + error.problem
        for key, error in failures.items()
    }
    write_index(cache_path, [_path_hash(record) for record in videos], results, problems, stamps)
    partial.unlink(missing_ok=True)


def _examined(
    suspects: dict[int, VideoRecord], frame_name: str, timeout_s: float
) -> dict[int, str]:
    """Those that kill the process which probes them, or hold it for ever, and how."""
    if not suspects:
        return {}
    _LOG.info("a process died while it indexed %d videos; each is probed alone", len(suspects))
    task = functools.partial(_probe_each, frame_name)
    found = find_harmful(task, list(suspects.values()), timeout_s=alone_s(timeout_s))
    keys = list(suspects)
    return {keys[number]: end.what for number, end in found.items()}


def _probe_each(
    frame_name: str, records: Sequence[VideoRecord], report: Callable[[int], None]
) -> None:
    open_shard = shard_opener()
    for number, record in enumerate(records):
        report(number)
        _probed(record, frame_name, open_shard)


def _known(
    cache_path: Path, cached: Content | None
) -> Iterator[tuple[tuple[int, int, int], MediaInfo | str]]:
    """What this list's index, or an attempt at it that failed, says: (path, stamp) -> info, or why
    nobody may read the file."""
    partial = cache_path.with_suffix(".partial")
    for path, content in ((partial, read_index(partial)), (cache_path, cached)):
        if content is not None:
            index = MediaIndex(path, *content)
            keys = content[0][["path", "size_bytes", "time_ns"]].tolist()
            for k, key in enumerate(keys):
                if k not in index.problems:
                    yield key, index[k]
                elif _is_harmful(content[0][k]):
                    yield key, index.problems[k]


def _probe_all(
    missing: dict[int, VideoRecord],
    results: Results,
    threads: int,
    progress: bool,
    frame_name: str,
    cache_path: Path,
) -> dict[int, MediaError]:
    """Fills `results`; path hash -> why a file cannot be used, in two attempts."""
    failures: dict[int, MediaError] = {}
    open_shard = shard_opener()
    in_flight = InFlight(cache_path.parent, f"{cache_path.stem}.probing")
    probing: set[int] = set()
    lock = threading.Lock()

    def probe(key: int) -> tuple[MediaInfo, int] | MediaError:
        with lock:
            probing.add(key)
            in_flight.write(list(probing))
        outcome = _probed(missing[key], frame_name, open_shard)
        with lock:
            probing.discard(key)
        return outcome

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="accel-index") as pool:
            outcomes = pool.map(probe, missing)
            with progress_bar(len(missing), "indexing", "file", show=progress) as bar:
                for key, outcome in zip(missing, outcomes, strict=True):
                    if isinstance(outcome, MediaError):
                        failures[key] = outcome
                    else:
                        results[key] = outcome
                    bar.update()
            second = list(failures)  # network disks have moments
            for key, outcome in zip(second, pool.map(probe, second), strict=True):
                if not isinstance(outcome, MediaError):
                    results[key] = outcome
                    del failures[key]
    except BaseException:  # Ctrl-C is how one ends an indexing that hangs
        in_flight.keep()
        raise
    in_flight.remove()
    return failures


def _probed(
    record: VideoRecord, frame_name: str, open_shard: Callable[[Path], Shard]
) -> tuple[MediaInfo, int] | MediaError:
    """What is in a file, and its time stamp."""
    time_ns = stamp_of(record)[1]  # before the file is read: later ones are seen
    try:
        return probe_record(record, frame_name, open_shard), time_ns
    except MediaError as error:
        return error
