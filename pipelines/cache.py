"""Files in the cache folder: written whole, by one process at a time."""

import contextlib
import fcntl
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

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


def checksum(handle: BinaryIO, num_bytes: int) -> int:
    """crc32 of the next bytes of a file, or of what there is of them; a block at a time.

    A mapped file that is checked like this is not all in this process's memory afterwards.
    """
    value = 0
    while num_bytes > 0 and (block := handle.read(min(num_bytes, 1 << 20))):
        value = zlib.crc32(block, value)
        num_bytes -= len(block)
    return value


def write_once(root: Path, write: Callable[[Path], None]) -> None:
    """Make a folder that does not exist yet: complete or not at all; others wait for the first.

    Args:
        root: the folder.
        write: fills the folder of that path, which it makes.

    Raises:
        DataError: the folder cannot be written.
    """
    if root.is_dir():
        return
    with locked(root.with_name(f"{root.name}.lock")):
        if root.is_dir():
            return
        for left_over in root.parent.glob(f"{root.name}.tmp-*"):  # of a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        partial = root.with_name(f"{root.name}.tmp-{uuid.uuid4().hex}")
        try:
            write(partial)
            partial.rename(root)
        except OSError as error:
            raise DataError(f"{root}: the set cannot be written: {error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
