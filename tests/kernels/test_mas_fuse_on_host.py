"""mas_fuse: the CUDA kernels compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
from collections.abc import Callable

import pytest
import torch

from kernels import reference

pytestmark = pytest.mark.needs_nvcc

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc DType
# Relative to the sum of absolute terms: twice the rounding of the type, plus the fp32 accumulation.
BOUND = {
    torch.float32: 2.0**-19,
    torch.float64: 2.0**-46,
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}
PIXELS_PER_UNIT = 32


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "N", "T", "P", "C", "r")),
        *((name, ctypes.c_void_p) for name in ("x", "m", "d", "b", "w")),
    ]


class Forward(Shape):
    _fields_ = [("out", ctypes.c_void_p)]


class Backward(Shape):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "dx", "dm", "dd", "dw", "db")),
        *((name, ctypes.c_void_p) for name in ("dw_partial", "db_partial", "dm_partial")),
        ("pixels_per_unit", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("mas_fuse_fwd", "mas_fuse_bwd")


def exact(leaves: list[torch.Tensor], grad: torch.Tensor, T: int) -> list[torch.Tensor]:
    """out, dx, dm, dd, db, dw in fp64."""
    x, m, d, b, w = (leaf.double().requires_grad_() for leaf in leaves)
    out = reference.mas_fuse(x, m, b, d, w, num_segments=T)
    return [out, *torch.autograd.grad(out, (x, m, d, b, w), grad.double())]


def scales(leaves: list[torch.Tensor], grad: torch.Tensor, T: int) -> list[torch.Tensor]:
    """The sums of absolute terms: every product as if no sign could cancel."""
    x, m, d, b, w = (leaf.double() for leaf in leaves)
    shares = torch.unflatten(d, 1, (2, -1)).softmax(1)
    s0, s1 = (shares[:, i].repeat_interleave(T, 0) for i in (0, 1))
    x, m, b, w, g = x.abs(), m.abs(), b.abs(), w.abs(), grad.double().abs()
    y = torch.einsum("njhw,cj->nchw", m, b)
    h = reference.temporal_taps(g, w.flip(1), num_segments=T)
    q = s0 * y + s1 * x
    ds = s0 * s1 * h * (y + x)
    dd = torch.unflatten(ds, 0, (-1, T)).sum(1)
    taps = w.clone().requires_grad_()
    (dw,) = torch.autograd.grad(reference.temporal_taps(q, taps, num_segments=T), taps, g)
    dm = torch.einsum("nchw,cj->njhw", s0 * h, b)
    db = torch.einsum("nchw,njhw->cj", s0 * h, m)
    out = reference.temporal_taps(q, w, num_segments=T)
    return [out, s1 * h, dm, torch.cat([dd, dd], 1), db, dw]


CASES = [
    # N, T, P, C, r, offset into the allocations
    (2, 8, 40, 16, 1, 0),
    (1, 9, 33, 72, 2, 0),
    (2, 2, 5, 64, 3, 0),
    (1, 16, 7, 128, 8, 0),  # several channel blocks
    (1, 1, 1, 8, 4, 0),
    (1, 5, 6, 3, 10, 0),  # two groups of columns of b
    (2, 4, 6, 64, 8, 1),  # misaligned: the scalar kernels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernels_match_reference(device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple) -> None:
    N, T, P, C, r, offset = sizes
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(rows: int, channels: int) -> torch.Tensor:
        flat = torch.randn(offset + rows * P * channels, generator=generator).to(dtype)
        return flat[offset:].view(rows, P, 1, channels).permute(0, 3, 1, 2)

    x, grad, m = activation(N * T, C), activation(N * T, C), activation(N * T, r)
    d = activation(N, 2 * C)
    b = torch.randn(C, r, generator=generator).to(wide)
    w = torch.randn(C, 3, generator=generator).to(wide)
    out, dx, dm, dd, db, dw = (torch.full_like(t, torch.nan) for t in (x, x, m, d, b, w))
    units = N * -(-P // PIXELS_PER_UNIT)
    dw_partial = dw if units == 1 else w.new_full((units, *w.shape), torch.nan)
    db_partial = db if units == 1 else b.new_full((units, *b.shape), torch.nan)

    shape = (DTYPES[dtype], N, T, P, C, r, *(t.data_ptr() for t in (x, m, d, b, w)))
    forward = Forward(*shape, out.data_ptr())
    backward = Backward(
        *shape,
        *(t.data_ptr() for t in (grad, dx, dm, dd, dw, db, dw_partial, db_partial)),
        None,
        PIXELS_PER_UNIT,
    )
    blocks = device.accel_mas_fuse_bwd_channel_blocks(ctypes.byref(backward))
    if blocks > 1:
        dm_partial = w.new_full((blocks, m.numel()), torch.nan)
        backward.dm_partial = dm_partial.data_ptr()

    def run(reverse: bool) -> list[torch.Tensor]:
        device.host_cuda_reverse(int(reverse))
        assert device.accel_mas_fuse_fwd(ctypes.byref(forward), None) == 0
        assert device.accel_mas_fuse_bwd(ctypes.byref(backward), None) == 0
        return [tensor.clone() for tensor in (out, dx, dm, dd, db, dw)]

    first = run(reverse=False)
    leaves = [x, m, d, b, w]
    for actual, expected, scale in zip(
        first, exact(leaves, grad, T), scales(leaves, grad, T), strict=True
    ):
        error = (actual.double() - expected).abs()
        assert (error <= BOUND[actual.dtype] * scale + 1e-300).all(), (error / scale).max()

    # Every bit again, with blocks and threads in the opposite order.
    assert all(map(torch.equal, first, run(reverse=True)))
