"""Files that are written whole, by one process at a time; most are in the cache folder."""

import contextlib
import fcntl
import logging
import mmap
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import DataError

_LOG = logging.getLogger(__name__)
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"))


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file, made if need be; a dead process holds none.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems: processes then do the work twice
            _LOG.warning("%s: no file locks here (%s)", path, error)
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """`file_lock` in the cache folder.

    Raises:
        DataError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path))
        except OSError as error:
            raise unwritable(path.parent, error) from error
        yield


def unwritable(folder: Path, error: OSError) -> DataError:
    """What to raise where something cannot be kept in the cache folder."""
    reason = error.strerror or str(error)
    remedy = "make room or pass --data.cache_dir"
    return DataError(f"{folder}: the cache folder cannot be written: {reason}; {remedy}.")


def replace_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that readers, and whoever comes after a power failure, see the old or the
    new content, never a part."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.writelines(parts)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a complete file its name, when its content is on the disk; then the name is, too."""
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:  # some file systems cannot: the old name may come back
        _LOG.warning("%s: the folder cannot be synced (%s)", path.parent, error)
    finally:
        os.close(folder)


def checksum(handle: BinaryIO, num_bytes: int) -> int:
    """crc32 of the next bytes of a file, or of what there is of them; a block at a time.

    A mapped file that is checked like this is not all in this process's memory afterwards.
    """
    value = 0
    while num_bytes > 0 and (block := handle.read(min(num_bytes, 1 << 20))):
        value = zlib.crc32(block, value)
        num_bytes -= len(block)
    return value


def content_of(handle: BinaryIO, num_bytes: int) -> bytes | mmap.mmap:
    """The first bytes of a file; the place in it stays.

    On a local file system they are mapped, so that processes share the memory. On any other they
    are read: see `pipelines.shards`; there another machine may replace the file, too, and take away
    what is mapped of it.
    """
    if is_local(Path(handle.name).parent):
        return mmap.mmap(handle.fileno(), num_bytes, access=mmap.ACCESS_READ)
    place = handle.tell()
    handle.seek(0)
    content = handle.read(num_bytes)
    handle.seek(place)
    return content


def is_local(folder: Path) -> bool:
    """Whether a folder is known to be on a disk, or in the memory, of this machine."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # mount, parent, device, root, place, options, any number of fields, "-", type, ...
    types = {line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == wanted}
    return bool(types) and types <= _LOCAL


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
