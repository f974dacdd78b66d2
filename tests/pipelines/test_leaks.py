"""What a long run must not gather: memory, files, threads.

Rows M1 and M2 of the fault matrix.
"""

import gc
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.datasets import Dataset
from pipelines.loader import Loader


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_grows(
    dozen: Dataset, open_loader: Callable[..., Loader], faulty: Any, decoder: str
) -> None:
    """M1: 60 epochs, every third with a decoder that is built anew, every fifth left early."""
    loader = open_loader(dozen, decoder=decoder, threads=1)

    def run(epochs: range) -> None:
        for epoch in epochs:
            faulty({2: faulty.fail} if epoch % 3 == 0 else {})
            batches = loader.epoch(epoch)
            for _ in range(2 if epoch % 5 == 0 else 9):
                next(batches, None)
            assert faulty.built >= (epoch % 3 == 0)

    run(range(20))  # pools, caches and arenas fill
    gc.collect()
    files, threads, memory = open_files(), threading.active_count(), resident_bytes()
    run(range(20, 60))
    gc.collect()
    deadline = time.monotonic() + 5  # threads that were told to end
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_files() <= files and threading.active_count() <= threads
    assert resident_bytes() - memory < 12 << 20  # 40 epochs; one leaked group is 0.6 MB
    loader.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
