"""A run with unreadable videos: what it writes down, and that its scores say so."""

import csv
import json
import shutil

import pytest
import torch

from accel.engine.config import load_recipe
from accel.engine.metrics import ClassificationMeter
from accel.engine.tester import evaluate_protocols, find_target
from accel.engine.trainer import Trainer
from accel.errors import DivergedError
from pipelines.errors import DataError


def _trainer(recipe, root, out, **changes):
    settings = {"data.root": str(root), "schedule.epochs": "1"} | changes
    return Trainer(load_recipe(recipe, settings), out)


def _fit(trainer):
    try:
        return trainer.fit()
    finally:
        trainer.close()


@pytest.fixture
def root(tiny_root, tmp_path):
    """A copy of the set in which the validation video 5 is unreadable."""
    copy = tmp_path / "set"
    shutil.copytree(tiny_root, copy)
    _video(copy, "val", 5).write_bytes(b"")
    return copy


def _video(root, split, sample_id):
    return root / (root / f"{split}.txt").read_text().splitlines()[sample_id].split()[0]


def test_a_run_with_unreadable_videos(tiny_recipe, root, tmp_path, steps_of):
    late = _trainer(tiny_recipe, root, tmp_path / "late")
    _video(root, "train", 7).unlink()  # while it runs
    summary = _fit(late)
    early = _trainer(tiny_recipe, root, tmp_path / "early")
    again = _fit(early)
    assert steps_of(tmp_path / "late") == steps_of(tmp_path / "early")
    for one, out in ((summary, "late"), (again, "early")):
        names = {("train", 7), ("val", 5)}
        assert {(v["split"], v["sample_id"]) for v in one["unusable"]} == names
        assert (one["val_num_clips"], one["val_num_missing"]) == (16, 1)
        hits = one["val_top1"] * 16
        assert hits == pytest.approx(round(hits)) and hits <= 15
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        events = [row for row in map(json.loads, lines) if row.get("event") == "unusable"]
        assert {(row["split"], row["sample_id"]) for row in events} == names and len(events) == 2
        with (tmp_path / out / "quarantine.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert {(row["split"], int(row["sample_id"])) for row in rows} == names
        assert all(row["reason"] for row in rows)

    target = find_target(str(tmp_path / "late"))
    (report,) = evaluate_protocols(target, ["1x1"])
    assert (report["num_videos"], report["num_missing"]) == (16, 1)
    assert report["top1"] == summary["val_top1"]
    assert [video["sample_id"] for video in report["unusable"]] == [5]
    target.state["model"]["head.fc.weight"].fill_(
        float("inf")
    )  # diverged: not a fault of the videos
    with pytest.raises(DivergedError, match=r"scores that are not finite for 15 of 16 videos"):
        evaluate_protocols(target, ["1x1"])
    _video(root, "val", 6).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 16 videos cannot be used"):
        evaluate_protocols(target, ["1x1"])


def test_a_resumed_run_keeps_what_it_left_out(tiny_recipe, root, tmp_path, steps_of):
    video = _video(root, "train", 7)
    content = video.read_bytes()
    video.unlink()
    _fit(_trainer(tiny_recipe, root, tmp_path / "whole"))
    _fit(_trainer(tiny_recipe, root, tmp_path / "run", **{"train.max_steps": "2"}))
    video.write_bytes(content)  # repaired: the samples of this run stay as they are
    _fit(_trainer(tiny_recipe, root, tmp_path / "run"))
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count('"unusable"') == 2


def test_missing_clips_are_wrong_in_every_share():
    meter = ClassificationMeter(3, torch.device("cpu"))
    meter.update(torch.eye(3), torch.tensor([0, 1, 2]))
    meter.miss([2])
    scores = meter.compute()
    assert (scores.top1, scores.top5) == (0.75, 0.75)
    assert scores.mean_class == pytest.approx((1 + 1 + 0.5) / 3)
    assert (scores.num_clips, scores.num_missing) == (4, 1) and "1 of 4 videos" in scores.text
