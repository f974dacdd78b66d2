"""Tests with several views: scores, their files, ensembles, and independence of processes."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from accel.cli.main import main
from accel.engine import config as configs
from accel.engine.metrics import average_views
from accel.engine.scores import ScoreFacts, StoredScores, ensemble, load_scores, merge_views
from accel.engine.tester import evaluate_protocols, find_target
from accel.engine.trainer import Trainer
from accel.errors import CheckpointError, ConfigError
from accel.models.weights import export_weights
from pipelines.fallback import apply_views, read_frames
from pipelines.geometry import View

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("run")
    recipe = configs.load_recipe(tiny_recipe, {"train.max_steps": "2"})
    trainer = Trainer(recipe, out)
    trainer.fit()
    trainer.close()
    return out


def test_one_center_view_is_the_validation_of_the_run(run, tmp_path, caplog):
    caplog.set_level("INFO")
    target = find_target(str(run), out=str(tmp_path))
    (report,) = evaluate_protocols(target, [])
    assert caplog.messages.count(f"val: {report['loader']}") == 1
    summary = json.loads((run / "summary.json").read_text())
    assert report["protocol"] == "1x1" and report["num_videos"] == 16
    for key in ("top1", "top5", "mean_class"):
        assert report[key] == summary[f"val_{key}"]
    stored = json.loads((tmp_path / "scores" / "1x1.json").read_text())
    assert stored == {**report, "protocols": ["1x1"]}


@pytest.mark.needs_dali_video
def test_the_decoder_of_the_run_decodes_again(run, tiny_recipe, tmp_path, caplog, capsys):
    by_default = "dali, scaled by dali"  # of this set, were nothing said
    assert find_target(str(run)).decoder == by_default
    out = tmp_path / "pyav"
    overrides = {"train.max_steps": "1", "loader.decoder": "pyav"}
    trainer = Trainer(configs.load_recipe(tiny_recipe, overrides), out)
    trainer.fit()
    trainer.close()
    auto = {"loader.decoder": "auto"}
    (report,) = evaluate_protocols(find_target(str(out), overrides=auto), ["1x1"])
    assert report["decoder"] == "pyav, scaled by dali"
    assert report["top1"] == json.loads((out / "summary.json").read_text())["val_top1"]

    def decoder_of(stored, forced="auto"):
        target = find_target(str(out), overrides={"loader.decoder": forced})
        target.state["decoders"] = [by_default, stored]
        return evaluate_protocols(target, ["1x1", "1x3"])[1]["decoder"]

    def warnings():
        return [record for record in caplog.records if record.levelno >= logging.WARNING]

    caplog.set_level(logging.INFO, "accel.engine.tester")  # as the command sets it
    assert decoder_of("pyav, scaled by torch") == "pyav, scaled by torch"
    assert decoder_of("pyav, scaled by torch", "dali") == by_default
    assert not warnings()
    assert decoder_of("dali_gpu, scaled by dali") == by_default
    (record,) = warnings()
    assert all(repr(name) in record.message for name in ("dali_gpu, scaled by dali", by_default))

    capsys.readouterr()
    assert main(["evaluate", str(out), "--protocol", "1x1", "--loader.decoder", "auto"]) == 0
    assert "PyAV decodes, DALI scales (as the checkpoint says)" in capsys.readouterr().out


def test_scores_are_the_mean_over_all_clips_and_crops(run, tmp_path):
    overrides = {"test.average": "logits", "augment.resize": "40", "loader.decoder": "pyav"}
    target = find_target(str(run), out=str(tmp_path), overrides=overrides)
    (report,) = evaluate_protocols(target, ["2x3"])
    assert (report["num_views"], report["crop_size"]) == (6, 40)
    scores = load_scores(tmp_path / "scores" / "2x3.npz")
    trainer = Trainer(
        configs.load_recipe(str(run / "recipe.yaml"), overrides), tmp_path / "t", resume="none"
    )
    trainer.model.load_state_dict(target.state["model"])
    trainer.model.eval()
    loader = trainer.val_loader
    for k, record in enumerate(trainer.dataset.val[:5]):
        source = loader._source
        info = source.infos[k]
        frames = read_frames(
            dataclasses.replace(source.sample(0, k), frame_indices=np.arange(info.num_frames))
        )
        ticks = info.num_frames / 4
        clips = [[int(ticks / 2 + ticks * x) for x in range(4)], [int(ticks * x) for x in range(4)]]
        width = int(40 * info.width / info.height)
        assert info.width >= info.height
        step = (width - 40) // 4
        logits = []
        for x in (0, 4 * step, 2 * step):
            view = View((width, 40), (x, 0, 40, 40), flip=False)
            (pixels,) = apply_views(frames, [view], size=40, antialias=True)
            for clip in clips:
                batch = torch.from_numpy(np.ascontiguousarray(pixels[clip]))[None]
                with torch.inference_mode():
                    logits.append(trainer.model(trainer.precision.network_input(batch))[0])
        expected = torch.stack(logits).double().mean(0)
        assert torch.allclose(scores.values[k], expected, atol=0.02), record.name
    trainer.close()


def test_a_checkpoint_and_exported_weights_give_the_same_scores(run, tmp_path):
    first = find_target(str(run), out=str(tmp_path / "a"))
    evaluate_protocols(first, ["1x1"])
    checkpoint = find_target(str(first.weights), out=str(tmp_path / "b"))
    evaluate_protocols(checkpoint, ["1x1"])
    trainer = Trainer(first.recipe, tmp_path / "t", resume="none")
    trainer.model.load_state_dict(first.state["model"])
    torch.save(export_weights(trainer.model, "accel"), tmp_path / "w.pth")
    trainer.close()
    with pytest.raises(ConfigError, match="published weights need --recipe"):
        find_target(str(tmp_path / "w.pth"))
    weights = find_target(
        str(tmp_path / "w.pth"), recipe=str(run / "recipe.yaml"), out=str(tmp_path / "c")
    )
    evaluate_protocols(weights, ["1x1"])
    files = [(tmp_path / name / "scores" / "1x1.npz") for name in "abc"]
    values = [load_scores(path).values for path in files]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.multi_process
@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_processes(run, tmp_path):
    overrides = {"loader.decoder": "pyav"}
    target = find_target(str(run), out=str(tmp_path / "1"), overrides=overrides)
    names = ["1x1", "3x1"]
    expected = evaluate_protocols(target, names)
    for processes in (2, 3):
        out = tmp_path / str(processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [
            sys.executable, *launcher, "-m", "accel.cli.main", "evaluate", str(run), "--protocol",
            ",".join(names), "--out", str(out), "--json", "--loader.decoder", "pyav",
        ]  # fmt: skip
        answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert answer.returncode == 0, answer.stderr
        for report, one in zip(json.loads(answer.stdout), expected, strict=True):
            assert {**report, "wall_s": 0} == {**one, "protocols": [one["protocol"]], "wall_s": 0}
            file = f"scores/{one['protocol']}.npz"
            assert (out / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def test_other_classes_or_weights_are_refused(run, tmp_path, tiny_root):
    names = (tiny_root / "classes.txt").read_text().split()
    turned = tmp_path / "classes.txt"
    turned.write_text("\n".join(reversed(names)))
    overrides = {"data.classes_file": str(turned)}
    with pytest.raises(ConfigError, match="another numbering of the labels"):
        evaluate_protocols(find_target(str(run), overrides=overrides), ["1x1"])
    with pytest.raises(ConfigError, match="nosuch: no such file or folder; expected a run folder"):
        find_target(str(tmp_path / "nosuch"))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_target(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a detector; use: accel tubes .* --root FOLDER"):
        find_target(str(run), overrides={"detection.network": "amtnet"})
    with pytest.raises(CheckpointError, match="does not fit the recipe"):
        evaluate_protocols(find_target(str(run), overrides={"model.width": "12"}), ["1x1"])
    with pytest.raises(ConfigError, match=r"--protocol: must be clips x crops"):
        evaluate_protocols(find_target(str(run)), ["2x2"])


def _stored(values, *, recipe="a", protocol="1x1", views=1, **changes):
    facts = ScoreFacts(recipe, changes.pop("weights", "w"), "v", "probs", (protocol,), views)
    labels = torch.tensor([0, 1, 2])
    return StoredScores(
        torch.tensor(values).double(), labels, dataclasses.replace(facts, **changes)
    )


EYE = [[0.6, 0.2, 0.2], [0.1, 0.5, 0.4], [0.2, 0.5, 0.3]]
OTHER = [[0.1, 0.7, 0.2], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]


def test_ensembles_and_view_sets():
    both = ensemble([_stored(EYE), _stored(OTHER, recipe="b", weights="x")], [1.0, 2.0])
    assert torch.allclose(both.values[0], torch.tensor([0.8, 1.6, 0.6]).double())
    assert both.facts.recipe == "a + b" and both.facts.num_views == 2
    assert both.metrics()["top1"] == pytest.approx(2 / 3)
    merged = merge_views([_stored(EYE, views=1), _stored(OTHER, protocol="3x1", views=3)])
    expected = average_views(torch.tensor([EYE, OTHER, OTHER, OTHER]).transpose(0, 1), "logits")
    assert torch.allclose(merged.values, expected) and merged.facts.num_views == 4
    with pytest.raises(ConfigError, match="a view set occurs twice"):
        merge_views([_stored(EYE), _stored(OTHER)])
    with pytest.raises(ConfigError, match="the same weights"):
        merge_views([_stored(EYE), _stored(OTHER, protocol="2x1", weights="x")])
    with pytest.raises(ConfigError, match="the same list of videos"):
        ensemble([_stored(EYE), _stored(OTHER, videos="other")], [1, 1])
    with pytest.raises(ConfigError, match="the same average"):
        ensemble([_stored(EYE), _stored(OTHER, average="logits")], [1, 1])


def test_score_files(tmp_path, capsys):
    a, b = tmp_path / "a.npz", tmp_path / "b" / "scores" / "2x3.npz"
    _stored(EYE).save(a)
    _stored(OTHER, recipe="b").save(b)
    again = load_scores(a)
    assert torch.equal(again.values, _stored(EYE).values) and again.facts == _stored(EYE).facts
    command = ["ensemble", str(a), str(tmp_path / "b"), "--protocol", "2x3", "--weights", "1", "1"]
    assert main([*command, "--out", str(tmp_path / "c.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(2 / 3)
    assert load_scores(tmp_path / "c.npz").facts.recipe == "a + b"
    assert main(["ensemble", str(a), str(b)]) == 0
    assert "ensemble: top-1 66.67" in capsys.readouterr().out
    for wrong in (
        ["ensemble", str(a), str(b), "--weights", "1"],
        ["ensemble", str(tmp_path / "none.npz")],
        ["ensemble", str(tmp_path / "b")],
    ):
        assert main(wrong) == 2
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(a.read_bytes()[:200])
    with pytest.raises(ConfigError, match="not a file of scores"):
        load_scores(damaged)
