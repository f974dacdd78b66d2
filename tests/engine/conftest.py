"""A tiny generated dataset and recipe: four optimizer steps per epoch, seconds per run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN_PY = Path(__file__).resolve().parents[2] / "train.py"

RECIPE = """
data: {{root: {root}, train_list: train.txt, val_list: val.txt, classes_file: classes.txt}}
sampling: {{num_segments: 4}}
augment: {{size: 32, scales: [1.0, 0.875], resize: 32, flip: false}}
loader: {{threads: 1}}
model: {{depth: 18, width: 8, stages: 2, dropout: 0.5}}
optim: {{lr: 0.02}}
schedule: {{kind: onecycle, epochs: 2}}
train: {{global_batch: 8, micro_batch: 4}}
log: {{tensorboard: false, progress_s: 0.001}}
run: {{threads: 1, device: cpu}}
"""


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """32 train and 16 val clips of motion8 with their lists."""
    from pipelines.synthetic import generate_motion8

    folder = tmp_path_factory.mktemp("motion8")
    return generate_motion8(folder, num_train=32, num_val=16, progress=False)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_root, tmp_path_factory):
    """Path of a recipe over `tiny_root`."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(root=tiny_root))
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Media indices of the tests do not touch the user's cache."""
    previous = os.environ.get("ACCEL_CACHE")
    os.environ["ACCEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if previous is None:
        del os.environ["ACCEL_CACHE"]
    else:
        os.environ["ACCEL_CACHE"] = previous


@pytest.fixture
def train_process(tiny_recipe):
    """Start `python train.py` on the tiny recipe; returns the Popen."""
    processes = []

    def start(*arguments, launcher=()):
        command = [sys.executable, *launcher, str(TRAIN_PY), "--recipe", tiny_recipe, *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def steps_of():
    """Reads a run's journal: [(iteration, loss, lr, grad_norm)] of the steps, in file order."""

    def read(out):
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        return [
            (row["iteration"], row["loss"], row["lr"], row["grad_norm"])
            for row in rows
            if "event" not in row
        ]

    return read
