"""Unreadable files and failing decoders: who is left out, who stands in, and what stays the same.

Rows D3 to D6, M1 and M2 of the fault matrix.
"""

import csv
import errno
import gc
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pipelines import decoders, recovery
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decoders import DecoderPlan
from pipelines.errors import DataError
from pipelines.loader import Batch, Loader, build_loader
from pipelines.quarantine import Quarantine, tolerated
from pipelines.source import Sample

MakeVideo = Callable[..., Path]
MakeDataset = Callable[[Sequence[Path]], Dataset]
ReadCode = Callable[[np.ndarray], tuple[int, int]]
DECODERS = [
    pytest.param("dali", marks=pytest.mark.needs_dali_video),
    pytest.param("pyav", marks=pytest.mark.needs_dali),
    "torch",
]


def open_loader(dataset: Dataset, split: str = "train", **changes: Any) -> Loader:
    decoder = changes.pop("decoder", "torch")
    name = "pyav" if decoder == "torch" else decoder
    arguments: dict[str, Any] = {
        "sampling": SamplingConfig(num_segments=4),
        "augment": AugmentConfig(size=64, resize=64, scales=(1.0,), flip=False),
        "loader": LoaderConfig(
            threads=changes.pop("threads", 2), decoder=name, timeout_s=60.0, prefetch=1
        ),
        "seed": 3,
        "micro_batch": 2,
        "global_batch": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        if decoder == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(dataset, split=split, **(arguments | changes))


@pytest.fixture
def dataset(make_video: MakeVideo, make_dataset: MakeDataset) -> Dataset:
    """Twelve VP9 clips of 8 frames; a third of them may be bad."""
    paths = [make_video(f"{k:02d}.webm", num_frames=8, video=k) for k in range(12)]
    return replace(make_dataset(paths), max_bad_fraction=0.34)


def facts(batches: Sequence[Batch]) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, labels and pixels (sums) of batches."""
    return [
        (b.sample_ids.tolist(), b.labels.tolist(), b.clips.long().sum((1, 2, 3, 4)).tolist())
        for b in batches
    ]


def steps(loaders: Sequence[Loader], epoch: int) -> list[dict[int, int]]:
    """Per optimizer step of 4 clips over all ranks: sorted (sample id, pixel sum)."""
    found: list[list[Any]] = [[] for _ in range(loaders[0].steps_per_epoch)]
    for loader in loaders:
        per_step = loader.batches_per_epoch // loader.steps_per_epoch
        for index, (ids, labels, sums) in enumerate(facts(list(loader.epoch(epoch)))):
            found[index // per_step] += zip(ids, labels, sums, strict=True)
    return [sorted(step) for step in found]  # type: ignore[misc]


@pytest.mark.parametrize("when", ["before the start", "during the run"])
def test_replacements_depend_on_the_sample_alone(dataset: Dataset, when: str) -> None:
    """D3: any number of ranks and threads, any backend, found early or late: the same clips."""
    victims = [2, 7, 9]
    expected: list[Any] = []
    contents = {k: dataset.train[k].path.read_bytes() for k in victims}
    for decoder in ("torch", "dali") if decoders.dali_installed() else ("torch",):
        for world_size, micro_batch, threads in ((1, 4, 1), (1, 2, 3), (2, 2, 1), (4, 1, 2)):
            for k in victims:
                path = dataset.train[k].path
                path.write_bytes(contents[k])
                if when == "before the start":
                    path.write_bytes(b"")
            loaders = [
                open_loader(
                    dataset, decoder=decoder, threads=threads,
                    rank=rank, world_size=world_size, micro_batch=micro_batch,
                )
                for rank in range(world_size)
            ]  # fmt: skip
            for k in victims:
                dataset.train[k].path.write_bytes(b"")
            got = [steps(loaders, epoch) for epoch in (0, 1)]
            assert {loader.batches_per_epoch for loader in loaders} == {
                12 // micro_batch // world_size
            }
            ids = [[k for k, _, _ in step] for epoch in got for step in epoch]  # type: ignore[misc]
            assert not set(victims) & {k for step in ids for k in step}
            assert all(len(step) == 4 for step in ids)
            if decoder == "dali":  # the same frames, with another rounding of colors
                assert ids == [[k for k, _, _ in step] for epoch in expected for step in epoch]
            else:
                expected = expected or got
                assert got == expected
            found = {e.sample_id for loader in loaders for e in loader.quarantine.entries}
            assert found == set(victims)
            for loader in loaders:
                loader.close()


def test_a_replacement_is_drawn_with_the_numbers_of_the_bad_one(dataset: Dataset) -> None:
    """So it is not the clip that the video has at its own place in the epoch."""
    before = [s for k in range(6) for s in open_loader(dataset).samples(0, k)]
    dataset.train[5].path.unlink()
    after = [s for k in range(6) for s in open_loader(dataset).samples(0, k)]
    seen = 0
    for healthy, sample in zip(before, after, strict=True):
        assert np.array_equal(sample.frame_indices, healthy.frame_indices)  # all have 8 frames
        assert sample.views == healthy.views
        if healthy.sample_id == 5:
            assert sample.sample_id != 5 and sample.label == sample.sample_id % 3
            seen += 1
        else:
            assert (sample.sample_id, sample.label) == (healthy.sample_id, healthy.label)
    assert seen == 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_resume_is_exact_after_a_file_was_lost(
    dataset: Dataset, decoder: str, tmp_path: Path
) -> None:
    """D5: the batches before the loss, those after it, and those of a run that starts later."""
    file = tmp_path / "run" / "quarantine.csv"
    facts_of = {"split": "train", "max_bad_fraction": 0.34, "path": file}
    loader = open_loader(
        dataset,
        decoder=decoder,
        quarantine=Quarantine(dataset.train, **facts_of),  # type: ignore[arg-type]
    )
    healthy = facts(list(loader.epoch(0)))
    lost = loader.samples(0, 4)[1]
    lost.path.unlink()
    whole = facts(list(loader.epoch(0)))
    assert whole[:4] + whole[5:] == healthy[:4] + healthy[5:]
    assert whole[4][0][0] == healthy[4][0][0] and whole[4][0][1] != lost.sample_id
    loader.close()
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["split"], int(r["sample_id"]), r["path"]) for r in rows] == [
        ("train", lost.sample_id, lost.path.name)
    ]
    assert "No such file" in rows[0]["reason"]
    again = Quarantine(dataset.train, **facts_of)  # type: ignore[arg-type]
    resumed = open_loader(dataset, decoder=decoder, quarantine=again)
    for start in (5, 4, 0):
        assert facts(list(resumed.epoch(0, start=start))) == whole[start:]
    assert [path.name for path in file.parent.iterdir() if ".tmp" in path.name] == []
    resumed.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_evaluation_replaces_nothing_and_names_what_is_missing(
    dataset: Dataset, decoder: str
) -> None:
    healthy = open_loader(dataset, "val", decoder=decoder)
    expected = facts(list(healthy.epoch(0)))
    dataset.val[3].path.write_bytes(b"x" * 100)  # known when the index is made
    loader = open_loader(dataset, "val", decoder=decoder)
    dataset.val[8].path.unlink()  # found while reading
    content = dataset.val[9].path.read_bytes()
    dataset.val[9].path.unlink()
    for _ in range(2):
        batches = list(loader.epoch(0))
        assert [batch.missing for batch in batches] == [(), (3,), (), (), (8, 9), ()]
        got = facts(batches)
        assert got[4] == ([], [], []) and batches[4].clips.shape == (0, 4, 64, 64, 3)
        assert got[1] == tuple(values[:1] for values in expected[1])
        assert [got[k] for k in (0, 2, 3, 5)] == [expected[k] for k in (0, 2, 3, 5)]
    reasons = {e.sample_id: e.reason for e in loader.quarantine.entries}
    assert reasons.keys() == {3, 8, 9} and "cannot open it" in reasons[3]
    dataset.val[9].path.write_bytes(content)  # there again: counted by the next evaluation
    batches = list(loader.epoch(0))
    assert batches[4].missing == (8,)
    assert facts(batches)[4] == tuple(values[1:] for values in expected[4])
    loader.close()
    healthy.close()


def test_too_many_bad_files_end_with_the_reasons(dataset: Dataset) -> None:
    """D3: just under and just over the tolerance, before the start and during the run."""
    assert [tolerated(n, 0.001) for n in (9, 10, 50, 5000, 240_000)] == [0, 1, 5, 10, 240]
    assert tolerated(240_000, 0) == 0 and tolerated(3, 1.0) == 3
    some = replace(dataset, max_bad_fraction=0.2)  # of 12: two
    loader = open_loader(some)
    for k in (0, 1):
        dataset.train[k].path.unlink()
    assert len(list(loader.epoch(0))) == 6
    dataset.train[2].path.unlink()
    over = r"3 of 12 training videos cannot be used, allowed 2 \(data\.max_bad_fraction\): "
    with pytest.raises(DataError, match=over + r".*02\.webm: .*No such file.* | .*00\.webm: "):
        list(loader.epoch(0))
    with pytest.raises(
        DataError,
        match=r"3 of 12 videos cannot be used, allowed 2 \(data\.max_bad_fraction\): .*00\.webm",
    ):
        open_loader(some)
    for record in dataset.train:
        record.path.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"12 of 12 videos cannot be used"):
        open_loader(dataset)


def test_a_repaired_file_is_used_by_the_next_run(dataset: Dataset, tmp_path: Path) -> None:
    content = dataset.train[4].path.read_bytes()
    dataset.train[4].path.unlink()
    assert len(open_loader(dataset).quarantine) == 1
    assert len(open_loader(dataset).quarantine) == 1  # from the index
    kept = Quarantine(dataset.train, split="train", max_bad_fraction=0.34, path=tmp_path / "q.csv")
    open_loader(dataset, quarantine=kept)
    dataset.train[4].path.write_bytes(content)
    assert len(open_loader(dataset).quarantine) == 0
    same_run = Quarantine(
        dataset.train, split="train", max_bad_fraction=0.34, path=tmp_path / "q.csv"
    )
    assert 4 in open_loader(dataset, quarantine=same_run).quarantine  # its samples stay the same


class Faulty:
    """A decoder around another one, that misbehaves at chosen calls of `finish`."""

    calls = 0
    built = 0
    faults: ClassVar[dict[int, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        Faulty.built += 1

    def submit(self, samples: Sequence[Sample]) -> Any:
        return self.inner.submit(samples)

    def finish(self, submitted: Any) -> torch.Tensor:
        Faulty.calls += 1
        change = Faulty.faults.get(Faulty.calls, lambda clips: clips)
        return change(self.inner.finish(submitted))

    def close(self) -> None:
        self.inner.close()


def raise_error(clips: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("Critical error in pipeline: no longer valid")


def lose_frames(clips: torch.Tensor) -> torch.Tensor:
    return clips[:, :, :-1]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Any]], None]:
    """Wrap every decoder that is built from now on, and say which calls go wrong."""
    build = DecoderPlan.build
    monkeypatch.setattr(DecoderPlan, "build", lambda plan, name: Faulty(build(plan, name)))

    def use(faults: dict[int, Any]) -> None:
        Faulty.calls, Faulty.built, Faulty.faults = 0, 0, faults

    use({})
    return use


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("fault", [raise_error, lose_frames])
def test_a_failed_decoder_is_built_anew_and_no_batch_is_lost(
    dataset: Dataset, faulty: Callable[..., None], decoder: str, fault: Any
) -> None:
    """D4: the same batches in the same order, nothing in the quarantine."""
    loader = open_loader(dataset, decoder=decoder, threads=1)
    expected = facts(list(loader.epoch(0)))
    loader.close()
    faulty({2: fault, 4: fault, 5: fault})  # the second one twice in a row
    assert facts(list(loader.epoch(0))) == expected
    assert Faulty.built == 1 + 3 and not len(loader.quarantine)
    loader.close()


def test_a_decoder_that_always_fails_ends_the_run(
    dataset: Dataset, faulty: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(dataset)
    monkeypatch.setattr(recovery.GroupDecoder, "_decode_alone", lambda self, sample: None)
    faulty(dict.fromkeys(range(100), raise_error))
    with pytest.raises(
        DataError, match=r"failed 4 times in a row on the samples .*no longer valid"
    ):
        list(loader.epoch(0))
    assert Faulty.built == 1 + 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_sample_that_only_the_decoder_refuses_is_found(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    """Every file can be read by PyAV; the decoder fails on whatever group has number 6."""
    loader = open_loader(dataset, decoder=decoder)
    healthy = facts(list(loader.epoch(0)))
    loader.close()
    build = DecoderPlan.build

    class Picky(Faulty):
        def submit(self, samples: Sequence[Sample]) -> Any:
            results = self.inner.submit(samples)
            self.refused = getattr(self, "refused", []) + [
                results for sample in samples if sample.sample_id == 6
            ]
            return results

        def finish(self, submitted: Any) -> torch.Tensor:
            if any(submitted is results for results in self.refused):
                raise RuntimeError("unsupported profile")
            return self.inner.finish(submitted)

    monkeypatch.setattr(DecoderPlan, "build", lambda plan, name: Picky(build(plan, name)))
    got = facts(list(loader.epoch(0)))
    (entry,) = loader.quarantine.entries
    assert entry.sample_id == 6 and "unsupported profile" in entry.reason
    changed = [k for k in range(6) if got[k] != healthy[k]]
    assert len(changed) == 1 and 6 in healthy[changed[0]][0]
    loader.close()


def test_an_error_that_does_not_come_again_changes_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: a network file system returns EIO once for every file."""
    loader = open_loader(dataset)
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
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: no file can be read until 5 s have been waited; for a missing one, nobody waits."""
    loader = open_loader(dataset)
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
    dataset.train[3].path.unlink()
    monkeypatch.setattr("os.pread", read)
    list(loader.epoch(0))
    assert sum(paused) < 1 and 3 in loader.quarantine


@pytest.mark.parametrize("alone", [False, True])
def test_any_error_of_a_reading_thread_takes_out_its_sample(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, alone: bool
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
    loader = open_loader(dataset)
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


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_grows(dataset: Dataset, faulty: Callable[..., None], decoder: str) -> None:
    """M1: 60 epochs, every third with a decoder that is built anew, every fifth left early."""
    loader = open_loader(dataset, decoder=decoder, threads=1)

    def run(epochs: range) -> None:
        for epoch in epochs:
            faulty({2: raise_error} if epoch % 3 == 0 else {})
            batches = loader.epoch(epoch)
            for _ in range(2 if epoch % 5 == 0 else 9):
                next(batches, None)
            assert Faulty.built >= (epoch % 3 == 0)

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


def test_small_and_odd_sets(dataset: Dataset, make_dataset: MakeDataset) -> None:
    """D6: fewer videos than a global batch or than ranks; repeated lines; one class."""
    path = dataset.train[0].path
    with pytest.raises(DataError, match=r"3 videos, fewer than one global batch \(4\)"):
        open_loader(make_dataset([path] * 3))
    doubled = make_dataset([path] * 9)
    batches = list(open_loader(doubled).epoch(0))
    assert len(batches) == 4 and all(len(batch.labels) == 2 for batch in batches)
    few = make_dataset([path])
    loaders = [open_loader(few, "val", rank=rank, world_size=3) for rank in range(3)]
    assert [len(list(loader.epoch(0))) for loader in loaders] == [1, 0, 0]
