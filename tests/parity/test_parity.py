"""Every golden case, one test each."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from accel.models import norm

HERE = Path(__file__).parent
CASES = sorted(
    path
    for path in (HERE.parent / "golden").rglob("*.json")
    if "case" in json.loads(path.read_text(encoding="utf-8"))
)
TAM_CASE = HERE.parent / "golden" / "tanet" / "tam_c64_t8_train.json"


def _runner():
    spec = importlib.util.spec_from_file_location("run_cases", HERE / "run_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_cases = _runner()


@pytest.fixture(scope="module")
def families():
    return run_cases.load_families()


def test_there_are_cases():
    assert CASES


def _params():
    for path in CASES:
        case = json.loads(path.read_text(encoding="utf-8"))["case"]
        name = f"{path.parent.name}-{path.stem}"
        if ".network" in case["family"] or case["family"] == "amsnet.cstp_neck":
            yield pytest.param(path, "auto", id=name, marks=pytest.mark.slow)
            if path.parent.name == "tanet":
                marks = [pytest.mark.slow, pytest.mark.needs_extension]
                yield pytest.param(path, "fused", id=f"{name}-fused", marks=marks)
        elif case["args"].get("outputs"):  # a module, not a table
            yield pytest.param(path, "reference", id=f"{name}-reference")
            marks = pytest.mark.needs_extension
            yield pytest.param(path, "cpp", id=f"{name}-cpp", marks=marks)
            if "block" in path.stem or "bottleneck" in path.stem:
                yield pytest.param(path, "fused", id=f"{name}-fused", marks=marks)
        else:
            yield pytest.param(path, "auto", id=name)


@pytest.mark.parametrize(("path", "backend"), list(_params()))
def test_case(path, backend, families, monkeypatch):
    if backend == "fused":  # batch norms too, which "auto" leaves to PyTorch
        monkeypatch.setattr(norm, "_FUSED_IS_FASTER", frozenset({"cpu"}))
        backend = "cpp"
    if backend != "auto":
        monkeypatch.setenv("ACCEL_KERNELS", backend)
    verdict = run_cases.run_case(path, families)
    assert not verdict.problems
    assert verdict.checked


@pytest.fixture
def case(tmp_path):
    """A copy of one small case: (json path, json content, arrays), and `write` to store changes."""

    class Copy:
        def __init__(self):
            self.path = tmp_path / "copy.json"
            self.content = json.loads(TAM_CASE.read_text(encoding="utf-8"))
            self.arrays = dict(np.load(TAM_CASE.with_suffix(".npz")))

        def write(self) -> str:
            self.path.write_text(json.dumps(self.content), encoding="utf-8")
            np.savez(self.path.with_suffix(".npz"), **self.arrays)
            return str(self.path.parent)

    return Copy()


def test_runner_passes_an_intact_copy(case, capsys):
    assert run_cases.main([case.write()]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("array", ["output", "grad_input:x", "grad:G.0.weight"])
def test_runner_finds_a_changed_array(case, capsys, array):
    case.arrays[array] = case.arrays[array] * (1 + 1e-6)
    assert run_cases.main([case.write()]) == 1
    assert f"{array}: off by" in capsys.readouterr().out


def test_runner_finds_a_changed_buffer_and_nan(case, capsys):
    case.arrays["after:L.1.num_batches_tracked"] += 1
    case.arrays["output"][0] = np.nan
    assert run_cases.main([case.write()]) == 1
    out = capsys.readouterr().out
    assert "after:L.1.num_batches_tracked: off by" in out
    assert "output: off by" in out


def _unknown_family(case):
    case.content["case"]["family"] = "tanet.other"


def _extra_argument(case):
    case.content["case"]["args"]["depth"] = 50


def _missing_argument(case):
    del case.content["case"]["args"]["alpha"]


def _unchecked_array(case):
    case.arrays["extra"] = np.zeros(3)


def _lost_array(case):
    del case.arrays["output"]


def _other_shapes(case):
    case.content["state_dict"]["G.0.weight"] = [16, 9]


def _present_gradient(case):
    case.content["case"]["args"]["absent_gradients"] = ["G.0.weight"]


def _malformed_record(case):
    case.content["case"]["args"]["outputs"][0] = {"array": "output"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown_family, 'family "tanet.other" is not known'),
        (_extra_argument, "unknown ['depth']"),
        (_missing_argument, "missing ['alpha']"),
        (_unchecked_array, "extra: stored, but no record names it"),
        (_lost_array, "output: the npz has no such array"),
        (_other_shapes, "state_dict differs"),
        (_present_gradient, "G.0.weight: has a gradient"),
        (_malformed_record, "KeyError"),
    ],
)
def test_runner_reports(case, capsys, change, message):
    change(case)
    assert run_cases.main([case.write()]) == 1
    assert message in capsys.readouterr().out


def test_runner_reports_files_it_cannot_read(case, capsys):
    folder = Path(case.write())
    (folder / "bad.json").write_text("{", encoding="utf-8")
    (folder / "no_case.json").write_text("{}", encoding="utf-8")
    case.path.with_suffix(".npz").write_bytes(b"PK\x03\x04")
    assert run_cases.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "0 passed, 2 failed" in out
    assert "cannot be read" in out
    assert "copy.npz" in out
    case.path.with_suffix(".npz").unlink()
    assert run_cases.main([str(folder), "-k", "copy"]) == 1
    assert "FileNotFoundError" in capsys.readouterr().out


def test_runner_fails_without_cases(tmp_path, capsys):
    assert run_cases.main([str(tmp_path)]) == 1
    assert "no case found" in capsys.readouterr().out
    assert run_cases.main([str(tmp_path / "missing")]) == 1
    assert "no such folder" in capsys.readouterr().out


def test_runner_as_a_script(tmp_path):
    command = [
        HERE / "run_cases.py",
        TAM_CASE.parent,
        "-k",
        TAM_CASE.stem,
        "--kernels",
        "reference",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 passed, 0 failed\n")


def test_runner_calibrates_and_differentiates_losses():
    """Running statistics from one training forward; a loss beside the cotangents; features."""
    module_case, goldens = sys.modules["module_case"], run_cases.goldens
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU(inplace=True))
    state = {f"bn.{key}": list(value.shape) for key, value in norm[0].state_dict().items()}
    args = {
        "mode": "eval",
        "dtype": "float64",
        "calibrated": True,
        "calibration_input": "calib",
        "calibration_shape": [6, 3],
        "calibration_momentum": 1.0,
        "inputs": [{"arg": "x", "fill": "x", "shape": [2, 3]}],
        "cotangents": [],
    }
    results = module_case.run_module(
        goldens.Case(Path("none.json"), "norm", args, {"state_dict": state}),
        norm,
        published=lambda name: name.replace("0.", "bn."),
        forward=lambda x: {"y": norm(x)},
        features={"bn": "0", "x": module_case.Feature("0", of_input=True, view=lambda x: x.mT)},
        losses=lambda outputs: {"loss": outputs["y"].sum(), "part": outputs["y"].max()},
    )
    calibration = goldens.fill_input("calib", [6, 3])
    assert np.allclose(results.arrays["buffer", "bn.running_mean"], calibration.mean(0))
    assert np.allclose(results.arrays["buffer", "bn.running_var"], calibration.var(0, ddof=1))
    assert norm[0].momentum == 0.1
    x = goldens.fill_input("x", [2, 3])
    scale = goldens.fill_value("bn.weight", [3]) / np.sqrt(calibration.var(0, ddof=1) + 1e-5)
    shift = goldens.fill_value("bn.bias", [3])
    before = (x - calibration.mean(0)) * scale + shift
    assert np.allclose(results.arrays["feature", "bn"], before)
    assert np.allclose(results.arrays["feature", "x"], x.T)
    assert np.allclose(results.arrays["loss", "loss"], np.maximum(before, 0).sum())
    assert np.allclose(results.arrays["loss", "part"], before.max())
    assert np.allclose(results.arrays["grad_input", "x"], (before > 0) * scale)


def test_runner_reads_sampled_records_and_gradient_norms(case):
    """The record form of the other systems: `.sample` with `.stats`, and `grad_norms`."""
    tam = run_cases.goldens.read_case(TAM_CASE)
    results = run_cases.load_families()[tam.family].run(tam)
    y = results.arrays["output", "output"]
    order = ["G.0.weight", "L.3.weight"]
    norms = [np.linalg.norm(results.arrays["grad_param", name]) for name in order]
    tolerance = {"rtol_of_max": 1e-9, "rtol": 0.0, "atol": 1e-12}
    case.content["param_order"] = order
    case.content["case"]["args"]["outputs"] = [
        {"array": "y", "kind": "output", "of": "output", "shape": list(y.shape), "stride": 7}
        | tolerance,
        {"array": "n", "kind": "grad_norms", "of": "param_order", "shape": [2], "stride": 1}
        | tolerance,
    ]
    case.arrays = {
        "y.sample": y.reshape(-1)[::7],
        "y.stats": np.array([y.sum(), np.linalg.norm(y), np.abs(y).max()]),
        "n": np.array(norms),
    }
    folder = case.write()
    assert run_cases.main([folder]) == 0
    case.arrays["y.stats"][2] *= 1.001
    case.write()
    assert run_cases.main([folder]) == 1
