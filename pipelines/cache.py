"""Files in the cache folder: written whole, by one process at a time."""

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.errors import DataError

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, made if need be; a dead process holds none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{path.parent}: the cache folder cannot be written: {reason}; pass --data.cache_dir."
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems: processes then do the work twice
            _LOG.warning("%s: no file locks here (%s)", path, error)
        yield


def replace_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.writelines(parts)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
