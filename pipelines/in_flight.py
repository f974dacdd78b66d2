"""What is being read at the moment, in a file that outlives its process; and who was to blame.

A segmentation fault in a codec, or a read that never returns, leaves no Python code to say which
video it was. So the videos in flight stand in a small file, locked by its process. Whoever finds
one without an owner reads each of its videos once more, alone, in a process that may die.
"""

import contextlib
import fcntl
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

from pipelines.pool import start_worker

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_START_S = 120.0  # for a process to import what it needs, on a busy machine
_MOST_HANGS = 3  # in a row are the fault of the storage, not of the videos
_GUILTY = frozenset(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
)

Task = Callable[[Sequence[_T], Callable[[int], None]], None]
"""Reads items one after the other, telling the number of each before; raises for none of them."""


class InFlight:
    """A file `<stem>.reading-*` beside others, of which only the last content counts.

    Args:
        folder: where it is kept; made with the first content.
        stem: first part of its name, common to all that may be examined together.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._file: int | None = None
        self._path: Path | None = None
        self._usable = True
        self._lock = threading.Lock()
        self.content: Any = None
        """What was written last."""

    def write(self, content: Any) -> None:
        """Replace the content by something that JSON can hold; an empty one = nothing."""
        with self._lock:
            self.content = content
            self._write(content)

    def _write(self, content: Any) -> None:
        if self._file is None and content:
            self._open()
        if self._file is None:
            return
        # One line: what is left of a longer one behind it does not count, and to cut it off would
        # wait for a network disk. Not synced either: this is about the end of a process, not of the
        # machine.
        line = json.dumps(content).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk is no reason to end
            os.pwrite(self._file, line, 0)

    def keep(self) -> None:
        """Leave the file behind, as a dead process does; later contents go into another one."""
        with self._lock:
            self._close()

    def remove(self) -> None:
        """Remove the file: whatever was read has been read."""
        with self._lock:
            path = self._path
            self._close()
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = self._path = None

    def _open(self) -> None:
        if not self._usable:
            return
        name = uuid.uuid4().hex
        temporary = self._folder / f"{self._stem}.tmp-{name}"
        handle = None
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before anybody can find it
            self._path = self._folder / f"{self._stem}.reading-{name}"
            temporary.rename(self._path)
            self._file = handle
        except OSError as error:  # no locks here, or a folder that cannot be written
            self._usable, self._path = False, None
            _LOG.debug("%s: what is being read is not recorded (%s)", self._folder, error)
            if handle is not None:
                os.close(handle)
            with contextlib.suppress(OSError):
                temporary.unlink()


def left_behind(folder: Path, stem: str) -> Iterator[tuple[Path, Any]]:
    """The files of processes that ended without removing theirs, and their contents."""
    for path in sorted(folder.glob(f"{stem}.reading-*")):
        with contextlib.suppress(OSError), path.open("r+b") as handle:  # NFS locks ask for that
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                content = json.loads(handle.readline() or b"null")
            except BlockingIOError:  # its process lives
                continue
            except ValueError:
                content = None
            yield path, content


@dataclass(frozen=True)
class End:
    """How a process ended that was not done."""

    what: str
    """As one says it of the video that it was reading."""

    guilty: bool
    """Whether the video did it, and not somebody else."""

    hung: bool = False


def find_harmful(task: Task[_T], items: Sequence[_T], *, timeout_s: float | None) -> dict[int, End]:
    """Which items kill the process that reads them, or do not come back: number -> what they do.

    An item is guilty if it is the first that its process reads: a crash may be the late one of an
    item before. One that does not come back is waited for twice: a job may be suspended for a
    while. Several of these in a row are the fault of the storage, and none of them is named.

    Args:
        task: reads them; a function of a module, or a partial of one.
        items: that can be pickled.
        timeout_s: longest wait for one item; None = as long as it takes.
    """
    found: dict[int, End] = {}
    first = in_a_row = 0
    again: set[int] = set()
    while first < len(items):
        current = first - 1
        end: End | None = None
        for message in messages(_read_all, (task, items[first:]), timeout_s=timeout_s):
            if isinstance(message, End):
                end = message
            else:
                current = first + message
        if end is None:
            break
        if current < first:
            _LOG.warning("the process that examines videos does not work: %s", end.what)
            break
        if (end.hung or current > first) and current not in again:
            again.add(current)
            first = current
            continue
        if end.guilty:
            found[current] = end
        follows = current - 1 in found and found[current - 1].hung
        in_a_row = in_a_row * follows + 1 if end.hung else 0
        if in_a_row == _MOST_HANGS:
            _LOG.warning("%d videos in a row are not read in time: that is the storage", in_a_row)
            return {k: each for k, each in found.items() if k <= current - in_a_row}
        first = current + 1
    return found


def alone_s(timeout_s: float) -> float:
    """How long to wait for one video alone, if a run waits `timeout_s` for a batch: long enough for
    a new process to import, and not so long that other ranks give up (`run.timeout_s`)."""
    return min(max(timeout_s, 5.0), 60.0)


def messages(
    function: Callable[..., None], arguments: tuple[Any, ...], *, timeout_s: float | None
) -> Iterator[Any]:
    """What a function sends from a process of its own; last an `End`, if it does not return.

    Args:
        function: of a module; called with a function that sends, and with the arguments.
        arguments: that can be pickled.
        timeout_s: longest wait between two messages; None = as long as it takes.
    """
    receiver, sender = Pipe(duplex=False)
    # Not multiprocessing's own: that runs the main script again, and a process that is itself a
    # worker may not have one.
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(sender.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[sender.fileno()],
    )
    sender.close()
    wait_s = None if timeout_s is None else max(timeout_s, _START_S)
    try:
        assert process.stdin is not None
        with process.stdin as stream:
            pickle.dump(sys.path, stream)
            pickle.dump((function, arguments), stream)
        while receiver.poll(wait_s):
            message = receiver.recv()
            if message is None:
                return
            yield message
            wait_s = timeout_s
        if wait_s != timeout_s:
            yield End(f"nothing came from it within {wait_s:g} s", guilty=False)
        else:
            yield End(f"hangs: not read within {timeout_s:g} s", guilty=True, hung=True)
    except (EOFError, OSError):  # nothing more, or half a message
        code = process.wait()
        if -code in _GUILTY:
            name = signal.Signals(-code).name
            yield End(f"kills the process that reads it ({name})", guilty=True)
        else:
            _LOG.warning("a process that looks at videos ended with exit code %d", code)
            yield End(f"the process that reads it ended with exit code {code}", guilty=False)
    finally:
        process.kill()
        process.wait()
        receiver.close()


_SERVE = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)  # of its own parent
from pipelines.in_flight import serve
serve(int(sys.argv[1]))
"""


def serve(descriptor: int) -> None:
    """The process at the other end of `messages`: what it reads comes from its own parent."""
    function, arguments = pickle.load(sys.stdin.buffer)
    start_worker()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sender = Connection(descriptor, readable=False)
    function(sender.send, *arguments)
    sender.send(None)


def _read_all(send: Callable[[int], None], task: Task[_T], items: Sequence[_T]) -> None:
    task(items, send)
