"""How many videos may be unusable, and sets that are small or odd.

Rows D3 and D6 of the fault matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.datasets import Dataset
from pipelines.errors import DataError, MediaError, too_many_unusable
from pipelines.loader import Loader
from pipelines.quarantine import tolerated

MakeDataset = Callable[[Sequence[Path]], Dataset]
OpenLoader = Callable[..., Loader]


def test_too_many_bad_files_end_with_the_reasons(dozen: Dataset, open_loader: OpenLoader) -> None:
    """D3: just under and just over the tolerance, before the start and during the run."""
    assert [tolerated(n, 0.001) for n in (9, 10, 50, 5000, 240_000)] == [0, 1, 5, 10, 240]
    assert tolerated(240_000, 0) == 0 and tolerated(3, 1.0) == 3
    some = replace(dozen, max_bad_fraction=0.2)  # of 12: two
    loader = open_loader(some)
    for k in (0, 1):
        dozen.train[k].path.unlink()
    assert len(list(loader.epoch(0))) == 6
    dozen.train[2].path.unlink()
    over = r"3 of 12 training videos cannot be used, allowed 2 \(data\.max_bad_fraction\); .*"
    with pytest.raises(DataError, match=over + r"\n.*\n +3  .*02\.webm: .*No such file[^\n]*$"):
        list(loader.epoch(0))
    over = over.replace("training ", "")
    with pytest.raises(DataError, match=over + r"\n.*\n +3  .*00\.webm: .*No such file[^\n]*$"):
        open_loader(some)
    for record in dozen.train:
        record.path.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"12 of 12 videos cannot be used"):
        open_loader(dozen)


def test_the_table_of_reasons(dozen: Dataset, open_loader: OpenLoader) -> None:
    """One row per reason, the most frequent first; numbers do not tell reasons apart."""
    for k, record in enumerate(dozen.train):
        content = record.path.read_bytes()
        if k in (1, 2, 3, 5, 8):
            record.path.write_bytes(content[: 100 + 40 * k])
        elif k in (4, 9):
            record.path.write_bytes(b"")
        elif k in (0, 6, 7):
            record.path.write_text("no video")
    with pytest.raises(DataError) as caught:
        open_loader(dozen)
    head, titles, *rows = str(caught.value).splitlines()
    assert head.startswith("10 of 12 videos cannot be used, allowed 4 (data.max_bad_fraction); ")
    assert titles.split() == "videos the first of them, and the reason".split()
    facts = [row.split(maxsplit=2) for row in rows]
    named = [(int(count), Path(path).name, reason[:20]) for count, path, reason in facts]
    assert named == [
        (5, "01.webm:", "the header declares "),
        (3, "00.webm:", "expected a video fil"),
        (2, "04.webm:", "the file is empty (0"),
    ]
    found = [MediaError(f"{k}.webm", "a" * k + ".") for k in range(1, 13)]
    rows = str(too_many_unusable([*found, found[4]], total=20, tolerated=0)).splitlines()[2:]
    assert [int(row.split()[0]) for row in rows] == [2, *[1] * 9, 2]
    assert rows[0].endswith("5.webm: aaaaa.") and rows[-1].endswith("for other reasons")


def test_small_and_odd_sets(
    dozen: Dataset, make_dataset: MakeDataset, open_loader: OpenLoader
) -> None:
    """D6: fewer videos than a global batch or than ranks; repeated lines, each a video."""
    path = dozen.train[0].path
    with pytest.raises(DataError, match=r"3 videos, fewer than one global batch \(4\)"):
        open_loader(make_dataset([path] * 3))
    doubled = make_dataset([path] * 9)
    batches = list(open_loader(doubled).epoch(0))
    assert len(batches) == 4 and all(len(batch.labels) == 2 for batch in batches)
    few = make_dataset([path])
    loaders = [open_loader(few, "val", rank=rank, world_size=3) for rank in range(3)]
    assert [len(list(loader.epoch(0))) for loader in loaders] == [1, 0, 0]
    with pytest.raises(DataError, match=r"1 videos, fewer than one global batch \(4\)"):
        open_loader(few, rank=2, world_size=4, micro_batch=1)
    path.unlink()  # one file, nine lines: nine videos, of which twelve may have four
    repeated = make_dataset([path] * 9 + [record.path for record in list(dozen.train)[1:4]])
    with pytest.raises(DataError, match=r"9 of 12 training videos cannot be used, allowed 4"):
        open_loader(replace(repeated, max_bad_fraction=0.34))
