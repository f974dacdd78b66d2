"""A video that crashes its decoder does not stop a run whose launcher starts it again: row D4."""

import csv
import json

import pytest

# Python imports a module of this name at its start, from the environment's PYTHONPATH.
CRASHING = """
import ctypes
import pipelines.trim as module
original = module.trimmed_stream

def crashing(sample, *arguments):
    if str(sample.path).endswith("train/pan_up/0003.webm"):
        ctypes.string_at(0)
    return original(sample, *arguments)

module.trimmed_stream = crashing
"""


@pytest.mark.needs_dali_video
def test_a_run_goes_on_without_a_video_that_crashes_it(
    train_process, tmp_path, steps_of, monkeypatch, request
):
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/sitecustomize.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'faults'}:{request.config.rootpath}")
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--max-restarts=1")
    arguments = ("--checkpoint.every_steps", "1", "--loader.decoder", "dali")
    process = train_process("--out", str(tmp_path / "run"), *arguments, launcher=launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "SIGSEGV" in errors  # the launcher's report of the first attempt
    with (tmp_path / "run/quarantine.csv").open(newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert row["path"] == "train/pan_up/0003.webm"
    assert row["reason"] == "kills the process that reads it (SIGSEGV)"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [video["path"] for video in summary["unusable"]] == [row["path"]]
    # A run that knows of the video from its beginning takes the same steps.
    process = train_process("--out", str(tmp_path / "again"), *arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "again")
    assert len(steps_of(tmp_path / "run")) == 8
