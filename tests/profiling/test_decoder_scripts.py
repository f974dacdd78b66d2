"""profile/decoder_frames.py and data_wait.py on a CPU: what they find, and say without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "tests/data/hmdb51"


@pytest.fixture
def frames() -> ModuleType:
    path = ROOT / "profile/decoder_frames.py"
    spec = importlib.util.spec_from_file_location("profile_decoder_frames", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.needs_dali_video
def test_frames_of_another_decoder(
    frames: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = CLIPS / "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.webm"
    arguments = ["decoder_frames.py", str(clip), str(clip.with_suffix(".mp4")), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert frames.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = report["frames"]  # the only one of four that is read here
    assert row["same"] and row["mean_difference"] < 2.5 and row["wrong_frames"] == 0
    assert "there is no GPU" in report["left_out"]["dali_gpu"][0] or torch.cuda.is_available()
    # One frame late: noticed wherever neighbors differ.
    real = frames.read_frames

    def late(sample, **options):
        indices = (sample.frame_indices + 1).clip(max=sample.info.num_frames - 1)
        return real(replace(sample, frame_indices=indices), **options)

    monkeypatch.setattr(frames, "read_frames", late)
    row = frames.compare(clip, "dali", torch.device("cpu"), tmp_path)
    assert row["wrong_frames"] >= row["told_apart"] - 1 > 0


@pytest.mark.multi_process
def test_data_wait_is_reported_per_decoder(tmp_path: Path) -> None:
    options = {
        "videos": 2, "frames": 24, "batch": 2, "steps": 2, "recipe": "own_videos",
        "model.depth": 18, "model.width": 8, "model.stages": 2, "augment.size": 32,
        "augment.resize": 32, "loader.threads": 1,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "profile/data_wait.py"), "--json"]
    command += ["--decoders", "dali_gpu", "pyav"]
    command += [f"--{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCEL_CACHE": str(tmp_path)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout.splitlines()[-1])
    gpu, pyav = report["data_wait"]
    assert gpu["decoder"] == "dali_gpu" and "there is no GPU" in gpu["problem"]
    assert 0 <= pyav["data_wait"] <= 1 and pyav["met"] == (pyav["data_wait"] < report["ask"])
    assert pyav["loader"].startswith("PyAV decodes") and pyav["train_clips_per_s"] > 0
