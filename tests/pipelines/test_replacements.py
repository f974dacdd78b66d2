"""Videos that cannot be read: which others stand in for them, and what stays the same.

Rows D3 and D5 of the fault matrix.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import decoders
from pipelines.datasets import Dataset
from pipelines.loader import Batch, Loader
from pipelines.quarantine import Quarantine

OpenLoader = Callable[..., Loader]
Facts = Callable[[Sequence[Batch]], list[tuple[list[int], list[int], list[int]]]]


def steps(loaders: Sequence[Loader], facts: Facts, epoch: int) -> list[dict[int, int]]:
    """Per optimizer step of 4 clips over all ranks: sorted (sample id, label, pixel sum)."""
    found: list[list[Any]] = [[] for _ in range(loaders[0].steps_per_epoch)]
    for loader in loaders:
        per_step = loader.batches_per_epoch // loader.steps_per_epoch
        for index, (ids, labels, sums) in enumerate(facts(list(loader.epoch(epoch)))):
            found[index // per_step] += zip(ids, labels, sums, strict=True)
    return [sorted(step) for step in found]  # type: ignore[misc]


@pytest.mark.parametrize("when", ["before the start", "during the run"])
def test_replacements_depend_on_the_sample_alone(
    dozen: Dataset, open_loader: OpenLoader, facts: Facts, when: str
) -> None:
    """D3: any number of ranks and threads, any backend, found early or late: the same clips."""
    victims = [2, 7, 9]
    expected: list[Any] = []
    contents = {k: dozen.train[k].path.read_bytes() for k in victims}
    for decoder in ("torch", "dali") if decoders.dali_installed() else ("torch",):
        for world_size, micro_batch, threads in ((1, 4, 1), (1, 2, 3), (2, 2, 1), (4, 1, 2)):
            for k in victims:
                path = dozen.train[k].path
                path.write_bytes(contents[k])
                if when == "before the start":
                    path.write_bytes(b"")
            loaders = [
                open_loader(
                    dozen, decoder=decoder, threads=threads,
                    rank=rank, world_size=world_size, micro_batch=micro_batch,
                )
                for rank in range(world_size)
            ]  # fmt: skip
            for k in victims:
                dozen.train[k].path.write_bytes(b"")
            got = [steps(loaders, facts, epoch) for epoch in (0, 1)]
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


def test_a_replacement_is_drawn_with_the_numbers_of_the_bad_one(
    dozen: Dataset, open_loader: OpenLoader
) -> None:
    """So it is not the clip that the video has at its own place in the epoch."""
    before = [s for k in range(6) for s in open_loader(dozen).samples(0, k)]
    dozen.train[5].path.unlink()
    after = [s for k in range(6) for s in open_loader(dozen).samples(0, k)]
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


def test_resume_is_exact_after_a_file_was_lost(
    dozen: Dataset, open_loader: OpenLoader, facts: Facts, decoder: str, tmp_path: Path
) -> None:
    """D5: the batches before the loss, those after it, and those of a run that starts later."""
    file = tmp_path / "run" / "quarantine.csv"
    facts_of = {"split": "train", "max_bad_fraction": 0.34, "path": file}
    loader = open_loader(
        dozen,
        decoder=decoder,
        quarantine=Quarantine(dozen.train, **facts_of),  # type: ignore[arg-type]
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
    again = Quarantine(dozen.train, **facts_of)  # type: ignore[arg-type]
    resumed = open_loader(dozen, decoder=decoder, quarantine=again)
    for start in (5, 4, 0):
        assert facts(list(resumed.epoch(0, start=start))) == whole[start:]
    assert [path.name for path in file.parent.iterdir() if ".tmp" in path.name] == []
    resumed.close()


def test_evaluation_replaces_nothing_and_names_what_is_missing(
    dozen: Dataset, open_loader: OpenLoader, facts: Facts, decoder: str
) -> None:
    healthy = open_loader(dozen, "val", decoder=decoder)
    expected = facts(list(healthy.epoch(0)))
    dozen.val[3].path.write_bytes(b"x" * 100)  # known when the index is made
    loader = open_loader(dozen, "val", decoder=decoder)
    dozen.val[8].path.unlink()  # found while reading
    content = dozen.val[9].path.read_bytes()
    dozen.val[9].path.unlink()
    for _ in range(2):
        batches = list(loader.epoch(0))
        assert [batch.missing for batch in batches] == [(), (3,), (), (), (8, 9), ()]
        got = facts(batches)
        assert got[4] == ([], [], []) and batches[4].clips.shape == (0, 4, 64, 64, 3)
        assert got[1] == tuple(values[:1] for values in expected[1])
        assert [got[k] for k in (0, 2, 3, 5)] == [expected[k] for k in (0, 2, 3, 5)]
    reasons = {e.sample_id: e.reason for e in loader.quarantine.entries}
    assert reasons.keys() == {3, 8, 9} and "cannot open it" in reasons[3]
    dozen.val[9].path.write_bytes(content)  # there again: counted by the next evaluation
    batches = list(loader.epoch(0))
    assert batches[4].missing == (8,)
    assert facts(batches)[4] == tuple(values[1:] for values in expected[4])
    loader.close()
    healthy.close()


def test_a_repaired_file_is_used_by_the_next_run(
    dozen: Dataset, open_loader: OpenLoader, tmp_path: Path
) -> None:
    content = dozen.train[4].path.read_bytes()
    dozen.train[4].path.unlink()
    assert len(open_loader(dozen).quarantine) == 1
    assert len(open_loader(dozen).quarantine) == 1  # from the index
    kept = Quarantine(dozen.train, split="train", max_bad_fraction=0.34, path=tmp_path / "q.csv")
    open_loader(dozen, quarantine=kept)
    dozen.train[4].path.write_bytes(content)
    assert len(open_loader(dozen).quarantine) == 0
    same_run = Quarantine(
        dozen.train, split="train", max_bad_fraction=0.34, path=tmp_path / "q.csv"
    )
    assert 4 in open_loader(dozen, quarantine=same_run).quarantine  # its samples stay the same
