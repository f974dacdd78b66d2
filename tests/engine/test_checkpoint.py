"""Checkpoints: atomic, verified, rotated; damage is always noticed."""

import errno
import json
import os

import pytest
import torch

from accel.engine import checkpoint
from accel.engine.checkpoint import CheckpointStore, first_non_finite, load_verified
from accel.errors import CheckpointError


def _state(value=0.0):
    return {
        "format": "accel-run-1",
        "model": {"w": torch.full((64,), value), "n": torch.tensor(3)},
        "counters": {"iteration": 1},
    }


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    store.prepare()
    return store


def test_saved_state_comes_back(store):
    path = store.save(_state(1.5), 7, 0.5)
    assert path.name == "step_00000007.pt"
    loaded = store.load(path)
    assert torch.equal(loaded["model"]["w"], torch.full((64,), 1.5))
    assert loaded["counters"] == {"iteration": 1}
    assert not list(store.folder.glob("*.tmp-*"))


def test_rotation_keeps_the_newest_and_the_best_by_iteration_not_by_time(store):
    for iteration, top1 in [(1, 0.9), (2, 0.3), (3, None), (4, 0.5), (5, None)]:
        store.save(_state(), iteration, top1)
        os.utime(store.folder / f"step_{iteration:08d}.pt", (1e9 - iteration,) * 2)
    assert [entry.iteration for entry in store.entries()] == [1, 4, 5]
    assert sorted(path.name for path in store.folder.glob("*.pt")) == [
        "step_00000001.pt",
        "step_00000004.pt",
        "step_00000005.pt",
    ]
    assert store.best().name == "step_00000001.pt"


def test_every_flipped_bit_is_found(store):
    path = store.save(_state(), 1, None)
    data = path.read_bytes()
    for position in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="sha256"):
            store.load(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncation_is_found_with_and_without_the_index(store, keep):
    path = store.save(_state(), 1, None)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"truncated"):
        store.load(path)
    with pytest.raises(CheckpointError):
        load_verified(path)


def test_auto_falls_back_to_the_one_before_with_a_warning(store, caplog):
    store.save(_state(1), 1, None)
    newest = store.save(_state(2), 2, None)
    newest.write_bytes(newest.read_bytes()[:-9])
    path, state = store.load_latest()
    assert path.name == "step_00000001.pt"
    assert state["model"]["w"][0] == 1
    assert "step_00000002.pt" in caplog.text
    (store.folder / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="No other checkpoint here is usable"):
        store.load_latest()


def test_checkpoints_beyond_the_resumed_one_are_set_aside(store):
    for iteration in (1, 2, 3):
        store.save(_state(iteration), iteration, None)
    store.forget_after(2)
    assert [entry.iteration for entry in store.entries()] == [2]
    assert (store.folder / "step_00000003.pt.stale").is_file()
    store.save(_state(2.5), 3, None)
    assert [entry.iteration for entry in store.entries()] == [2, 3]
    assert store.load_latest()[1]["model"]["w"][0] == 2.5


def test_a_non_finite_checkpoint_is_not_loaded(tmp_path):
    path = tmp_path / "step_00000001.pt"
    torch.save(_state(float("nan")), path)
    with pytest.raises(CheckpointError, match=r"model\.w holds a non-finite"):
        load_verified(path)


def test_an_unreadable_index_does_not_lose_the_files(store, caplog):
    store.save(_state(1), 1, 0.5)
    (store.folder / "index.json").write_text("{")
    assert [entry.iteration for entry in store.entries()] == [1]
    assert store.load_latest()[1]["model"]["w"][0] == 1


def test_full_disk_leaves_the_old_ones_and_no_rest(store, monkeypatch):
    first = store.save(_state(1), 1, None)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    told = r"step_00000002\.pt: .*: No space left on device; older checkpoints are intact\.$"
    with pytest.raises(CheckpointError, match=told):
        store.save(_state(2), 2, None)
    fresh = CheckpointStore(store.folder.parent)
    with pytest.raises(CheckpointError, match="No space left on device; there is no older one"):
        fresh.save(_state(2), 2, None)
    monkeypatch.undo()
    assert [path.name for path in store.folder.iterdir() if "tmp" in path.name] == []
    assert store.load_latest()[0] == first


def test_non_finite_state_is_not_written(store):
    with pytest.raises(CheckpointError, match=r"model\.w holds a non-finite"):
        store.save(_state(float("nan")), 3, None)
    assert store.entries() == []
    assert first_non_finite({"a": {"b": torch.tensor([1.0, float("inf")])}}) == "a.b"
    assert first_non_finite({"a": float("inf")}) == "a"
    assert first_non_finite({"a": torch.ones(2), "b": 1, "c": None}) is None


def test_leftovers_of_a_killed_process_are_removed(store):
    (store.folder / "step_00000009.pt.tmp-123").write_bytes(b"half")
    store.prepare()
    assert not list(store.folder.glob("*.tmp-*"))


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written here"):
        CheckpointStore(tmp_path / "file" / "checkpoints").prepare()


def test_published_weights_are_not_a_run(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=r"model\.pretrained"):
        load_verified(tmp_path / "published.pth")


def test_the_index_is_plain_json(store):
    store.save(_state(), 1, 0.25)
    rows = json.loads((store.folder / "index.json").read_text())
    assert rows[0]["val_top1"] == 0.25
    assert set(rows[0]) == {"name", "iteration", "bytes", "sha256", "val_top1"}
