"""profile/step.py at a tiny size: every mode gives rows beside TSN; refusals are one sentence."""

import contextlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

PROFILE = Path(__file__).resolve().parents[2] / "profile"
TINY = "--frames 4 --size 32 --depth 18 --width 8 --stages 2 --stem small --steps 5".split()


def _load(name, monkeypatch):
    """A script of profile/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"profile_{name}", PROFILE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the script with arguments; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
        code = _load("step", monkeypatch).main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("mode", ["compute", "loader", "train"])
def test_every_mode_measures_beside_tsn(run, tiny_root, mode):
    data = [] if mode == "compute" else ["--data", str(tiny_root)]
    arguments = ["--mode", mode, "--models", "tanet", "--batch", "2", *TINY, *data, "--json"]
    code, out, _ = run(*arguments)
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    assert [row["model"] for row in report["models"]] == ["tsn", "tanet"]
    tsn, tanet = report["models"]
    assert tsn["ratio_to_tsn"] == tsn["ratio_to_tsn_min"] == 1
    assert tanet["ratio_to_tsn"] == pytest.approx(tanet["step_ms"] / tsn["step_ms"], abs=1e-3)
    for row in report["models"]:
        assert 0 < row["min_ms"] <= row["p10_ms"] <= row["step_ms"] <= row["p90_ms"]
        assert row["clips_per_s"] == pytest.approx(2e3 / row["step_ms"], rel=1e-3)
        assert row["cpu_ms"] > 0
        assert ("loss" in row) == (mode != "loader")
        assert ("gflop_per_clip" in row) == (mode == "compute")
    assert report["machine"]["copy_gb_s"] > 0
    assert {"revision", "torch_threads", "device"} <= report["environment"].keys()


def test_batch_norm_of_a_network_can_be_chosen(run):
    names = ["tsn@torch", "tsn@fused"]
    code, out, _ = run("--models", ",".join(names), "--batch", "2", *TINY, "--json")
    rows = json.loads(out.splitlines()[-1])["models"]
    assert code == 0 and [row["model"] for row in rows] == ["tsn", *names]
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-3)
    code, _, err = run("--models", "tsn@cudnn")
    assert code == 2 and "model.batch_norm: got 'cudnn'" in err
    code, _, err = run("--models", "tsn+slow")
    assert code == 2 and '"+compile" or "+graph" at the end, got \'tsn+slow\'' in err
    code, _, err = run("--models", "tsn+graph")
    assert code == 2 and "tsn+graph: CUDA graphs need --device cuda" in err


def test_nchw_computes_the_same_in_another_layout(run):
    losses = []
    for layout in ("channels_last", "nchw"):
        _, out, _ = run("--models", "tanet", "--batch", "2", *TINY, "--layout", layout, "--json")
        losses.append([row["loss"] for row in json.loads(out.splitlines()[-1])["models"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_refusals_are_one_sentence(run):
    code, out, err = run("--models", "tanett")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "unknown network 'tanett'; known are" in err
    code, _, err = run("--batch", "0")
    assert code == 2 and err == "step: --batch: expected a number >= 1, got 0.\n"
    code, _, err = run("--models", "tanet:slow")
    assert code == 2 and "model.variant" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(run):
    code, _, err = run("--device", "cuda")
    assert code == 2 and "sees no CUDA device" in err


def test_steps_as_graphs_share_one_memory_pool(monkeypatch):
    """The way of `+graph` up to its replays, with the steps of a CPU in place of a GPU's."""
    step = _load("step", monkeypatch)
    devices, pools, replays, numbers = [], [], [], itertools.count()

    def capture(self, work, pool):
        pools.append(pool)
        return lambda: replays.append(work())

    monkeypatch.setattr(step.DeviceGraphs, "__init__", lambda self, device: devices.append(device))
    monkeypatch.setattr(step.DeviceGraphs, "new_pool", lambda self: next(numbers))
    monkeypatch.setattr(step.DeviceGraphs, "side_stream", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(step.DeviceGraphs, "watch", lambda self: contextlib.nullcontext([]))
    monkeypatch.setattr(step.DeviceGraphs, "capture", capture)
    arguments = ["--device", "cuda", "--batch", "2", *TINY, "--warmups", "3"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    with monkeypatch.context() as pretended:
        pretended.setattr(torch.cuda, "is_available", lambda: True)
        args = step.parse_args()
    assert args.device.index is not None  # torch.cuda.default_generators needs one
    labels = ["tsn", "tsn+graph", "tanet+graph"]
    chosen = {label: step.parsed(label, args) for label in labels}
    monkeypatch.setattr(step, "parsed", lambda label, args: chosen[label])
    args.device = torch.device("cpu")
    networks = step.measure_here(labels, args, step.Clock(args.device), {})
    assert devices == [args.device] and pools == [0, 0]
    # A counted step, three warm-ups and five measured ones, of which the first three are eager.
    assert len(replays) == 2 * (1 + 3 + 5 - 3)
    assert not any("graph_problem" in network.described() for network in networks)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu(run, precision):
    arguments = ["--models", "tanet,tanet+graph", "--batch", "2", *TINY, "--device", "cuda"]
    arguments.append("--json")
    code, out, _ = run(*arguments, "--precision", precision)
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    assert all(row["peak_gib"] > 0 and row["step_ms"] > 0 for row in report["models"])
    assert not any("graph_problem" in row for row in report["models"])
    assert report["machine"]["gemm_fp16_tflops"] > 0
