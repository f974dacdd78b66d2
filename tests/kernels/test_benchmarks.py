"""The measuring scripts of profile/ keep working: small CPU runs, and the report without a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernels

PROFILE = Path(__file__).resolve().parents[2] / "profile"


def load(name: str) -> ModuleType:
    """A script of profile/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"profile_{name}", PROFILE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_original_chain_computes_the_same(per_sample: bool, gated: bool) -> None:
    x = torch.randn(8, 6, 3, 5, dtype=torch.float64)
    w = torch.randn((2, 6, 3) if per_sample else (6, 3), dtype=torch.float64)
    a = torch.rand(2, 4, 6, dtype=torch.float64) if gated else None
    expected = kernels.temporal_taps(x, w, a, num_segments=4, backend="reference")
    actual = load("kernels_bench").original_chain(x, w, a, 4)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.needs_extension
def test_kernels_bench_measures_every_implementation() -> None:
    bench = load("kernels_bench")
    timer = bench.Timer("cpu", warmups=0, repeats=1)
    rows = list(bench.temporal_taps_rows(timer, [(8, 4)], 1, 2, torch.float32))
    assert len(rows) == 2 * 3 * 2  # forms, implementations, directions
    assert {row.implementation for row in rows} == {"cpp", "reference", "original"}
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
    assert "| tests | passed | 1.5 | 3 passed |" in text and "| build | not run | | |" in text
