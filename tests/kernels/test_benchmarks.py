"""The measuring scripts of profile/ keep working: small CPU runs, and the report without a GPU."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import _library

PROFILE = Path(__file__).resolve().parents[2] / "profile"


def load(name: str) -> ModuleType:
    """A script of profile/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"profile_{name}", PROFILE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_cases() -> list[pytest.param]:
    """Every case of every operator at a tiny size."""
    bench = load("kernels_bench")
    backend = "cpp" if _library.AVAILABLE else "reference"
    setting = bench.Setting("cpu", backend, torch.float64, 2, 4, [(64, 6)])
    return [
        pytest.param(case, id=f"{op}-{case.form}")
        for op in bench.OPS
        for case in importlib.import_module(f"kernel_cases.{op}").cases(setting)
    ]


@pytest.mark.parametrize("case", small_cases())
def test_original_chain_computes_the_same(case: object) -> None:
    expected = case.codes["reference"]
    expected = expected.function(*expected.inputs)
    for code in case.codes.values():
        actual = code.function(*code.inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", small_cases())
def test_every_implementation_is_measured(case: object) -> None:
    bench = load("kernels_bench")
    rows = list(bench.measure(bench.Timer("cpu", warmups=0, repeats=1), case, False))
    assert len(rows) == len(case.codes) * len(case.floor_bytes)
    assert {row.implementation for row in rows} == set(case.codes)
    assert all(row.median_us > 0 and row.gb_s > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert load("gpu_check").main() == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_gpu_check_reports_what_ran_and_what_did_not() -> None:
    section = {"outcome": "passed", "seconds": 1.5, "last_line": "3 passed"}
    text = load("gpu_check").markdown({"env": {"gpu": "none"}, "tests": section})
    assert "- gpu: none" in text
    assert "| tests | passed | 1.5 | 3 passed |" in text and "| build | not run |  |  |" in text
