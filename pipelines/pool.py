"""Threads that a blocked read cannot keep a process alive with, and processes beside this one."""

import ctypes
import queue
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


class ReadPool:
    """Runs functions on threads, first come, first served.

    concurrent.futures waits for its threads when the interpreter ends; one that hangs in a dead
    network file system would hold the process for ever. These threads are left behind.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._futures: set[Future[Any]] = set()
        self._threads = [
            threading.Thread(
                target=_work, args=(self._tasks,), name=f"accel-decode_{k}", daemon=True
            )
            for k in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """What the function returns or raises, once a thread has run it."""
        future: Future[_T] = Future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*arguments)
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)

        self._tasks.put(run)
        return future

    def close(self) -> None:
        """Cancel what has not begun and let the threads end; waits for none of them."""
        for future in list(self._futures):
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)


def _work(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # and what it holds, while waiting for the next one


def start_worker() -> None:
    """One thread each; Ctrl-C is the parent's business, and nobody outlives the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG
