"""A run with unreadable videos: what it writes down, and that its scores say so."""

import csv
import json
import os
import shutil

import pytest
import torch

from accel.engine.config import load_recipe
from accel.engine.metrics import ClassificationMeter
from accel.engine.tester import evaluate_protocols, find_target
from accel.engine.trainer import Trainer
from accel.errors import DivergedError
from pipelines.errors import DataError
from pipelines.order import epoch_order, train_positions, val_positions


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


def test_a_set_of_one_class(tiny_recipe, tiny_root, tmp_path, steps_of):
    """D6: nothing can be learned, and nothing goes wrong."""
    root = tmp_path / "set"
    shutil.copytree(tiny_root, root)
    for name in ("train.txt", "val.txt"):
        lines = (root / name).read_text().splitlines()
        (root / name).write_text("".join(f"{line.split()[0]} 0\n" for line in lines))
    changes = {"data.classes_file": "", "train.max_steps": "2"}
    summary = _fit(_trainer(tiny_recipe, root, tmp_path / "run", **changes))
    assert summary["val_top1"] == 1.0
    assert [step[1] for step in steps_of(tmp_path / "run")] == [0.0, 0.0]


def test_missing_clips_are_wrong_in_every_share():
    meter = ClassificationMeter(3, torch.device("cpu"))
    meter.update(torch.eye(3), torch.tensor([0, 1, 2]))
    meter.miss([2])
    scores = meter.compute()
    assert (scores.top1, scores.top5) == (0.75, 0.75)
    assert scores.mean_class == pytest.approx((1 + 1 + 0.5) / 3)
    assert (scores.num_clips, scores.num_missing) == (4, 1) and "1 of 4 videos" in scores.text


def _rot(path):
    """Other bytes under the same size and time: what the index knows, only a decoder can refute."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.multi_process
@pytest.mark.slow
def test_all_bad_videos_in_the_part_of_one_of_two_processes(
    tiny_recipe, tiny_root, train_process, tmp_path, steps_of
):
    """D3: under the limit, equal numbers of batches on both; over it, exit code 3 and the table."""
    root, warm = tmp_path / "set", tmp_path / "warm"
    shutil.copytree(tiny_root, root)
    facts = {"data.max_bad_fraction": "0.2", "loader.decoder": "pyav"}
    trainer = _trainer(tiny_recipe, root, warm, **facts)  # indexes all while all is well
    seed = trainer.recipe.run.seed
    trainer.close()
    order = epoch_order(32, seed, 0)
    share = {"rank": 1, "world_size": 2, "micro_batch": 4}
    places = [train_positions(k, global_batch=8, **share) for k in range(4)]
    victims = [int(order[places[k][0]]) for k in (0, 1, 2, 3)] + [int(order[places[3][1]])]
    missing = [val_positions(0, num_samples=16, **share)[k] for k in (0, 2)]
    for k in victims[:2]:
        _video(root, "train", k).write_bytes(b"")
    for k in victims[2:]:
        _rot(_video(root, "train", k))
    for k in missing:
        _rot(_video(root, "val", k))

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    options = [f"--{key}={value}" for key, value in facts.items()]
    options += [f"--data.root={root}", "--schedule.epochs=1", "--run.timeout_s=60"]
    two = train_process("--out", str(tmp_path / "two"), *options, launcher=launcher)
    one = _fit(_trainer(tiny_recipe, root, tmp_path / "one", **facts))
    _, errors = two.communicate(timeout=240)
    assert two.returncode == 0, errors
    alone, both = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert len(alone) == len(both) == 4
    losses = [[step[1] for step in steps] for steps in (alone, both)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["unusable"] == one["unusable"] and len(one["unusable"]) == 7
    assert (summary["val_num_clips"], summary["val_num_missing"]) == (16, 2)
    assert {v["sample_id"] for v in one["unusable"] if v["split"] == "train"} == set(victims)

    options[0] = "--data.max_bad_fraction=0.13"  # four of 32; the fifth is met in the last step
    over = train_process("--out", str(tmp_path / "over"), *options, launcher=launcher)
    _, errors = over.communicate(timeout=240)
    assert over.returncode != 0 and "exitcode  : 3" in errors
    head = "error: rank 1: 5 of 32 training videos cannot be used, allowed 4 "
    assert errors.count(head) == 1 and "bug in accel" not in errors
    rows = errors[errors.index(head) :].splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["3", "2"]
    assert "cannot be decoded" in rows[0] and "is empty" in rows[1]
    with (tmp_path / "over" / "quarantine.csv").open(newline="") as handle:
        assert len([row for row in csv.DictReader(handle) if row["split"] == "train"]) <= 4
