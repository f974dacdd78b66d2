"""`python train.py` as a process: kills, signals, several processes."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EVERY_STEP = ("--checkpoint.every_steps", "1")


def _wait_for_step(out, iteration, process, timeout_s=120):
    """Return once the journal has a line for `iteration`."""
    journal = Path(out) / "metrics.jsonl"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if journal.exists() and f'"iteration": {iteration},' in journal.read_text():
            return
        if process.poll() is not None:
            raise AssertionError(f"train.py ended early: {process.communicate()}")
        time.sleep(0.01)
    raise AssertionError(f"no line for iteration {iteration} within {timeout_s} s")


def _finish(process, code=0):
    output, errors = process.communicate(timeout=180)
    assert process.returncode == code, errors
    return output, errors


@pytest.fixture
def undisturbed(train_process, tmp_path, steps_of):
    """Journal of an uninterrupted run."""
    output, _ = _finish(train_process("--out", str(tmp_path / "whole"), "--json"))
    summary = json.loads(output.splitlines()[-1])
    assert {"val_top1", "val_loss", "clips_per_s", "data_wait", "wall_s", "checkpoint"} <= set(
        summary
    )
    return steps_of(tmp_path / "whole")


def test_kill_9_in_the_middle_of_an_epoch(train_process, undisturbed, tmp_path, steps_of):
    out = str(tmp_path / "killed")
    process = train_process("--out", out, *EVERY_STEP)
    _wait_for_step(out, 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    _finish(train_process("--out", out, "--resume", "auto", *EVERY_STEP))
    assert steps_of(out) == undisturbed
    assert not list(Path(out).rglob("*.tmp-*"))


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]
)
def test_signals_save_and_the_same_command_continues(
    train_process, undisturbed, tmp_path, steps_of, signum, code
):
    out = str(tmp_path / "stopped")
    process = train_process("--out", out)
    _wait_for_step(out, 1, process)
    process.send_signal(signum)
    _, errors = _finish(process, code)
    assert "The same command continues" in errors
    assert "Traceback" not in errors
    assert len(list((Path(out) / "checkpoints").glob("*.pt"))) >= 1
    _finish(train_process("--out", out))
    assert steps_of(out) == undisturbed


def test_a_second_process_is_refused_while_the_first_works(train_process, tmp_path):
    out = str(tmp_path / "run")
    first = train_process("--out", out, "--schedule.epochs", "200")
    _wait_for_step(out, 0, first)
    _, errors = _finish(train_process("--out", out, "--schedule.epochs", "200"), 2)
    assert "in use by process" in errors
    first.send_signal(signal.SIGTERM)
    _finish(first, 143)


@pytest.mark.multi_process
@pytest.mark.parametrize("name", ["tanet", "amsnet"])  # without and with an auxiliary head
def test_two_processes_see_the_clips_and_losses_of_one(train_process, tmp_path, steps_of, name):
    # Two ranks x micro-batch 4 = one process x 2 accumulated micro-batches of 4.
    options = ("--model.dropout", "0", "--model.name", name)
    _finish(train_process("--out", str(tmp_path / "one"), *options))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output, _ = _finish(
        train_process("--out", str(tmp_path / "two"), *options, "--json", launcher=torchrun)
    )
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert [row[0] for row in one] == [row[0] for row in two] == list(range(8))
    for (_, loss, lr, norm), (_, other_loss, other_lr, other_norm) in zip(one, two, strict=True):
        assert lr == other_lr
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    assert json.loads(output.splitlines()[-1])["val_num_clips"] == 16
