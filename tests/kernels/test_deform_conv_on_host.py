"""deform_conv: the CUDA kernels compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
import math
from collections.abc import Callable

import pytest
import torch

from kernels import reference

pytestmark = pytest.mark.needs_nvcc

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc DType
# Relative to the sum of absolute terms: the rounding of the type, plus the fp32 accumulation.
BOUND = {
    torch.float32: 2.0**-19,
    torch.float64: 2.0**-40,  # dx: units of 2^-62 of a bound that is far from being reached
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "B", "C", "H", "W", "k")),
        *((name, ctypes.c_void_p) for name in ("x", "offset")),
    ]


class Columns(Shape):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("first_frame", "frames")),
        ("columns", ctypes.c_void_p),
    ]


class Gradient(Shape):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("first_frame", "frames")),
        *(
            (name, ctypes.c_void_p)
            for name in ("dcolumns", "sum_bound", "dx_sums", "not_finite", "dx", "doffset")
        ),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("deform_conv_fwd", "deform_conv_bwd")


class Case:
    """Inputs, and what the kernels write for the frames [first_frame, B)."""

    def __init__(
        self,
        device: ctypes.CDLL,
        dtype: torch.dtype,
        *,
        sizes: tuple[int, int, int, int, int],
        first_frame: int,
        start: int,
    ) -> None:
        B, C, H, W, k = sizes
        generator = torch.Generator().manual_seed(0)

        def activation(channels: int, scale: float) -> torch.Tensor:
            flat = scale * torch.randn(start + B * channels * H * W, generator=generator)
            return flat.to(dtype)[start:].view(B, H, W, channels).permute(0, 3, 1, 2)

        self.device, self.k, self.first = device, k, first_frame
        self.x, self.offset = activation(C, 1.0), activation(2 * k * k, 1.5)
        self.offset[:, ::5] = self.offset[:, ::5].round()
        self.offset[:, 1] = torch.nan
        frames = B - first_frame
        size = start + frames * H * W * k * k * C
        self.columns = torch.full((size,), torch.nan, dtype=dtype)[start:]
        self.columns = self.columns.view(frames, H, W, k * k, C)
        self.dcolumns = torch.randn(self.columns.shape, generator=generator).to(dtype)
        self.sums = torch.zeros(frames, H, W, C, dtype=torch.int64)
        self.sum_bound = self.dcolumns.double().abs().max() * H * W * k * k
        self.not_finite = torch.zeros(1, dtype=torch.int32)
        self.dx, self.doffset = torch.full_like(self.x, 7.0), torch.full_like(self.offset, 7.0)
        shape = (DTYPES[dtype], B, C, H, W, k, self.x.data_ptr(), self.offset.data_ptr())
        self.shape = (*shape, first_frame, frames)

    def run_columns(self) -> torch.Tensor:
        params = Columns(*self.shape, self.columns.data_ptr())
        assert self.device.accel_deform_conv_columns(ctypes.byref(params), None) == 0
        return self.columns

    def run_gradient(
        self, want_dx: bool = True, want_doffset: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.sums.zero_()
        params = Gradient(
            *self.shape,
            *(self.dcolumns.data_ptr(), self.sum_bound.data_ptr()),
            *(self.sums.data_ptr() if want_dx else None, self.not_finite.data_ptr()),
            *(self.dx.data_ptr(), self.doffset.data_ptr() if want_doffset else None),
        )
        assert self.device.accel_deform_conv_gradient(ctypes.byref(params), None) == 0
        return self.dx[self.first :], self.doffset[self.first :]

    def exact(self, absolute: bool) -> list[torch.Tensor]:
        """Columns, dx, doffset in fp64 from the reference with weights that pick single samples."""
        x, dcolumns = self.x[self.first :].double(), self.dcolumns.double()
        if absolute:
            x, dcolumns = x.abs(), dcolumns.abs()
        offset = self.offset[self.first :].double()
        x.requires_grad_(), offset.requires_grad_()
        taps, channels = self.k**2, x.shape[1]
        picks = torch.eye(taps * channels, dtype=torch.float64)
        picks = picks.view(taps, channels, self.k, self.k, channels).permute(0, 1, 4, 2, 3)
        columns = reference.deform_conv(x, offset, picks.flatten(0, 1))
        columns = columns.permute(0, 2, 3, 1).unflatten(3, (taps, channels))
        return [columns, *torch.autograd.grad(columns, (x, offset), dcolumns)]


CASES = [
    # (B, C, H, W, k), first frame, start of the storage
    ((2, 16, 5, 4, 3), 0, 0),
    ((3, 40, 2, 3, 5), 1, 0),
    ((1, 3, 1, 1, 1), 0, 0),
    ((2, 5, 4, 3, 3), 1, 0),
    ((2, 8, 3, 3, 3), 0, 1),  # misaligned: the scalar kernels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "first_frame", "start"), CASES, ids=str)
def test_kernels_match_reference(
    device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple, first_frame: int, start: int
) -> None:
    case = Case(device, dtype, sizes=sizes, first_frame=first_frame, start=start)
    columns, (dx, doffset) = case.run_columns(), case.run_gradient()
    expected, scale = case.exact(absolute=False), case.exact(absolute=True)
    # The offset's gradient has differences of pixels as factors: their absolute values by a bound.
    terms = case.dcolumns.double().abs().sum(-1).permute(0, 3, 1, 2).repeat_interleave(2, 1)
    scale[2] = 4 * case.x.double().abs().max() * terms
    for actual, exact, of in zip((columns, dx, doffset), expected, scale, strict=True):
        error = (actual.double() - exact).abs()
        # Positions are fp32: a share near 0 has an absolute error. fp16: its smallest step.
        smallest = 2.0**-40 if dtype == torch.float64 else 2.0**-21 * of.max()
        smallest += 2.0**-24 * (dtype == torch.float16)
        assert (error <= BOUND[dtype] * of + smallest).all()
    assert (case.dx[:first_frame] == 7).all() and (case.doffset[:first_frame] == 7).all()
    assert case.not_finite == 0

    # Every bit again, with blocks and threads in the opposite order: of dx no sum has an order.
    first = [columns.clone(), dx.clone(), doffset.clone()]
    device.host_cuda_reverse(1)
    again = [case.run_columns(), *case.run_gradient()]
    device.host_cuda_reverse(0)
    assert all(map(torch.equal, first, again))


def test_wanted_gradients_only(device: ctypes.CDLL) -> None:
    case = Case(device, torch.float32, sizes=(2, 8, 3, 3, 3), first_frame=0, start=0)
    both = [value.clone() for value in case.run_gradient()]
    for wanted in (0, 1):
        case.dx.fill_(7), case.doffset.fill_(7)
        actual = case.run_gradient(want_dx=wanted == 0, want_doffset=wanted == 1)
        assert torch.equal(actual[wanted], both[wanted])
        assert (actual[1 - wanted] == 7).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["column", "bound"])
def test_what_is_not_finite_reaches_dx(device: ctypes.CDLL, value: float, where: str) -> None:
    case = Case(device, torch.float32, sizes=(2, 8, 4, 4, 3), first_frame=0, start=0)
    case.offset.zero_()
    if where == "column":
        case.dcolumns[1, 2, 2, 4, 3] = value
    else:
        case.sum_bound.fill_(value)
    dx, doffset = case.run_gradient()
    assert torch.isnan(dx).all()
    assert torch.isfinite(doffset).all() == (where == "bound")


@pytest.mark.parametrize("exponent", [-60, 60, 100])
def test_any_magnitude(device: ctypes.CDLL, exponent: int) -> None:
    """Gradients far from 1, as loss scaling makes them, keep their relative precision."""
    case = Case(device, torch.float32, sizes=(1, 8, 4, 4, 3), first_frame=0, start=0)
    dx = case.run_gradient()[0].clone()
    factor = 2.0**exponent
    case.dcolumns *= factor
    case.sum_bound *= factor
    assert torch.equal(case.run_gradient()[0], dx * factor)
