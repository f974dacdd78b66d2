"""A tiny generated dataset and recipe: four optimizer steps per epoch, seconds per run."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
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
def train_process(tiny_recipe, tmp_path_factory):
    """Start `python train.py` on the tiny recipe; returns the Popen.

    M2: whatever became of it, nothing of it may be left: processes, shared memory, temporary files.
    """
    processes = []
    segments = _abandoned_segments()

    def start(*arguments, launcher=()):
        command = [sys.executable, *launcher, str(TRAIN_PY), "--recipe", tiny_recipe, *arguments]
        scratch = tmp_path_factory.mktemp("scratch")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that its own processes can be told
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        out = dict(itertools.pairwise(arguments)).get("--out")
        processes.append((process, launcher, scratch, out))
        return process

    yield start
    unfinished = [process for process, *_ in processes if process.poll() is None]
    for process in unfinished:  # the test has failed
        os.killpg(process.pid, signal.SIGKILL)
    for process, launcher, scratch, out in processes:
        process.communicate()
        if process in unfinished or process.returncode == -signal.SIGKILL:
            continue
        deadline = time.monotonic() + 5
        while (left := _session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"processes of {process.args} are left: {left}"
        files = []
        if not launcher:  # torchrun leaves its folder of logs, torch its cache
            files = [f for f in scratch.iterdir() if not f.name.startswith("torchinductor_")]
        files += list(Path(out).rglob("*.tmp*")) if out else []
        assert not files, f"{process.args} has left {files}"
    assert not _abandoned_segments() - segments


def _session(leader):
    """Command lines of the living processes of a session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *facts = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(facts[2]) == leader and state != "Z":
                found[folder.name] = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
    return found


def _abandoned_segments():
    """Shared memory that no process uses."""
    found = {str(path) for path in Path("/dev/shm").iterdir()}
    for maps in Path("/proc").glob("[0-9]*/maps") if found else ():
        try:
            found -= set(re.findall(r"/dev/shm/\S+", maps.read_text()))
        except OSError:
            continue
    return found


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
