"""branch_fuse: the CUDA kernels compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
from collections.abc import Callable

import pytest
import torch

from kernels import reference

pytestmark = pytest.mark.needs_nvcc

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc DType
# Relative to the sum of absolute terms: twice the rounding of the type, plus the fp32 accumulation.
BOUND = {
    torch.float32: 2.0**-20,
    torch.float64: 2.0**-48,
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "N", "R", "C")),
        ("s", ctypes.c_void_p),
    ]


class Forward(Shape):
    _fields_ = [("f", ctypes.c_void_p * 3), ("out", ctypes.c_void_p)]


class Backward(Shape):
    _fields_ = [
        ("f", ctypes.c_void_p * 3),
        ("grad", ctypes.c_void_p),
        ("df", ctypes.c_void_p * 3),
        ("ds", ctypes.c_void_p),
        ("ds_partial", ctypes.c_void_p),
        ("rows_per_unit", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("branch_fuse_fwd", "branch_fuse_bwd")


def check(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, bound: float) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= bound * scale + 1e-300).all(), (error / scale).nan_to_num().max()


def pointers(tensors: list[torch.Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * 3)(*(tensor.data_ptr() for tensor in tensors))


CASES = [
    # N, R, C, offset into the allocations
    (2, 70, 64, 0),
    (3, 5, 72, 0),
    (1, 130, 7, 0),
    (1, 1, 8, 0),
    (2, 33, 64, 1),  # misaligned: the scalar kernels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernels_match_reference(device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple) -> None:
    N, R, C, offset = sizes
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation() -> torch.Tensor:
        flat = torch.randn(offset + N * R * C, generator=generator).to(dtype)
        return flat[offset:].view(N, R, C)

    f, grad = [activation() for _ in range(3)], activation()
    s = torch.randn(N, 3, C, generator=generator).to(wide)
    out, df = torch.full_like(grad, torch.nan), [torch.full_like(grad, torch.nan) for _ in range(3)]
    rows_per_unit = 32
    row_units = -(-R // rows_per_unit)
    ds = torch.full_like(s, torch.nan)
    ds_partial = ds if row_units == 1 else s.new_full((row_units, *s.shape), torch.nan)
    shape = (DTYPES[dtype], N, R, C, s.data_ptr())
    forward = Forward(*shape, pointers(f), out.data_ptr())
    backward = Backward(
        *shape,
        *(pointers(f), grad.data_ptr(), pointers(df)),
        *(ds.data_ptr(), ds_partial.data_ptr(), rows_per_unit),
    )

    def run(reverse: bool) -> list[torch.Tensor]:
        device.host_cuda_reverse(int(reverse))
        assert device.accel_branch_fuse_fwd(ctypes.byref(forward), None) == 0
        assert device.accel_branch_fuse_bwd(ctypes.byref(backward), None) == 0
        return [tensor.clone() for tensor in (out, *df, ds)]

    def exact(absolute: bool) -> list[torch.Tensor]:
        """Results in fp64; of absolute values for the scale of the rounding errors."""
        leaves = [t.double().abs() if absolute else t.double() for t in (*f, s)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        maps = [leaf.permute(0, 2, 1)[..., None] for leaf in leaves[:3]]  # [N, C, R, 1]
        y = reference.branch_fuse(*maps, leaves[3], num_segments=1)[..., 0].permute(0, 2, 1)
        cotangent = grad.double().abs() if absolute else grad.double()
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    first = run(reverse=False)
    for actual, expected, scale in zip(first, exact(False), exact(True), strict=True):
        check(actual, expected, scale, BOUND[actual.dtype])
    assert all(map(torch.equal, first, run(reverse=True)))

    # Without ds the branches are not read.
    empty = (ctypes.c_void_p * 3)()
    for tensor in df:
        tensor.fill_(torch.nan)
    alone = Backward(*shape, empty, grad.data_ptr(), pointers(df), None, None, rows_per_unit)
    assert device.accel_branch_fuse_bwd(ctypes.byref(alone), None) == 0
    assert all(map(torch.equal, first[1:4], df))
