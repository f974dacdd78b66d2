"""exp and sigmoid of the C++ twins against fp64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "kernels" / "csrc"
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

SOURCE = """
#include "common/host_math.h"
using namespace accel_kernels;
extern "C" void run(const float* x, float* e, float* value, float* complement, int count) {
  for (int i = 0; i < count; ++i) e[i] = exp_nonpositive(-std::abs(x[i]));
  for (int i = 0; i < count; ++i) {
    const Sigmoid<float> both = sigmoid(x[i]);
    value[i] = both.value;
    complement[i] = both.complement;
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("host_math")
    (folder / "run.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "-fno-trapping-math", "-Wall", "-Werror", "-shared", "-fPIC"]
    command = [COMPILER, *flags, f"-I{CSRC}", str(folder / "run.cpp"), "-o", str(folder / "run.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "run.so"))


def run(library: ctypes.CDLL, x: torch.Tensor) -> list[torch.Tensor]:
    outputs = [torch.empty_like(x) for _ in range(3)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *outputs)]
    library.run(*pointers, x.numel())
    return outputs


def test_accuracy(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-87.2, 87.2, 500_001), torch.logspace(-38, 0, 1001)])
    e, value, complement = run(library, x)
    exact = [torch.exp(-x.double().abs()), torch.sigmoid(x.double()), torch.sigmoid(-x.double())]
    for actual, expected, units in zip((e, value, complement), exact, (1, 2, 2), strict=True):
        assert ((actual.double() - expected).abs() / expected).max() <= units * 2.0**-23


def test_extreme_values(library: ctypes.CDLL) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, 87.5, -1e30, torch.inf, -torch.inf, torch.nan])
    e, value, complement = run(library, x)
    nan = torch.nan
    expected = torch.tensor([1, 1, 1, 0, 0, 0, 0, nan])
    torch.testing.assert_close(e, expected, rtol=0, atol=0, equal_nan=True)
    expected = torch.tensor([0.5, 0.5, 0.5, 1, 0, 1, 0, nan])
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(complement, 1 - expected, rtol=0, atol=0, equal_nan=True)
