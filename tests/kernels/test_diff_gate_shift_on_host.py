"""diff_gate_shift: the CUDA kernels compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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
NAMES = ("x", "z", "v", "m", "c", "w")


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "N", "T", "P", "C", "r")),
        *((name, ctypes.c_void_p) for name in NAMES),
    ]


class Forward(Shape):
    _fields_ = [("y", ctypes.c_void_p)]


class Backward(Shape):
    _fields_ = [
        ("grad", ctypes.c_void_p),
        *((f"d{name}", ctypes.c_void_p) for name in NAMES),
        *((f"d{name}_partial", ctypes.c_void_p) for name in ("m", "c", "w", "z")),
        ("items_per_unit", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("diff_gate_shift_fwd", "diff_gate_shift_bwd")


def make(
    dtype: torch.dtype, N: int, T: int, P: int, C: int, r: int, offset: int
) -> dict[str, Tensor]:
    """x, z, v, grad in channels_last, `offset` elements into their allocations; m, c, w."""
    generator = torch.Generator().manual_seed(0)

    def activation(channels: int) -> Tensor:
        flat = torch.randn(offset + N * T * P * channels, generator=generator).to(dtype)
        return flat[offset:].view(N * T, P, 1, channels).permute(0, 3, 1, 2)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = {"x": activation(C), "z": activation(r), "v": activation(r)}
    for name, shape in (("m", (2, C, r)), ("c", (2, C)), ("w", (C, 3))):
        case[name] = torch.randn(shape, generator=generator).to(wide)
    return {**case, "grad": activation(C)}


def exact(case: dict[str, Tensor], num_segments: int) -> list[Tensor]:
    """y and all gradients in fp64."""
    leaves = [case[name].double().requires_grad_() for name in NAMES]
    y = reference.diff_gate_shift(*leaves, num_segments=num_segments)
    return [y, *torch.autograd.grad(y, leaves, case["grad"].double())]


def scales(case: dict[str, Tensor], num_segments: int) -> list[Tensor]:
    """What rounding errors are relative to: y and gradients of a majorant at absolute values.

    An error of f = m z + c is relative to F = |m| |z| + |c|; the sigmoid s takes on at most a
    quarter of it, s (1 - s) an eighth: F + F^2 / 2 and its derivative 1 + F cover both.
    """
    leaves = [case[name].double().abs().requires_grad_() for name in NAMES]
    x, z, v, m, c, w = leaves
    total = torch.full_like(x, 1.5)
    for i, side in enumerate((z, v)):
        f = torch.einsum("nrhw,cr->nchw", side, m[i]) + c[i][:, None, None]
        total = total + f + f.square() / 2
    y = reference.temporal_taps(x * total, w, num_segments=num_segments)
    return [y, *torch.autograd.grad(y, leaves, case["grad"].double().abs())]


CASES = [
    # N, T, P, C, r, offset
    (2, 8, 21, 16, 8, 0),
    (1, 2, 5, 72, 3, 0),
    (1, 1, 1, 8, 1, 0),
    (2, 9, 19, 3, 2, 0),
    (1, 3, 9, 132, 16, 0),  # two channel tiles in 16 bits, three in fp32
    (1, 8, 6, 256, 12, 0),
    (1, 5, 7, 64, 32, 0),
    (1, 2, 6, 40, 64, 0),  # two passes over the ranks
    (1, 2, 6, 33, 35, 0),
    (2, 8, 6, 64, 8, 1),  # misaligned: the general kernels
]
ITEMS_PER_UNIT = 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernels_match_reference(device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple) -> None:
    N, T, P, C, r, offset = sizes
    case = make(dtype, *sizes)
    outputs = {name: torch.full_like(case[name], torch.nan) for name in NAMES}
    y = torch.full_like(case["x"], torch.nan)
    units = -(-N * -(-T // 8) * P // ITEMS_PER_UNIT)
    width = 8 // dtype.itemsize  # channels of a lane: 8 bytes, if that divides C and the pointers
    tiles = -(-C // (32 * (width if C % width == 0 and offset == 0 else 1)))
    partials = {}
    for name in ("m", "c", "w"):
        value = outputs[name]
        partials[name] = value.new_full((units, value.numel()), torch.nan) if units > 1 else value
    dz_partial = case["m"].new_full((2, tiles, case["z"].numel()), torch.nan)

    fields = {"dtype": DTYPES[dtype], "N": N, "T": T, "P": P, "C": C, "r": r}
    fields |= {name: case[name].data_ptr() for name in NAMES}
    forward = Forward(**fields, y=y.data_ptr())
    backward = Backward(
        **fields,
        **{f"d{name}": value.data_ptr() for name, value in outputs.items()},
        **{f"d{name}_partial": value.data_ptr() for name, value in partials.items()},
        dz_partial=dz_partial.data_ptr() if tiles > 1 else None,
        grad=case["grad"].data_ptr(),
        items_per_unit=ITEMS_PER_UNIT,
    )

    def run(reverse: bool) -> list[Tensor]:
        device.host_cuda_reverse(int(reverse))
        assert device.accel_diff_gate_shift_fwd(ctypes.byref(forward), None) == 0
        assert device.accel_diff_gate_shift_bwd(ctypes.byref(backward), None) == 0
        return [tensor.clone() for tensor in (y, *outputs.values())]

    first = run(reverse=False)
    for name, value, expected, scale in zip(
        ("y", *NAMES), first, exact(case, T), scales(case, T), strict=True
    ):
        error = (value.double() - expected).abs()
        limit = BOUND[value.dtype] * scale + (2.0**-24 if dtype == torch.float16 else 1e-300)
        assert (error <= limit).all(), (name, (error / scale).nan_to_num().max())

    # Every bit again, with blocks and threads in the opposite order.
    assert all(map(torch.equal, first, run(reverse=True)))
