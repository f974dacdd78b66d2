"""Long lists, parsed once: columns in a file that processes take up instead of parsing again."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.annotations import VideoSet
from pipelines.cache import checksum, content_of, replace_bytes

_LOG = logging.getLogger(__name__)
_MAGIC = b"accel list 1\n"
_FEWEST_BYTES = 1 << 20
"""Shorter lists are parsed in less time than it takes to keep a cache of them in order."""


def cached_list(
    path: Path, *, cache_dir: Path, facts: str, build: Callable[[], VideoSet]
) -> VideoSet:
    """What `build` makes of a list file; from the cache if it has made that of these bytes before.

    Nothing is read line by line. Where the cache is on a local disk, the columns are mapped, so
    processes of a machine share their memory (`content_of`).

    Args:
        path: the list; its content is part of the key.
        cache_dir: where the columns are kept.
        facts: everything else that the result depends on.
        build: makes the videos; only what it returns is kept, never an error.

    Raises:
        AnnotationError: from `build`.
    """
    try:
        if path.stat().st_size < _FEWEST_BYTES:
            return build()
        key = _digest(path, facts)
    except OSError:
        return build()  # says what is wrong
    file = cache_dir / "lists" / f"{key}.list"
    videos = _load(file)
    if videos is None:
        videos = build()
        try:
            _store(file, videos)
        except OSError as error:
            _LOG.warning("%s: the parsed list cannot be kept (%s)", file, error)
    return videos


def _digest(path: Path, facts: str) -> str:
    digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape"))
    with path.open("rb", buffering=0) as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _store(file: Path, videos: VideoSet) -> None:
    """Magic, checksum of the rest, a line of JSON up to a multiple of 8 bytes, the columns."""
    ends, numbers, names = videos.columns
    columns = [view.cast("B") for view in (ends.data, numbers.data, names)]
    head = {
        "root": os.fsencode(videos.root).hex(),
        "rows": len(videos),
        "fingerprint": videos.fingerprint,
        "digest": videos.digest,
    }
    line = json.dumps(head).encode()
    line += b" " * (-(len(_MAGIC) + 9 + len(line) + 1) % 8) + b"\n"
    crc = zlib.crc32(line)
    for column in columns:
        crc = zlib.crc32(column, crc)
    replace_bytes(file, [_MAGIC, b"%08x\n" % crc, line, *map(bytes, columns)])


def _load(file: Path) -> VideoSet | None:
    """The videos of a cache file; None = there is none that can be used."""
    try:
        with file.open("rb") as handle:
            if handle.readline() != _MAGIC:
                raise ValueError("another version")
            expected, begin = int(handle.readline(), 16), handle.tell()
            size_bytes = os.fstat(handle.fileno()).st_size
            if checksum(handle, size_bytes) != expected:
                raise ValueError("cut off or damaged")
            handle.seek(begin)
            head = json.loads(handle.readline())
            start = handle.tell()
            content = content_of(handle, size_bytes)
        rows = head["rows"]
        ends = np.frombuffer(content, np.int64, rows + 1, start)
        numbers = np.frombuffer(content, np.int32, 3 * rows, start + ends.nbytes)
        names = memoryview(content)[start + ends.nbytes + numbers.nbytes :]
        root = Path(os.fsdecode(bytes.fromhex(head["root"])))
        videos = VideoSet.of_columns(root, ends, numbers.reshape(-1, 3), names)
        videos.fingerprint, videos.digest = head["fingerprint"], head["digest"]
        return videos
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s: ignoring an unreadable list cache (%s)", file, error)
        return None
