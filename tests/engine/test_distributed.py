"""Several processes are one: the same mathematics, one death ends all, a restart is exact."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]
WORKER = Path(__file__).with_name("ddp_worker.py")


def _torchrun(processes, *more):
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *more)


# Processes -> what they train, one after the other; each start of torch costs seconds.
CONFIGURATIONS = {
    1: {
        "tanet": "dropout=0.5",
        "tdn": "model=tdn,steps=3",
        "amsnet": "model=amsnet,steps=3",
        "norms of 4 clips": "model=tsn,micro=4,bn=fused,steps=5",
        "amtnet": "model=amtnet,steps=5",
        "amtnet, whole batch": "model=amtnet,steps=5,micro=12",
    },
    2: {
        "tanet": "dropout=0.5",
        "tdn": "model=tdn,steps=3",
        "amsnet": "model=amsnet,steps=3",
        "fp16": "dropout=0.5,steps=5,compression=fp16",
        "bf16": "dropout=0.5,steps=5,compression=bf16",
        "one micro-batch": "micro=6,steps=5",
        "norms of 4 clips": "model=tsn,micro=2,bn=synchronized,steps=5",
        "norms of 2 clips": "model=tsn,micro=2,steps=1",
        "amtnet": "model=amtnet,steps=5",
    },
    3: {"tanet": "dropout=0.5"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{processes: {configuration: (metrics [steps, 4], weights of rank 0)}}."""
    folder = tmp_path_factory.mktemp("ddp")
    results = {}
    for processes, configurations in CONFIGURATIONS.items():
        out = folder / f"{processes}.pt"
        launcher = _torchrun(processes) if processes > 1 else ()
        command = [sys.executable, *launcher, str(WORKER), str(out), *configurations.values()]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert answer.returncode == 0, answer.stderr
        assert "Grad strides" not in answer.stderr
        stored = torch.load(out, weights_only=True)
        results[processes] = {
            name: (result["metrics"], result["model"])
            for name, result in zip(configurations, stored, strict=True)
        }
    return results


def _largest_difference(one, other):
    scale = max(value.abs().max() for value in one.values())
    return max(float((one[name].double() - other[name]).abs().max() / scale) for name in one)


def test_one_two_and_three_processes_compute_the_same(trained):
    """12 clips per step: 1 x 6, 2 x 3 and 3 x 2 micro-batches of 2, over 20 steps, dropout too."""
    one, weights = trained[1]["tanet"]
    for processes in (2, 3):
        metrics, others = trained[processes]["tanet"]
        assert metrics[:, 0].tolist() == pytest.approx(one[:, 0].tolist(), rel=1e-6)  # loss
        assert metrics[:, 1].tolist() == pytest.approx(one[:, 1].tolist(), rel=1e-5)  # norm
        assert _largest_difference(weights, others) < 1e-6
        assert (metrics[:, 3] == 1).all() and (one[:, 3] == 0).all()  # rank 1 asked to stop
    assert one[-1, 0] != one[0, 0]


@pytest.mark.parametrize("name", ["tdn", "amsnet"])
def test_other_networks_too(trained, name):
    one, weights = trained[1][name]
    two, others = trained[2][name]
    assert two[:, 0].tolist() == pytest.approx(one[:, 0].tolist(), rel=1e-5)
    assert _largest_difference(weights, others) < 1e-5


def test_the_multibox_loss_is_divided_by_the_positives_of_the_whole_batch(trained):
    """12 micro-tubes per step: at once, as 6 micro-batches, and as 2 processes with 3 each."""
    one, weights = trained[1]["amtnet, whole batch"]
    for metrics, others in (trained[1]["amtnet"], trained[2]["amtnet"]):
        assert metrics[:, 0].tolist() == pytest.approx(one[:, 0].tolist(), rel=1e-5)
        assert metrics[:, 1].tolist() == pytest.approx(one[:, 1].tolist(), rel=1e-4)
        assert _largest_difference(weights, others) < 1e-5
    assert one[-1, 0] != one[0, 0]


@pytest.mark.parametrize("compression", ["fp16", "bf16"])
def test_compressed_gradients_are_near_and_not_equal(trained, compression):
    exact = trained[2]["tanet"][0][:5, 0].tolist()
    rounded = trained[2][compression][0][:, 0].tolist()
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded[0] == exact[0] and rounded[1:] != exact[1:]


def test_without_accumulation_the_graph_is_static(trained):
    metrics, _ = trained[2]["one micro-batch"]
    assert metrics[:, 0].isfinite().all() and metrics[-1, 0] != metrics[0, 0]


@pytest.mark.needs_extension
def test_synchronized_batch_norm_sees_the_clips_of_all_processes(trained):
    # tsn: TAM has a norm over one number per frame, which stays per process.
    one, weights = trained[1]["norms of 4 clips"]
    two, others = trained[2]["norms of 4 clips"]
    assert two[:, 0].tolist() == pytest.approx(one[:, 0].tolist(), rel=1e-5)
    assert _largest_difference(weights, others) < 1e-5
    own, _ = trained[2]["norms of 2 clips"]
    assert abs(own[0, 0] - one[0, 0]) > 1e-4


def _rank(launcher, rank, timeout_s=60):
    """Process id of a rank below a launcher."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(parent) == launcher and f"RANK={rank}".encode() in variables:
                return int(folder.name)
        time.sleep(0.05)
    raise AssertionError(f"no rank {rank}")


def _wait_for_line(out, iteration, process, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    journal = Path(out) / "metrics.jsonl"
    while time.monotonic() < deadline:
        if journal.exists() and f'"iteration": {iteration},' in journal.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no such line")


EVERY_STEP = ("--checkpoint.every_steps", "1", "--schedule.epochs", "3")


def test_a_killed_rank_ends_the_job_with_its_number_and_restarts_are_exact(
    train_process, tmp_path, steps_of
):
    whole = train_process("--out", str(tmp_path / "whole"), *EVERY_STEP, launcher=_torchrun(2))
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    out = str(tmp_path / "killed")
    limit = ("--run.timeout_s", "30")
    process = train_process("--out", out, *EVERY_STEP, *limit, launcher=_torchrun(2))
    _wait_for_line(out, 2, process)
    os.kill(_rank(process.pid, 1), signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - start < 30
    assert process.returncode != 0
    assert "error: rank 0: rank 1 ended or cannot be reached" in errors
    assert "bug in accel" not in errors
    # The same command again, this time with a launcher that restarts a job by itself.
    launcher = _torchrun(2, "--max-restarts=1")
    again = train_process("--out", out, *EVERY_STEP, launcher=launcher)
    _wait_for_line(out, 6, again)
    os.kill(_rank(again.pid, 1), signal.SIGKILL)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert steps_of(out) == steps_of(tmp_path / "whole")


def test_ranks_that_disagree_are_refused_at_once(tiny_recipe, tmp_path):
    script = Path(__file__).resolve().parents[2] / "train.py"
    train = f"{sys.executable} {script} --recipe {tiny_recipe} --out {tmp_path / 'run'}"
    other = 'if [ "$RANK" = 1 ]; then set -- --optim.lr 0.03 --run.seed 1; fi; '
    launcher = [sys.executable, *_torchrun(2, "--no-python")]
    answer = subprocess.run(
        [*launcher, "sh", "-c", f'{other}exec {train} "$@"'],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode != 0 and "exitcode  : 2" in answer.stderr
    sentence = "rank 1 differs from rank 0 in optim.lr, run.seed; start every process with the same"
    first, _, torchruns = answer.stderr.partition("Traceback")
    assert first.count(sentence) == 1
    assert f"  traceback : error: {sentence}" in torchruns.partition("Root Cause")[2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
