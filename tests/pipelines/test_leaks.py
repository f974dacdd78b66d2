"""What a long run must not gather: memory, files, threads.

Rows M1 and M2 of the fault matrix.
"""

import gc
import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.datasets import Dataset
from pipelines.errors import MediaError
from pipelines.loader import Loader
from pipelines.media import probe

HMDB = Path(__file__).parents[1] / "data" / "hmdb51"


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


def growth(samples: Sequence[tuple[int, int]]) -> float:
    """MB per 1 000 steps: least squares over (step, resident bytes)."""
    steps, memory = np.array(samples, float).T
    return float(np.polyfit(steps, memory, 1)[0]) * 1000 / 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder", [pytest.param("dali", marks=pytest.mark.needs_dali_video), "torch"]
)
def test_memory_of_a_long_run(
    dozen: Dataset, open_loader: Callable[..., Loader], decoder: str
) -> None:
    """M1: after a warm-up, resident memory stays within 1 MB per 1 000 steps, files are as many."""
    loader = open_loader(dozen, decoder=decoder, threads=1, micro_batch=4)
    samples, files, step = [], set(), 0
    for epoch in range(500):
        for _ in loader.epoch(epoch):
            step += 1
        if epoch >= 200:
            samples.append((step, resident_bytes()))
            files.add(open_files())
    assert step == 1500 and len(files) == 1
    assert growth(samples) < 1.0, samples[:: len(samples) // 10]


@pytest.mark.slow
def test_opening_and_closing_2000_videos(tmp_path: Path) -> None:
    """M1: of which every fourth cannot be used."""
    paths = [*sorted(HMDB.glob("*.mp4"))[:2], sorted(HMDB.glob("*.webm"))[0]]
    damaged = tmp_path / "cut.mp4"
    damaged.write_bytes(paths[0].read_bytes()[:-5000])
    samples, files = [], set()
    for number, path in enumerate(itertools.islice(itertools.cycle([*paths, damaged]), 2000)):
        if path == damaged:
            with pytest.raises(MediaError):
                probe(path)
        else:
            probe(path)
        if number >= 500 and number % 10 == 0:
            samples.append((number, resident_bytes()))
            files.add(open_files())
    assert len(files) == 1
    assert growth(samples) < 1.0, samples[:: len(samples) // 10]
