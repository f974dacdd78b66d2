"""Keeping shards up to date with the videos that they are to hold."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pipelines.annotations import VideoRecord
from pipelines.cache import put_in_place
from pipelines.errors import MediaError
from pipelines.shards import Record, Shard, write_shard

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Named = tuple[str, VideoRecord]


def pack_shard(
    path: Path,
    videos: Sequence[Named],
    make: Callable[[Named], Record | str],
    *,
    pool: ThreadPoolExecutor,
    ahead: int,
    done: Callable[[], object],
) -> dict[str, bool | str]:
    """Make a shard hold these videos; it appears when it is complete and was read back.

    What an existing shard holds is taken from it, if its original has not changed since (or is
    gone).

    Args:
        path: of the shard.
        videos: (name in the shard, original).
        make: called in the pool; a video's record, or why there is none.
        pool: threads.
        ahead: records made before they are written.
        done: called after each video.

    Returns:
        name in the shard -> True: written; False: found; or why it is missing.

    Raises:
        MediaError: what was written cannot be read back.
        OSError: it cannot be written.
    """
    old = _existing(path)
    stamps = {  # before anything is read: what changes later is packed again the next time
        name: stamp
        for (name, _), stamp in zip(videos, map_ahead(pool, _stamp, videos, ahead), strict=True)
    }
    found = {
        name
        for name, stamp in stamps.items()
        if old is not None and name in old and stamp in ("", old.stamp(name))
    }
    if old is not None and found == set(old.names) == {name for name, _ in videos}:
        for _ in videos:
            done()
        return dict.fromkeys(found, False)
    results: dict[str, bool | str] = {}

    def take(video: Named) -> Record | str:
        if video[0] not in found:
            return make(video)
        assert old is not None
        try:
            return old.record(video[0])
        except MediaError:  # damaged since
            found.discard(video[0])
            return make(video)

    def records() -> Iterator[Record]:
        made = map_ahead(pool, take, videos, ahead)
        for (name, _), record in zip(videos, made, strict=True):
            results[name] = record if isinstance(record, str) else name not in found
            if not isinstance(record, str):
                yield record if name in found else replace(record, stamp=stamps[name])
            done()

    partial = path.with_name(f"{path.stem}.part-{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_shard(partial, records())
        changes = any(result is True for result in results.values())
        if old is None or changes or found != set(old.names):
            written = Shard(partial)
            for _ in map_ahead(
                pool, lambda name: len(written.record(name).content), written.names, ahead
            ):
                pass  # raises if the disk does not give back what was written
            put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return results


def _existing(path: Path) -> Shard | None:
    try:
        return Shard(path) if path.exists() else None
    except MediaError:  # of another version, or damaged: written anew
        return None


def stamp_of(record: VideoRecord) -> str:
    """Sixteen hex digits that change with what is listed of a video and with its files: their
    names, sizes and times. The time of a folder says nothing of files that are written anew, and
    whether a time is earlier than another says nothing of files that come with the times of others.

    Raises:
        OSError: it is gone.
    """
    path = record.path
    if path.is_dir():
        with os.scandir(path) as entries:
            found = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    else:
        found = [("", path.stat())]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    facts = repr((record.num_frames, record.offset, files)).encode()
    return hashlib.blake2b(facts, digest_size=8).hexdigest()


def _stamp(video: Named) -> str:
    try:
        return stamp_of(video[1])
    except OSError:
        return ""  # the original is gone; what was packed of it stays


def map_ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    ahead: int,
) -> Iterator[_Result]:
    """As `pool.map`, with at most `ahead` results that nobody has taken yet."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
