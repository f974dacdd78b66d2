"""temporal_taps: the CUDA kernels compiled as C++ and run on the host (see host_cuda.h)."""

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
        *((name, ctypes.c_int) for name in ("dtype", "N", "T", "P", "C", "w_per_sample")),
        *((name, ctypes.c_void_p) for name in ("w", "a")),
    ]


class Forward(Shape):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("transposed", ctypes.c_int)]


class Backward(Shape):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "grad", "dx", "dw", "da", "dw_partial", "da_partial")
        ),
        ("pixels_per_unit", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("temporal_taps_fwd", "temporal_taps_bwd")


def make(
    dtype: torch.dtype, N: int, T: int, P: int, C: int, per_sample: bool, gated: bool, offset: int
) -> dict[str, torch.Tensor | None]:
    """x, grad [N*T, C, P, 1] in channels_last, `offset` elements into their allocations; w, a."""
    generator = torch.Generator().manual_seed(0)

    def activation() -> torch.Tensor:
        flat = torch.randn(offset + N * T * P * C, generator=generator).to(dtype)
        return flat[offset:].view(N * T, P, 1, C).permute(0, 3, 1, 2)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.randn((N, C, 3) if per_sample else (C, 3), generator=generator).to(wide)
    a = torch.rand(N, T, C, generator=generator).to(wide) if gated else None
    return {"x": activation(), "grad": activation(), "w": w, "a": a}


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def shape_fields(case: dict, N: int, T: int, P: int, C: int) -> dict:
    w, a = case["w"], case["a"]
    return {
        "dtype": DTYPES[case["x"].dtype],
        **{"N": N, "T": T, "P": P, "C": C, "w_per_sample": int(w.dim() == 3)},
        **{"w": pointer(w), "a": pointer(a)},
    }


def exact(case: dict, num_segments: int, absolute: bool) -> tuple[torch.Tensor, ...]:
    """y, dx, dw, da in fp64; of absolute values throughout for the scale of the rounding errors."""
    inputs = {
        name: None if value is None else (value.abs() if absolute else value).double()
        for name, value in case.items()
    }
    leaves = [inputs[name].requires_grad_() for name in ("x", "w", "a") if case[name] is not None]
    y = reference.temporal_taps(inputs["x"], inputs["w"], inputs["a"], num_segments=num_segments)
    return (y, *torch.autograd.grad(y, leaves, inputs["grad"]))


def check(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, bound: float) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= bound * scale + 1e-300).all(), (error / scale).nan_to_num().max()


CASES = [
    # N, T, P, C, per_sample, gated, offset
    (2, 8, 49, 16, True, True, 0),
    (3, 2, 5, 72, False, False, 0),
    (1, 1, 1, 8, True, False, 0),
    (2, 9, 35, 3, False, True, 0),
    (1, 16, 40, 64, True, True, 0),
    (2, 8, 6, 64, False, True, 1),  # misaligned: the scalar kernels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernels_match_reference(device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple) -> None:
    N, T, P, C, per_sample = sizes[:5]
    case = make(dtype, *sizes)
    fields = shape_fields(case, N, T, P, C)
    x, grad, w, a = (case[name] for name in ("x", "grad", "w", "a"))
    y, dx, dx_alone = (torch.full_like(x, torch.nan) for _ in range(3))
    dw, da = torch.full_like(w, torch.nan), None if a is None else torch.full_like(a, torch.nan)

    pixel_units, frame_units = -(-P // 32), -(-T // 8)
    dw_rows = pixel_units * frame_units * (1 if per_sample else N)
    dw_partial = w.new_full((dw_rows, *w.shape), torch.nan) if dw_rows > 1 else dw
    da_partial = da if a is None or pixel_units == 1 else a.new_empty(pixel_units, *a.shape)
    forward = Forward(**fields, x=pointer(x), y=pointer(y), transposed=0)
    transposed = Forward(**fields, x=pointer(grad), y=pointer(dx_alone), transposed=1)
    backward = Backward(
        **fields,
        **{"x": pointer(x), "grad": pointer(grad), "dx": pointer(dx)},
        **{"dw": pointer(dw), "da": pointer(da)},
        **{"dw_partial": pointer(dw_partial), "da_partial": pointer(da_partial)},
        pixels_per_unit=32,
    )

    def run(reverse: bool) -> list[torch.Tensor]:
        device.host_cuda_reverse(int(reverse))
        assert device.accel_temporal_taps_fwd(ctypes.byref(forward), None) == 0
        assert device.accel_temporal_taps_fwd(ctypes.byref(transposed), None) == 0
        assert device.accel_temporal_taps_bwd(ctypes.byref(backward), None) == 0
        return [tensor.clone() for tensor in (y, dx, dx_alone, dw, da) if tensor is not None]

    first = run(reverse=False)
    expected, scale = exact(case, T, absolute=False), exact(case, T, absolute=True)
    wide_bound = BOUND[w.dtype]
    check(y, expected[0], scale[0], BOUND[dtype])
    check(dx, expected[1], scale[1], BOUND[dtype])
    check(dx_alone, expected[1], scale[1], BOUND[dtype])
    check(dw, expected[2], scale[2], wide_bound)
    if da is not None:
        check(da, expected[3], scale[3], wide_bound)

    # Every bit again, with blocks and threads in the opposite order.
    assert all(map(torch.equal, first, run(reverse=True)))
