"""bn_act: the CUDA kernels compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import reference

pytestmark = pytest.mark.needs_nvcc

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc DType
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
EPS, MOMENTUM, UNIT = 1e-5, 0.1, 64  # rows or pixels of a work unit of small shapes


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("dtype", "frames", "pixels", "channels")]


class Statistics(Shape):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "mean", "var", "running_mean", "running_var")),
        ("momentum", ctypes.c_double),
        ("partial", ctypes.c_void_p),
        ("rows_per_unit", ctypes.c_int),
    ]


class Norm(Shape):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "mean", "var")),
        ("eps", ctypes.c_double),
        ("relu", ctypes.c_int),
    ]


class Forward(Norm):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "shortcut", "y", "mask", "pooled", "pooled_partial")
        ),
        ("pixels_per_unit", ctypes.c_int),
    ]


class Backward(Norm):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "grad_pooled", "x", "mask")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias", "partial")),
        ("rows_per_unit", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("count", "dx", "dshortcut")),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("bn_act_fwd", "bn_act_bwd")


class Case:
    """Tensors of one call, `offset` elements into their allocations."""

    def __init__(
        self, dtype: torch.dtype, B: int, P: int, C: int, offset: int, form: dict[str, bool]
    ) -> None:
        generator = torch.Generator().manual_seed(B + P + C)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.form, self.dtype, self.size = form, dtype, (B, P, C)

        def activation() -> Tensor:
            flat = torch.randn(offset + B * P * C, generator=generator).to(dtype)
            return flat[offset:].view(B, P, 1, C).permute(0, 3, 1, 2)

        def channels() -> Tensor:
            return torch.randn(C, generator=generator).to(wide)

        self.x, self.shortcut, self.grad = activation(), activation(), activation()
        self.weight, self.bias, self.running_mean = channels(), channels(), channels()
        self.running_var = channels().exp()
        self.grad_pooled = torch.randn(B, C, generator=generator).to(wide)
        if not form["shortcut"]:
            self.shortcut = None
        if not form["pool"]:
            self.grad_pooled = None

    def expected(self) -> list[Tensor]:
        """y, dx, dweight, dbias, the running statistics; then dshortcut and pooled, if any."""
        form = self.form
        leaves = [
            v.double().requires_grad_()
            for v in (self.x, self.weight, self.bias, self.shortcut)
            if v is not None
        ]
        running = [self.running_mean.double().clone(), self.running_var.double().clone()]
        outputs = reference.bn_act(
            *leaves[:3],
            *running,
            leaves[3] if form["shortcut"] else None,
            relu=form["relu"],
            training=form["training"],
            momentum=MOMENTUM,
            eps=EPS,
            pool=form["pool"],
        )
        outputs = list(outputs) if form["pool"] else [outputs]
        grads = [self.grad.double()] + ([self.grad_pooled.double()] if form["pool"] else [])
        dx, dweight, dbias, *dshortcut = torch.autograd.grad(outputs, leaves, grads)
        return [outputs[0], dx, dweight, dbias, *running, *dshortcut, *outputs[1:]]

    def run(self, device: ctypes.CDLL, reverse: bool) -> list[Tensor]:
        """The same from the kernels; in the backward pass y > 0 comes from the mask, if any."""
        device.host_cuda_reverse(int(reverse))
        (B, P, C), form, w = self.size, self.form, self.weight

        def pointer(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        def launch(name: str, params: ctypes.Structure) -> None:
            assert getattr(device, f"accel_bn_act_{name}")(ctypes.byref(params), None) == 0

        def fresh(*shape: int) -> Tensor:
            return w.new_full(shape, torch.nan)

        shape = dict(dtype=DTYPES[self.dtype], frames=B, pixels=P, channels=C)
        units, pixel_units = -(-B * P // UNIT), -(-P // UNIT)
        running = [self.running_mean.clone(), self.running_var.clone()]
        mean, var = running
        if form["training"]:
            mean, var, partial = fresh(C), fresh(C), fresh(units, 2, C)
            launch(
                "statistics",
                Statistics(
                    **shape,
                    x=pointer(self.x),
                    mean=pointer(mean),
                    var=pointer(var),
                    running_mean=pointer(running[0]),
                    running_var=pointer(running[1]),
                    momentum=MOMENTUM,
                    partial=pointer(partial),
                    rows_per_unit=UNIT,
                ),
            )
        norm = dict(
            **shape,
            weight=pointer(w),
            bias=pointer(self.bias),
            mean=pointer(mean),
            var=pointer(var),
            eps=EPS,
            relu=int(form["relu"]),
        )
        y, dx, dshortcut = (torch.full_like(self.x, torch.nan) for _ in range(3))
        mask = None
        if form["relu"] and (form["shortcut"] or not form["training"]):
            mask = torch.full((B * P * -(-C // 8),), 0xAA, dtype=torch.uint8)
        pooled = fresh(B, C) if form["pool"] else None
        pooled_partial = fresh(pixel_units, B, C) if form["pool"] and pixel_units > 1 else pooled
        launch(
            "fwd",
            Forward(
                **norm,
                x=pointer(self.x),
                shortcut=pointer(self.shortcut),
                y=pointer(y),
                mask=pointer(mask),
                pooled=pointer(pooled),
                pooled_partial=pointer(pooled_partial),
                pixels_per_unit=UNIT,
            ),
        )
        dweight, dbias, partial = fresh(C), fresh(C), fresh(units, 2, C)
        count = w.new_tensor([B * P])
        backward = Backward(
            **norm,
            grad=pointer(self.grad),
            grad_pooled=pointer(self.grad_pooled),
            x=pointer(self.x),
            mask=pointer(mask),
            dweight=pointer(dweight),
            dbias=pointer(dbias),
            partial=pointer(partial),
            rows_per_unit=UNIT,
            count=pointer(count if form["shortcut"] else None),
            dx=pointer(dx),
            dshortcut=pointer(dshortcut if form["shortcut"] else None),
        )
        launch("bwd_sums", backward)
        if not form["training"]:
            backward.dweight = backward.dbias = None
            if mask is not None:
                backward.x = None
        launch("bwd", backward)
        extra = [t for t in (dshortcut if form["shortcut"] else None, pooled) if t is not None]
        return [y, dx, dweight, dbias, *running, *extra]


SIZES = [
    # B, P, C, offset
    (2, 49, 16, 0),
    (3, 5, 72, 0),
    (2, 70, 64, 0),  # two work units in a frame
    (5, 1, 8, 0),
    (2, 35, 3, 0),
    (2, 6, 64, 1),  # misaligned: element by element
]
FORMS = [
    dict(shortcut=False, relu=True, training=True, pool=False),
    dict(shortcut=False, relu=True, training=True, pool=True),
    dict(shortcut=True, relu=True, training=True, pool=False),
    dict(shortcut=True, relu=True, training=False, pool=True),
    dict(shortcut=False, relu=True, training=False, pool=False),
    dict(shortcut=True, relu=False, training=True, pool=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_match_reference(device: ctypes.CDLL, dtype: torch.dtype, size: tuple) -> None:
    for form in FORMS:
        case = Case(dtype, *size, form)
        first = case.run(device, reverse=False)
        for actual, expected in zip(first, case.expected(), strict=True):
            # One rounding of the result, and those of the sums.
            own, wide = ROUNDING[actual.dtype], ROUNDING[case.weight.dtype]
            bound = 1.01 * own * expected.abs() + 64 * wide * expected.abs().max() + 2.0**-24
            if dtype == torch.float64:
                bound -= 2.0**-24  # fp16's smallest step
            pooled = actual.shape == size[:1] + size[2:3]
            if pooled:  # of rounded values
                bound = bound + ROUNDING[dtype] * case.expected()[0].abs().mean((2, 3))
            error = (actual.double() - expected).abs()
            assert (error <= bound).all(), (form, (error / bound).max())
        # Every bit again, with blocks and threads in the opposite order.
        assert all(map(torch.equal, first, case.run(device, reverse=True)))
