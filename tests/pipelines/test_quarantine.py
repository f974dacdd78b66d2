"""The file of unusable videos, which processes of a run share."""

import os
from pathlib import Path

import pytest

from pipelines.annotations import VideoSet
from pipelines.errors import DataError
from pipelines.quarantine import Quarantine


@pytest.fixture
def videos(tmp_path: Path) -> VideoSet:
    return VideoSet(tmp_path, [(f"{k:02d}.webm", k % 3, 0, 0) for k in range(12)])


def test_quarantine_files(videos: VideoSet, tmp_path: Path) -> None:
    def opened(split: str = "train", fraction: float = 0.34) -> Quarantine:
        path = tmp_path / "q.csv"
        return Quarantine(videos, split=split, max_bad_fraction=fraction, path=path)  # type: ignore[arg-type]

    one, other, val = opened(), opened(), opened("val")
    one.add(3, 'two\nlines, "quoted"')
    other.add(5, "b")
    val.add(3, "c")
    one.refresh()
    assert [(e.sample_id, e.reason) for e in one.entries] == [(3, 'two lines, "quoted"'), (5, "b")]
    assert [e.sample_id for e in one.take_new()] == [3, 5] and one.take_new() == []
    assert 3 in val and 5 not in val and opened().summary() == one.summary()
    with pytest.raises(DataError, match=r"2 of 12 training videos cannot be used, allowed 1"):
        opened(fraction=0.001)
    text = (tmp_path / "q.csv").read_text()
    for damaged in (
        "",
        text.replace("05.webm", "else.webm"),
        "a,b\n",
        text + "train,x\n",
        text * 2,
    ):
        (tmp_path / "q.csv").write_text(damaged)
        with pytest.raises(DataError, match=r"q\.csv: "):
            opened()


@pytest.mark.parametrize(
    "name", ["a\nb", "a\rb", "\r\n", 'a, "b"', "\u2028ü", " a ", "\udcff", "'%s"]
)
def test_any_name_is_stored(tmp_path: Path, name: str) -> None:
    videos = VideoSet(tmp_path, [(name, 0), ("b", 0)])

    def opened() -> Quarantine:
        return Quarantine(videos, split="train", max_bad_fraction=1.0, path=tmp_path / "q.csv")

    opened().add(0, "a reason")
    assert [(entry.sample_id, entry.path) for entry in opened().entries] == [(0, name)]


def test_what_is_refused_is_not_written(videos: VideoSet, tmp_path: Path) -> None:
    """Two processes find one video more than tolerated: the run can be resumed all the same."""

    def opened() -> Quarantine:
        return Quarantine(videos, split="train", max_bad_fraction=0.1, path=tmp_path / "q.csv")

    one, other = opened(), opened()
    one.add(3, "a")
    stored = (tmp_path / "q.csv").read_bytes()
    with pytest.raises(DataError, match=r"2 of 12 training videos cannot be used, allowed 1"):
        other.add(5, "b")
    assert (tmp_path / "q.csv").read_bytes() == stored and 5 not in other
    assert [entry.sample_id for entry in opened().entries] == [3]
    other.add(3, "found here, too")
    assert (tmp_path / "q.csv").read_bytes() == stored and 3 in other


def test_the_file_is_on_the_disk_before_its_name(
    videos: VideoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure it is the old or the new one, not an empty one."""
    done = []
    replace, sync = os.replace, os.fsync

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"{target.name} named")
        replace(source, target)

    def noted_sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append("folder" if path == tmp_path else f"{path.name.split('.tmp-')[0]} synced")
        sync(handle)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_sync)
    Quarantine(videos, split="val", max_bad_fraction=0.1, path=tmp_path / "q.csv").add(0, "a")
    assert done == ["q.csv synced", "q.csv named", "folder"]


def test_a_run_goes_on_where_nothing_can_be_locked(
    videos: VideoSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".q.csv.lock").mkdir()
    quarantine = Quarantine(videos, split="val", max_bad_fraction=0.1, path=tmp_path / "q.csv")
    quarantine.add(0, "a")
    assert 0 in quarantine and "q.csv: no lock can be made beside it" in caplog.text
    assert "00.webm" in (tmp_path / "q.csv").read_text()
