"""Decoders and storage that fail: nothing is lost, the cause is named.

Rows D4 and D5 of the fault matrix.
"""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import recovery
from pipelines.datasets import Dataset
from pipelines.decoders import DecoderPlan
from pipelines.errors import DataError
from pipelines.loader import Batch, Loader
from pipelines.source import Sample

MakeVideo = Callable[..., Path]
OpenLoader = Callable[..., Loader]
Facts = Callable[[Sequence[Batch]], list[tuple[list[int], list[int], list[int]]]]


@pytest.mark.parametrize("fault", ["fail", "lose_frames"])
def test_a_failed_decoder_is_built_anew_and_no_batch_is_lost(
    dozen: Dataset,
    open_loader: OpenLoader,
    facts: Facts,
    faulty: Any,
    decoder: str,
    fault: str,
) -> None:
    """D4: the same batches in the same order, nothing in the quarantine."""
    loader = open_loader(dozen, decoder=decoder, threads=1)
    expected = facts(list(loader.epoch(0)))
    loader.close()
    change = getattr(faulty, fault)
    faulty({2: change, 4: change, 5: change})  # the second one twice in a row
    assert facts(list(loader.epoch(0))) == expected
    assert faulty.built == 1 + 3 and not len(loader.quarantine)
    loader.close()


def test_a_decoder_that_always_fails_ends_the_run(
    dozen: Dataset, open_loader: OpenLoader, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(dozen)
    monkeypatch.setattr(recovery.GroupDecoder, "_decode_alone", lambda self, sample: None)
    faulty(dict.fromkeys(range(100), faulty.fail))
    with pytest.raises(
        DataError, match=r"failed 4 times in a row on the samples .*no longer valid"
    ):
        list(loader.epoch(0))
    assert faulty.built == 1 + 4


def test_a_sample_that_only_the_decoder_refuses_is_found(
    dozen: Dataset,
    open_loader: OpenLoader,
    facts: Facts,
    monkeypatch: pytest.MonkeyPatch,
    decoder: str,
) -> None:
    """Every file can be read by PyAV; the decoder fails on whatever group has number 6."""
    loader = open_loader(dozen, decoder=decoder)
    healthy = facts(list(loader.epoch(0)))
    loader.close()
    build = DecoderPlan.build

    class Picky:
        def __init__(self, inner: Any) -> None:
            self._inner, self._refused, self.close = inner, [], inner.close

        def submit(self, samples: Sequence[Sample]) -> Any:
            results = self._inner.submit(samples)
            if any(sample.sample_id == 6 for sample in samples):
                self._refused.append(results)
            return results

        def finish(self, submitted: Any) -> torch.Tensor:
            if any(submitted is results for results in self._refused):
                raise RuntimeError("unsupported profile")
            return self._inner.finish(submitted)

    monkeypatch.setattr(DecoderPlan, "build", lambda plan, name: Picky(build(plan, name)))
    got = facts(list(loader.epoch(0)))
    (entry,) = loader.quarantine.entries
    assert entry.sample_id == 6 and "unsupported profile" in entry.reason
    changed = [k for k in range(6) if got[k] != healthy[k]]
    assert len(changed) == 1 and 6 in healthy[changed[0]][0]
    loader.close()


@pytest.mark.parametrize(
    ("replace", "part"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "the file was changed"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "Invalid data"),
        (lambda path: (path.unlink(), path.mkdir()), "the file was changed"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links"),
    ],
)
def test_a_file_that_is_replaced_during_the_run(
    dozen: Dataset,
    open_loader: OpenLoader,
    facts: Facts,
    decoder: str,
    replace: Callable[[Path], object],
    part: str,
) -> None:
    """D5: by one of another size, by other content of the same size, by what is no file."""
    loader = open_loader(dozen, decoder=decoder)
    healthy = facts(list(loader.epoch(0)))
    victim = loader.samples(0, 3)[0]
    replace(victim.path)
    got = facts(list(loader.epoch(0)))
    assert got[:3] + got[4:] == healthy[:3] + healthy[4:]
    assert victim.sample_id not in got[3][0] and len(got[3][0]) == 2
    (entry,) = loader.quarantine.entries
    assert entry.sample_id == victim.sample_id and part in entry.reason


def test_an_error_that_does_not_come_again_changes_nothing(
    dozen: Dataset, open_loader: OpenLoader, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: a network file system returns EIO once for every file."""
    loader = open_loader(dozen)
    expected = facts(list(loader.epoch(0)))
    read, failed = os.pread, set()

    def flaky(handle: int, *arguments: int) -> bytes:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".webm") and name not in failed:
            failed.add(name)
            raise OSError(5, "Input/output error")
        return read(handle, *arguments)

    monkeypatch.setattr("os.pread", flaky)
    assert facts(list(loader.epoch(0))) == expected
    assert len(failed) == 12 and not len(loader.quarantine)


def test_an_outage_of_seconds_takes_out_nothing(
    dozen: Dataset, open_loader: OpenLoader, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: no file can be read until 5 s have been waited; for a missing one, nobody waits."""
    loader = open_loader(dozen)
    expected = facts(list(loader.epoch(0)))
    paused: list[float] = []
    read = os.pread

    def failing(handle: int, *arguments: int) -> bytes:
        if sum(paused) < 5 and os.readlink(f"/proc/self/fd/{handle}").endswith(".webm"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(handle, *arguments)

    monkeypatch.setattr(recovery, "time", SimpleNamespace(sleep=paused.append))
    monkeypatch.setattr("os.pread", failing)
    assert facts(list(loader.epoch(0))) == expected
    assert 5 <= sum(paused) < 10 and not len(loader.quarantine)
    paused.clear()
    dozen.train[3].path.unlink()
    monkeypatch.setattr("os.pread", read)
    list(loader.epoch(0))
    assert sum(paused) < 1 and 3 in loader.quarantine


@pytest.mark.parametrize("alone", [False, True])
def test_any_error_of_a_reading_thread_takes_out_its_sample(
    dozen: Dataset, open_loader: OpenLoader, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """D4: not only the errors that are foreseen, nor only those that come by another way, too."""
    from pipelines.decode import read_frames

    def fail(sample: Sample, *arguments: Any, **options: Any) -> Any:
        if sample.sample_id == 10:
            raise ZeroDivisionError("deep inside")
        return read_frames(sample, *arguments, **options)

    monkeypatch.setattr("pipelines.fallback.read_frames", fail)
    if not alone:
        monkeypatch.setattr("pipelines.recovery.read_frames", fail)
    loader = open_loader(dozen)
    assert len(list(loader.epoch(0))) == 6
    (entry,) = loader.quarantine.entries
    assert (entry.sample_id, entry.reason) == (10, "ZeroDivisionError: deep inside")


BLOCKED = """
import os, sys
from pathlib import Path
from pipelines import decoders, prefetch
from pipelines.annotations import VideoSet
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.loader import build_loader

decoders.dali_installed = lambda: False
prefetch.JOIN_TIMEOUT_S = 0.2
root = Path(sys.argv[1])
names = sorted(path.name for path in root.glob("*.webm"))
videos = VideoSet(root, [(name, 0) for name in names])
loader = build_loader(
    Dataset(videos, videos, ("a",), root / "cache"), split="val", seed=0, micro_batch=2,
    global_batch=2, sampling=SamplingConfig(num_segments=4),
    augment=AugmentConfig(size=32, resize=32),
    loader=LoaderConfig(threads=2, timeout_s=1.0, decoder="pyav"),
)
(root / names[3]).unlink()
os.mkfifo(root / names[3])  # opening it waits for ever, as a dead network file system does
try:
    list(loader.epoch(0))
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def test_a_blocked_read_ends_the_process_with_its_name(
    make_video: MakeVideo, tmp_path: Path
) -> None:
    """D4, S3, M2: the threads that wait for the file system do not hold the process."""
    for k in range(6):
        make_video(f"{k}.webm", num_frames=6)
    started = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 3, answer.stderr
    assert "no batch within loader.timeout_s = 1 s" in answer.stdout
    assert "3 (" in answer.stdout and "3.webm" in answer.stdout
    assert "0.webm" not in answer.stdout  # read long ago
    assert time.monotonic() - started < 60
    assert not list(tmp_path.rglob("*.tmp*"))
