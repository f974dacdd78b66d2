"""deform_conv: compiled operator against the reference, borders, layouts, messages."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import reference

needs_extension = pytest.mark.needs_extension
DEVICES = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[needs_extension, pytest.mark.needs_cuda]),
]
# Of the sum of absolute terms: roundings of weight, columns and result; fp32 and fp64 accumulation.
BOUND = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-18,
    torch.float16: 4 * 2.0**-11,
    torch.bfloat16: 4 * 2.0**-8,
}
LAST = torch.channels_last

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def make(
    B: int,
    C: int,
    outputs: int,
    k: int,
    size: tuple[int, int],
    *,
    biased: bool = True,
    spread: float = 1.5,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    start: int = 0,
) -> Inputs:
    """x and offset in channels_last, `start` elements into their allocations, weight and bias.

    `spread` is the standard deviation of the offsets in pixels. All require gradients.
    """
    generator = torch.Generator().manual_seed(B * 1000 + C * 100 + k)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(channels: int, scale: float) -> Tensor:
        flat = scale * torch.randn(start + B * channels * size[0] * size[1], generator=generator)
        return flat.to(device, dtype)[start:].view(B, *size, channels).permute(0, 3, 1, 2)

    x, offset = activation(C, 1.0), activation(2 * k * k, spread)
    weight = torch.randn(outputs, C, k, k, generator=generator).to(device, wide) / math.sqrt(
        C * k * k
    )
    weight = weight.contiguous(memory_format=LAST)
    bias = torch.randn(outputs, generator=generator).to(device, wide) if biased else None
    leaves = [None if v is None else v.requires_grad_() for v in (x, offset, weight, bias)]
    return tuple(leaves)


def incoming(y: Tensor) -> Tensor:
    """A gradient of y that depends on the position."""
    grad = torch.linspace(-1, 2, y.numel(), device=y.device).to(y.dtype)
    return grad.view(y.shape).contiguous(memory_format=LAST)


def run(inputs: Inputs, backend: str | None = None) -> list[Tensor]:
    """out and the gradients of x, offset, weight and bias."""
    y = kernels.deform_conv(*inputs, backend=backend)
    return [y, *torch.autograd.grad(y, [v for v in inputs if v is not None], incoming(y))]


def assert_close(actual: list[Tensor], inputs: Inputs) -> None:
    """Against the reference in fp64, within BOUND of the sums of the absolute terms."""
    exact = tuple(None if v is None else v.detach().double().requires_grad_() for v in inputs)
    absolute = tuple(
        v if v is None or i == 1 else v.detach().abs().requires_grad_() for i, v in enumerate(exact)
    )
    y = reference.deform_conv(*exact)
    grad = incoming(y.to(inputs[0].dtype)).double()
    expected = [y, *torch.autograd.grad(y, [v for v in exact if v is not None], grad)]
    scale_y = reference.deform_conv(*absolute)
    present = [v for v in absolute if v is not None]
    scales = [scale_y, *torch.autograd.grad(scale_y, present, grad.abs())]
    # The offset's gradient has differences of pixels as factors: their absolute values by a bound.
    columns = torch.einsum("bohw,ocq->bqhw", grad.abs(), absolute[2].flatten(2))
    scales[2] = 4 * exact[0].abs().max() * columns.repeat_interleave(2, 1)
    for value, wanted, scale in zip(actual, expected, scales, strict=True):
        bound = BOUND[value.dtype] if value.dtype == inputs[0].dtype else BOUND[torch.float32]
        if value.shape == inputs[2].shape:  # dweight: of columns that may have been rounded
            bound = BOUND[inputs[0].dtype]
        error = (value.double() - wanted).abs()
        # Positions are fp32: a share near 0 has an absolute error. fp16: its smallest step.
        smallest = 0.0 if inputs[0].dtype == torch.float64 else 2.0**-21 * scale.max()
        smallest += 2.0**-24 * (inputs[0].dtype == torch.float16)
        assert (error <= bound * scale + smallest).all()


def test_formula() -> None:
    """The reference against the formula written as loops, far outside the map and on its edges."""
    B, C, k, H, W = 2, 2, 3, 3, 4
    x, offset, weight, bias = (v.detach() for v in make(B, C, 3, k, (H, W), spread=2.0))
    offset[:, :6] = offset[:, :6].round()  # whole numbers: -1 and H are outside

    def pixel(b: int, i: int, j: int) -> Tensor:
        return x[b, :, i, j] if 0 <= i < H and 0 <= j < W else torch.zeros(C, dtype=x.dtype)

    def sample(b: int, y: float, z: float) -> Tensor:
        if not (-1 < y < H and -1 < z < W):
            return torch.zeros(C, dtype=x.dtype)
        i, j = math.floor(y), math.floor(z)
        u, v = y - i, z - j
        upper = (1 - v) * pixel(b, i, j) + v * pixel(b, i, j + 1)
        return (1 - u) * upper + u * ((1 - v) * pixel(b, i + 1, j) + v * pixel(b, i + 1, j + 1))

    expected = torch.empty(B, 3, H, W, dtype=x.dtype)
    for b, i, j in itertools.product(range(B), range(H), range(W)):
        total = bias.clone()
        for q in range(k * k):
            dy, dz = offset[b, 2 * q, i, j].item(), offset[b, 2 * q + 1, i, j].item()
            total += weight[:, :, q // k, q % k] @ sample(
                b, i - k // 2 + q // k + dy, j - k // 2 + q % k + dz
            )
        expected[b, :, i, j] = total
    actual = kernels.deform_conv(x, offset, weight, bias, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_without_offsets_it_is_a_convolution(k: int, device: str) -> None:
    x, offset, weight, bias = make(2, 8, 6, k, (7, 5), spread=0.0, device=device)
    actual = kernels.deform_conv(x, offset, weight, bias)
    torch.testing.assert_close(actual, F.conv2d(x, weight, bias, padding=k // 2))


SHAPES = [
    # B, C, O, k, (H, W)
    (1, 1, 1, 1, (1, 1)),
    (3, 8, 16, 3, (7, 7)),
    (9, 16, 16, 5, (7, 7)),
    (2, 20, 6, 3, (5, 9)),
    (1, 72, 8, 5, (4, 3)),
    (2, 32, 8, 3, (17, 20)),
    (1, 3, 2, 7, (2, 40)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple, dtype: torch.dtype, device: str) -> None:
    for biased in (False, True):
        inputs = make(*shape, biased=biased, dtype=dtype, device=device)
        actual = run(inputs)
        assert actual[0].is_contiguous(memory_format=LAST)
        assert [v.dtype for v in actual[1:]] == [v.dtype for v in inputs if v is not None]
        assert actual[0].dtype == dtype
        assert_close(actual, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [-1.0, 1.0, -2.0, 7.0, 1e30, -math.inf, math.nan])
def test_samples_on_and_beyond_the_border(value: float, device: str) -> None:
    inputs = make(2, 8, 4, 3, (3, 4), device=device)
    inputs[1].data[:, ::3] = value
    assert_close(run(inputs), inputs)
    actual, expected = run(inputs), run(inputs, "reference")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [1, 2, 8])
def test_misaligned_storage(start: int, device: str) -> None:
    inputs = make(2, 16, 8, 3, (3, 5), dtype=torch.float16, device=device, start=start)
    assert_close(run(inputs), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_slice_of_the_batch_and_weight_in_other_strides(device: str) -> None:
    x, offset, weight, bias = (v.detach() for v in make(6, 8, 4, 3, (5, 5), device=device))
    inputs = (x[1:4], offset[1:4], weight.contiguous(), bias.repeat_interleave(2)[::2])
    inputs = tuple(v.requires_grad_() for v in inputs)
    assert_close(run(inputs), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_splits_into_frames(device: str) -> None:
    """Any batch size, and no frame sees another."""
    x, offset, weight, bias = (v.detach() for v in make(7, 8, 8, 5, (6, 6), device=device))
    together = kernels.deform_conv(x, offset, weight, bias)
    for b in range(7):
        alone = kernels.deform_conv(x[b : b + 1], offset[b : b + 1], weight, bias)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(20, 16, 16, 3, (7, 7)), (3, 32, 32, 5, (28, 28)), (1, 8, 8, 3, (56, 56))], ids=str
)
def test_repeats_bit_by_bit(shape: tuple, dtype: torch.dtype, device: str) -> None:
    inputs = make(*shape, dtype=dtype, device=device)
    first = run(inputs)
    threads = torch.get_num_threads()
    try:
        for repeat in range(4):
            torch.set_num_threads(1 + repeat % 3)
            assert all(map(torch.equal, first, run(inputs)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_overflow_is_visible_in_the_gradients(value: float, device: str) -> None:
    """A loss scale that is too large must not end as finite numbers."""
    inputs = make(2, 8, 4, 3, (4, 4), dtype=torch.float32, device=device)
    y = kernels.deform_conv(*inputs)
    grad = incoming(y)
    grad[1, 2, 2, 2] = value
    for result in torch.autograd.grad(y, inputs, grad):
        assert not torch.isfinite(result).all()


def test_gradcheck_of_the_reference() -> None:
    inputs = make(1, 2, 1, 3, (2, 2))
    assert torch.autograd.gradcheck(reference.deform_conv, inputs)
    assert torch.autograd.gradgradcheck(reference.deform_conv, inputs, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck_of_the_operator(k: int, device: str) -> None:
    inputs = make(2, 2, 3, k, (3, 2), device=device)
    assert torch.autograd.gradcheck(kernels.deform_conv, inputs)


# Layouts, backends and messages.


@needs_extension
def test_operator_refuses_other_layouts_and_gradients() -> None:
    x, offset, weight, bias = (v.detach() for v in make(2, 8, 4, 3, (3, 3)))
    operator = torch.ops.accel_kernels.deform_conv
    with pytest.raises(ValueError, match="deform_conv: weight must be contiguous in channels_last"):
        operator(x, offset, weight.contiguous(), bias)
    with pytest.raises(ValueError, match=r"grad must be \[B, O, H, W\]"):
        torch.ops.accel_kernels.deform_conv_backward(x, x, offset, weight, [True] * 4)


BAD_ARGUMENTS = {
    "rank": (lambda x, o, w, b: (x[0], o, w, b), "x must be"),
    "channels": (lambda x, o, w, b: (x, o, w[:, :4], b), r"weight must be \[O, C, k, k\] with C ="),
    "even": (lambda x, o, w, b: (x, o, w[..., :2, :2], b), "weight must be .*k odd"),
    "oblong": (lambda x, o, w, b: (x, o, w[..., :1], b), "weight must be .*k odd"),
    "offsets": (lambda x, o, w, b: (x, o[:, :9], w, b), r"offset must be \[B, 2\*k\*k, H, W\] = "),
    "float_offsets": (lambda x, o, w, b: (x, o.float(), w, b), "offset must be .* as x is"),
    "bias": (lambda x, o, w, b: (x, o, w, b[:3]), r"bias must be \[O\] = \[4\], got \[3\]"),
    "half_weight": (lambda x, o, w, b: (x, o, w.half(), b), "weight must be .*, got"),
    "half_bias": (lambda x, o, w, b: (x, o, w, b.half()), "bias must be .*, got"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=needs_extension)])
def test_bad_arguments(name: str, direct: bool) -> None:
    """The front end and the operator itself both refuse, with the same words."""
    change, message = BAD_ARGUMENTS[name]
    arguments = change(*(v.detach() for v in make(2, 8, 4, 3, (3, 3))))
    with pytest.raises((ValueError, TypeError), match=f"^deform_conv: {message}"):
        if direct:
            x, offset, *rest = arguments
            if x.dim() == 4:
                x, offset = (v.contiguous(memory_format=LAST) for v in (x, offset))
            torch.ops.accel_kernels.deform_conv(x, offset, *rest)
        else:
            kernels.deform_conv(*arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_fp32_activations_alone(device: str) -> None:
    inputs = make(2, 8, 4, 3, (5, 5), dtype=torch.float32, device=device)
    expected = run(inputs)
    with torch.autocast(device, torch.bfloat16):
        assert all(map(torch.equal, run(inputs), expected))
