"""host_cuda.h itself: shuffles, barriers, and the sanitizer that watches what kernels touch."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.needs_nvcc

HERE = Path(__file__).parent
SANITIZE = "address,undefined"

WARP_SUM = r"""
__global__ void sum_kernel(const float* in, float* out) {
  __shared__ float warps[3];
  float value = in[blockIdx.x * 96 + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(~0u, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = warps[0] + warps[1] + warps[2];
}
extern "C" void block_sums(const float* in, float* out) {
  ACCEL_LAUNCH(sum_kernel, 4, 96, nullptr, in, out);
}
"""


OUT_OF_BOUNDS = r"""
__global__ void copy_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}
extern "C" void copy_shifted(const float* in, float* out, int count) {
  ACCEL_LAUNCH(copy_kernel, 1, count, nullptr, in, out);
}
"""

BAD_TEST = """
import ctypes, pathlib, torch

def test_copy(build_for_host):
    library = build_for_host(pathlib.Path({source!r}))
    values, out = torch.zeros(64), torch.zeros(64)
    library.copy_shifted(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), {count}
    )
"""


def test_shuffles_and_barriers(tmp_path: Path, build_for_host: Callable[..., ctypes.CDLL]) -> None:
    source = tmp_path / "warp_sum.cu"
    source.write_text(WARP_SUM)
    library = build_for_host(source)
    values = torch.arange(4 * 96, dtype=torch.float32)
    out = torch.empty(4)
    library.block_sums(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert torch.equal(out, values.view(4, 96).sum(1))


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process whose allocator and kernels on the host are watched."""
    found = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", *arguments],
        env={
            **os.environ,
            "ACCEL_SANITIZE": SANITIZE,
            "LD_PRELOAD": found.stdout.strip(),
            # Python keeps its memory; fibres switch stacks, which the stack check cannot follow.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "OMP_NUM_THREADS": "1",
        },
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("count", "sound"), [(63, True), (64, False)])
def test_sanitizer_sees_one_element_too_many(tmp_path: Path, count: int, sound: bool) -> None:
    source = tmp_path / "copy.cu"
    source.write_text(OUT_OF_BOUNDS)
    test = tmp_path / "test_bad.py"
    test.write_text(BAD_TEST.format(source=str(source), count=count))
    (tmp_path / "conftest.py").write_text(
        (HERE / "conftest.py")
        .read_text()
        .replace("Path(__file__).resolve().parents[2]", f"Path({str(HERE.parents[1])!r})")
        .replace('Path(__file__).with_name("host_cuda.h")', f"Path({str(HERE / 'host_cuda.h')!r})")
    )
    result = run_sanitized(str(test), "--rootdir", str(tmp_path), "-c", os.devnull)
    assert (result.returncode == 0) == sound, result.stdout + result.stderr
    assert ("heap-buffer-overflow" in result.stderr) != sound


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(HERE.glob("test_*_on_host.py")), ids=lambda p: p.stem)
def test_kernels_stay_inside_their_tensors(path: Path) -> None:
    result = run_sanitized(str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
