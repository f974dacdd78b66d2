"""Whole runs on a tiny set: learning, exact resume, refusals; in one process."""

import errno
import json
import logging
import resource
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from accel.engine.checkpoint import CheckpointStore
from accel.engine.config import load_recipe
from accel.engine.dry_run import dry_run
from accel.engine.run import RunFolder
from accel.engine.trainer import Trainer
from accel.errors import CheckpointError, ConfigError, DivergedError
from accel.models import build_model, list_models
from pipelines import decoders
from pipelines.errors import DataError

KEEP_ALL = {"checkpoint.every_steps": "1", "checkpoint.keep_last": "100"}


def _fit(recipe, out, overrides=None, **options):
    trainer = Trainer(load_recipe(recipe, overrides or {}), out, **options)
    try:
        return trainer.fit()
    finally:
        trainer.close()


def _equal_states(one, other):
    assert one["counters"]["iteration"] == other["counters"]["iteration"]
    for part in ("model", "momentum"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), f"{part}.{name}"


@pytest.fixture(scope="module")
def undisturbed(tiny_recipe, tmp_path_factory):
    """(run folder, summary) of one uninterrupted run of eight steps."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, _fit(tiny_recipe, out, KEEP_ALL)


def test_a_run_folder_is_complete(undisturbed):
    out, summary = undisturbed
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "curves.png"):
        assert (out / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "event" not in row]
    assert [row["iteration"] for row in steps] == list(range(8))
    assert [row["epoch"] for row in steps] == [0] * 4 + [1] * 4
    assert {"loss", "lr", "clips_per_s", "data_wait"} <= steps[0].keys()
    evaluations = [row for row in rows if row.get("event") == "eval"]
    assert [row["iteration"] for row in evaluations] == [4, 8]
    assert summary["val_top1"] == evaluations[-1]["val_top1"]
    assert summary["val_num_clips"] == 16
    assert {"val_loss", "clips_per_s", "data_wait", "wall_s", "checkpoint"} <= summary.keys()
    assert load_recipe(str(out / "recipe.yaml")).optim.lr == 0.02


def test_a_run_says_who_decodes_and_that_it_ends_before_the_profile(tiny_recipe, tmp_path, caplog):
    caplog.set_level("INFO")
    summary = _fit(tiny_recipe, tmp_path, {"train.max_steps": "1", "log.profile": "torch"})
    lines = [r.getMessage() for r in caplog.records]
    assert lines.count(f"train: {summary['loader']}") == 1
    assert sum(line.startswith("val: ") for line in lines) == 1
    assert sum(line.startswith("log.profile torch captures nothing") for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in list_models()] + [("amsnet", {"model.variant": "snippet"})],
)
def test_one_key_switches_the_network(name, options, tiny_recipe, tmp_path):
    overrides = {"model.name": name, "train.max_steps": "2", **options}
    summary = _fit(tiny_recipe, tmp_path / "run", overrides)
    assert summary["iterations"] == 2 and summary["val_num_clips"] == 16


@pytest.mark.parametrize("name", list_models())
def test_the_demo_recipe_fits_every_network(name):
    recipe = load_recipe("demo_motion8", {"model.name": name})
    segments = recipe.sampling.num_segments
    model = build_model(**asdict(recipe.model), num_classes=8, num_segments=segments).eval()
    frames = torch.rand(2 * segments, 3 * recipe.model.frames_per_segment, 64, 64)
    assert model(frames).shape == (2, 8)


def test_the_same_run_twice_gives_the_same_bits(undisturbed, tiny_recipe, tmp_path, steps_of):
    out, _ = undisturbed
    _fit(tiny_recipe, tmp_path / "again", {"loader.prefetch": "5"})
    assert steps_of(tmp_path / "again") == steps_of(out)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 7])
def test_resume_continues_with_identical_bits(
    undisturbed, tiny_recipe, tmp_path, stop_after, steps_of
):
    whole, _ = undisturbed
    out = tmp_path / "run"
    _fit(tiny_recipe, out, {"train.max_steps": str(stop_after), **KEEP_ALL})
    _fit(tiny_recipe, out, KEEP_ALL)
    assert steps_of(out) == steps_of(whole)
    final = "step_00000008.pt"
    _equal_states(
        CheckpointStore(out / "checkpoints").load(out / "checkpoints" / final),
        CheckpointStore(whole / "checkpoints").load(whole / "checkpoints" / final),
    )


def test_another_number_of_threads_is_noted_when_a_run_continues(tiny_recipe, tmp_path, caplog):
    caplog.set_level("INFO")
    for steps, threads in (("1", "1"), ("2", "1"), ("3", "2")):
        assert "run.threads" not in caplog.text
        _fit(tiny_recipe, tmp_path, {"train.max_steps": steps, "run.threads": threads})
    assert "run.threads: 2 now, 1 before: the last bits may be others." in caplog.messages


def test_checkpointing_of_activations_may_begin_in_the_middle_of_a_run(
    undisturbed, tiny_recipe, tmp_path, steps_of
):
    whole, _ = undisturbed
    out = tmp_path / "run"
    _fit(tiny_recipe, out, {"train.max_steps": "3"})
    _fit(tiny_recipe, out, {"train.checkpoint_activations": "block"})
    assert steps_of(out) == steps_of(whole)


def test_a_finished_run_is_left_alone(undisturbed, tiny_recipe):
    out, summary = undisturbed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert _fit(tiny_recipe, out, KEEP_ALL) == summary
    changed = [
        path.name
        for path, stamp in before.items()
        if path.stat().st_mtime_ns != stamp and path.name not in (".lock", "log.txt")
    ]
    assert changed == []


def test_a_damaged_newest_checkpoint_falls_back_and_gives_the_same_losses(
    undisturbed, tiny_recipe, tmp_path, steps_of, caplog
):
    out = tmp_path / "run"
    _fit(tiny_recipe, out, {"train.max_steps": "5", **KEEP_ALL})
    newest = out / "checkpoints" / "step_00000005.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    newest.write_bytes(bytes(damaged))
    _fit(tiny_recipe, out, KEEP_ALL)
    assert "step_00000005.pt" in caplog.text
    assert steps_of(out) == steps_of(undisturbed[0])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        broken = tmp_path / "copy.pt"
        broken.write_bytes(bytes(damaged[:1000]))
        _fit(tiny_recipe, tmp_path / "other", resume=str(broken))


def test_an_explicit_checkpoint_starts_a_new_folder(undisturbed, tiny_recipe, tmp_path, steps_of):
    whole, _ = undisturbed
    start = whole / "checkpoints" / "step_00000003.pt"
    out = tmp_path / "branch"
    _fit(tiny_recipe, out, KEEP_ALL, resume=str(start))
    assert steps_of(out) == steps_of(whole)[3:]
    with pytest.raises(ConfigError, match="already holds a run"):
        _fit(tiny_recipe, out, KEEP_ALL, resume=str(start))
    with pytest.raises(ConfigError, match="already holds a run"):
        _fit(tiny_recipe, out, KEEP_ALL, resume="none")
    with pytest.raises(ConfigError, match="no such checkpoint"):
        _fit(tiny_recipe, tmp_path / "x", resume=str(tmp_path / "missing.pt"))


def test_a_changed_recipe_or_list_does_not_resume(undisturbed, tiny_recipe, tiny_root, tmp_path):
    out = tmp_path / "run"
    _fit(tiny_recipe, out, {"train.max_steps": "2"})
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.02 -> 0\.03.*--resume-allow optim\.lr"):
        _fit(tiny_recipe, out, {"optim.lr": "0.03"})
    lines = (tiny_root / "train.txt").read_text().splitlines()
    other = tmp_path / "other.txt"
    other.write_text("\n".join(lines[::-1]) + "\n")
    changed = {"data.train_list": str(other)}
    with pytest.raises(ConfigError, match="data: "):
        _fit(tiny_recipe, out, changed, resume_allow=["data.train_list"])
    _fit(tiny_recipe, out, {"optim.lr": "0.03", "train.max_steps": "3"}, resume_allow=["optim.lr"])


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(
    undisturbed, tiny_recipe, tmp_path, steps_of
):
    whole, _ = undisturbed
    out = tmp_path / "run"
    _fit(tiny_recipe, out, {"train.max_steps": "6", **KEEP_ALL})
    start = out / "checkpoints" / "step_00000002.pt"
    _fit(tiny_recipe, out, {"checkpoint.keep_last": "1"}, resume=str(start))
    assert steps_of(out) == steps_of(whole)
    assert CheckpointStore(out / "checkpoints").load_latest()[0].name == "step_00000008.pt"


def test_what_a_folder_holds_is_not_overwritten(undisturbed, tiny_recipe, tmp_path):
    out = tmp_path / "run"
    _fit(tiny_recipe, out, {"train.max_steps": "1"})
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ConfigError, match="results of a run without its checkpoints"):
        _fit(tiny_recipe, out, {"train.max_steps": "1"})
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("optim: {lr: 0.123}\n")
    for resume in ("auto", "none"):
        with pytest.raises(ConfigError, match=r"recipe\.yaml belongs to another run"):
            _fit(tiny_recipe, mine, resume=resume)
    assert (mine / "recipe.yaml").read_text() == "optim: {lr: 0.123}\n"


def test_a_last_save_that_fails_is_an_error(tiny_recipe, tmp_path, monkeypatch):
    def full(self, state, iteration, val_top1):
        problem = "could not be written: No space left on device."
        raise CheckpointError(self.folder, problem) from OSError(errno.ENOSPC, "")

    monkeypatch.setattr(CheckpointStore, "save", full)
    told = r"No space left on device\. Make room and repeat the command\.$"
    with pytest.raises(CheckpointError, match=told):
        _fit(tiny_recipe, tmp_path / "run", {"train.max_steps": "1"})


def test_a_full_disk_at_the_very_end_leaves_a_run_that_can_be_finished(
    tiny_recipe, tmp_path, monkeypatch
):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("accel.engine.report.write_atomically", full)
    with pytest.raises(OSError, match=r"curves\.png"):
        _fit(tiny_recipe, tmp_path, {"train.max_steps": "1"})
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert _fit(tiny_recipe, tmp_path, {"train.max_steps": "1"})["iterations"] == 1
    assert (tmp_path / "curves.png").stat().st_size and (tmp_path / "summary.json").is_file()


def test_one_failed_save_is_forgiven(undisturbed, tiny_recipe, tmp_path, monkeypatch, steps_of):
    save, calls = CheckpointStore.save, []

    def sometimes(self, state, iteration, val_top1):
        calls.append(iteration)
        if iteration == 3:
            raise CheckpointError(self.folder, "could not be written: No space left on device.")
        return save(self, state, iteration, val_top1)

    monkeypatch.setattr(CheckpointStore, "save", sometimes)
    _fit(tiny_recipe, tmp_path / "run", KEEP_ALL)
    assert 3 in calls and 4 in calls
    assert steps_of(tmp_path / "run") == steps_of(undisturbed[0])


def test_a_file_lost_during_the_run_saves_what_was_reached(
    undisturbed, tiny_recipe, tiny_root, tmp_path, steps_of
):
    root = tmp_path / "copy"
    shutil.copytree(tiny_root, root)
    changes = {"data.root": str(root), "data.max_bad_fraction": "0"}
    trainer = Trainer(load_recipe(tiny_recipe, changes), tmp_path / "run")
    victim = trainer.train_loader.samples(1, 4)[0].path
    content = victim.read_bytes()
    victim.write_bytes(b"")
    try:
        with pytest.raises(DataError, match=victim.name):
            trainer.fit()
    finally:
        trainer.close()
    assert CheckpointStore(tmp_path / "run" / "checkpoints").entries()
    victim.write_bytes(content)
    _fit(tiny_recipe, tmp_path / "run", changes)
    assert steps_of(tmp_path / "run") == steps_of(undisturbed[0])


def test_another_decoder_does_not_resume(tiny_recipe, tmp_path):
    _fit(tiny_recipe, tmp_path / "run", {"train.max_steps": "1"})
    with pytest.raises(ConfigError, match=r"loader\.decoder: 'auto' -> 'pyav'"):
        _fit(tiny_recipe, tmp_path / "run", {"loader.decoder": "pyav"})


@pytest.mark.needs_dali_video
def test_a_resumed_run_keeps_its_decoder_whatever_is_faster_now(
    tiny_recipe, tmp_path, monkeypatch, steps_of
):
    fastest = "dali"
    monkeypatch.setattr(decoders, "_FEWEST_VIDEOS", 1)
    monkeypatch.setattr(decoders, "_measured", lambda *_: ({fastest: 1.0}, {}))
    whole, out, fresh = (tmp_path / name for name in ("whole", "run", "fresh"))
    _fit(tiny_recipe, whole, KEEP_ALL)
    _fit(tiny_recipe, out, {"train.max_steps": "3", **KEEP_ALL})
    fastest = "pyav"
    assert _fit(tiny_recipe, fresh, {"train.max_steps": "1"})["loader"].startswith("PyAV")
    assert steps_of(fresh) != steps_of(whole)[:1]  # other gray levels
    summary = _fit(tiny_recipe, out, KEEP_ALL)
    assert summary["loader"].startswith("DALI decodes on the CPU (as the checkpoint says)")
    assert steps_of(out) == steps_of(whole)
    final = Path("checkpoints", "step_00000008.pt")
    one, other = (CheckpointStore(f / "checkpoints").load(f / final) for f in (out, whole))
    _equal_states(one, other)
    assert one["decoders"] == other["decoders"] == ["dali, scaled by dali"] * 2


@pytest.mark.needs_dali_video
def test_a_run_whose_decoder_is_gone_does_not_resume(tiny_recipe, tmp_path, monkeypatch):
    _fit(tiny_recipe, tmp_path / "run", {"train.max_steps": "1"})
    monkeypatch.setattr(decoders, "dali_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"decoders: .*'dali, scaled by dali'.* -> .*'pyav, scal"):
        _fit(tiny_recipe, tmp_path / "run")
    _fit(tiny_recipe, tmp_path / "run", resume_allow=["decoders"])


@pytest.mark.needs_extension
def test_fused_batch_norm_resumes_with_identical_bits(undisturbed, tiny_recipe, tmp_path, steps_of):
    whole, _ = undisturbed
    fused = {"model.batch_norm": "fused", **KEEP_ALL}
    _fit(tiny_recipe, tmp_path / "whole", fused)
    _fit(tiny_recipe, tmp_path / "run", {"train.max_steps": "5", **fused})
    _fit(tiny_recipe, tmp_path / "run", fused)
    steps = steps_of(tmp_path / "run")
    assert steps == steps_of(tmp_path / "whole")
    assert steps != steps_of(whole)  # other roundings
    assert steps[0][1] == pytest.approx(steps_of(whole)[0][1], rel=1e-4)  # loss


@pytest.mark.needs_cuda
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_cuda_run_resumes_with_identical_bits(mode, tiny_recipe, tmp_path, steps_of):
    cuda = {"run.device": "cuda", "run.deterministic": "true", "precision.mode": mode, **KEEP_ALL}
    _fit(tiny_recipe, tmp_path / "whole", cuda)
    _fit(tiny_recipe, tmp_path / "run", {"train.max_steps": "5", **cuda})
    _fit(tiny_recipe, tmp_path / "run", cuda)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")


def test_a_folder_in_use_is_refused_and_untouched(tiny_recipe, tmp_path):
    owner = RunFolder(tmp_path / "run")
    owner.acquire()
    with pytest.raises(ConfigError, match="in use by process"):
        _fit(tiny_recipe, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "log.txt"]
    owner.release()


def test_a_folder_that_nothing_can_be_written_to_is_one_sentence(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk, without one
    try:
        with pytest.raises(ConfigError, match="cannot be used as a run folder: File too large"):
            RunFolder(tmp_path / "run").acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = RunFolder(tmp_path / "run")
    folder.acquire()  # the lock is not held
    folder.release()


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, caplog, capsys):
    folder = RunFolder(tmp_path)
    folder.log.symlink_to("/dev/full")
    folder.acquire()
    try:
        logging.getLogger("accel").warning("one")
        logging.getLogger("accel").warning("two")
    finally:
        folder.release()
    told = f"{folder.log} cannot be written (No space left on device)."
    assert caplog.messages == ["one", told, "two"]
    assert capsys.readouterr().err == ""


def test_divergence_stops_before_anything_non_finite_is_saved(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    overrides = {"optim.lr": "1e30", "optim.clip_norm": "0", "schedule.kind": "constant"}
    with pytest.raises(DivergedError, match=r"diverged at iteration.*Last checkpoint: "):
        _fit(tiny_recipe, out, {**overrides, **KEEP_ALL})
    found = json.loads((out / "diverged.json").read_text())
    assert set(found["gradient_norms_of_groups"].values()) & {"nan", "inf"}
    assert len(found["videos"]) == load_recipe(tiny_recipe).train.global_batch
    assert all(Path(video).exists() for video in found["videos"])
    loaded = CheckpointStore(out / "checkpoints").load_latest()
    if loaded is not None:
        assert all(torch.isfinite(t.double()).all() for t in loaded[1]["model"].values())


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_autocast_runs_are_finite_and_near_fp32(mode, undisturbed, tiny_recipe, tmp_path, steps_of):
    out = tmp_path / mode
    _fit(tiny_recipe, out, {"precision.mode": mode, "train.max_steps": "2", "model.dropout": "0"})
    reference = tmp_path / "fp32"
    _fit(tiny_recipe, reference, {"train.max_steps": "2", "model.dropout": "0"})
    for (_, loss, _, _), (_, expected, _, _) in zip(
        steps_of(out), steps_of(reference), strict=True
    ):
        assert loss == pytest.approx(expected, rel=0.02)


def test_dry_run_reports_and_leaves_nothing(tiny_recipe, tmp_path):
    trainer = Trainer(load_recipe(tiny_recipe), tmp_path / "scratch", resume="none")
    try:
        report = dry_run(trainer)
    finally:
        trainer.close()
    assert report["clips"] == [4, 4, 32, 32, 3]
    assert report["logits"] == [4, 8]
    assert (report["steps_per_epoch"], report["total_steps"]) == (4, 8)
    assert not (tmp_path / "scratch" / "checkpoints").exists()


def test_batch_sizes_must_divide(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        load_recipe(tiny_recipe, {"train.global_batch": "10"})


def test_detectors_have_no_blocks_to_checkpoint():
    with pytest.raises(ConfigError, match=r"train\.checkpoint_activations: expected none"):
        load_recipe("demo_tubes", {"train.checkpoint_activations": "block"})
