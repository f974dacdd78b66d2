"""diff_gate_shift: the operator against the reference, layouts, dtypes, messages."""

import itertools

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

needs_extension = pytest.mark.needs_extension
DEVICES = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[needs_extension, pytest.mark.needs_cuda]),
]
# Of the sum of absolute terms: two roundings of 16-bit types, fp32 and fp64 accumulation.
BOUND = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-19,
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}
NAMES = ("x", "z", "v", "m", "c", "w")


def make(
    N: int,
    T: int,
    C: int,
    r: int,
    size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    offset: int = 0,
) -> list[Tensor]:
    """x, z, v in channels_last, `offset` elements into their allocations; m, c, w."""
    generator = torch.Generator().manual_seed(N * 1000 + T * 100 + C)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(channels: int) -> Tensor:
        flat = torch.randn(offset + N * T * channels * size[0] * size[1], generator=generator)
        flat = flat.to(device, dtype)[offset:]
        return flat.view(N * T, *size, channels).permute(0, 3, 1, 2)

    def coefficient(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, wide)

    inputs = [activation(C), activation(r), activation(r)]
    inputs += [coefficient(2, C, r), coefficient(2, C), coefficient(C, 3)]
    return [value.requires_grad_() for value in inputs]


def incoming(y: Tensor) -> Tensor:
    """A gradient that depends on the position."""
    grad = torch.linspace(-1, 2, y.numel(), device=y.device).to(y.dtype)
    return grad.view(y.shape).contiguous(memory_format=torch.channels_last)


def run(inputs: list[Tensor], num_segments: int, backend: str | None = None) -> list[Tensor]:
    """y and the gradients of all inputs."""
    y = kernels.diff_gate_shift(*inputs, num_segments=num_segments, backend=backend)
    return [y, *torch.autograd.grad(y, inputs, incoming(y))]


def scale_function(
    x: Tensor, z: Tensor, v: Tensor, m: Tensor, c: Tensor, w: Tensor, num_segments: int
) -> Tensor:
    """Of absolute values: bounds what rounding errors are relative to, in y and its gradients.

    An error of f = m z + c is relative to F = |m| |z| + |c| and reaches s by a factor of at most
    1/4, s (1 - s) by one of at most 1/8: F + F^2 / 2 and its derivative 1 + F cover both.
    """
    total = torch.full_like(x, 1.5)
    for i, side in enumerate((z, v)):
        f = torch.einsum("nrhw,cr->nchw", side, m[i]) + c[i][:, None, None]
        total = total + f + f.square() / 2
    return reference.temporal_taps(x * total, w, num_segments=num_segments)


def assert_close(actual: list[Tensor], inputs: list[Tensor], num_segments: int) -> None:
    exact = [value.detach().double().requires_grad_() for value in inputs]
    absolute = [value.detach().abs().requires_grad_() for value in exact]
    y = reference.diff_gate_shift(*exact, num_segments=num_segments)
    scale = scale_function(*absolute, num_segments)
    grad = incoming(actual[0].detach()).double()
    expected = [y, *torch.autograd.grad(y, exact, grad)]
    scales = [scale, *torch.autograd.grad(scale, absolute, grad.abs())]
    for name, value, wanted, bound in zip(("y", *NAMES), actual, expected, scales, strict=True):
        limit = BOUND[value.dtype] * bound
        if value.dtype == torch.float16:
            limit = limit + 2.0**-24  # fp16's smallest step
        assert ((value.double() - wanted).abs() <= limit + 1e-300).all(), name


def test_formula() -> None:
    """The reference against the formula written as loops."""
    N, T, C, r = 2, 3, 2, 2
    inputs = [value.detach() for value in make(N, T, C, r, (1, 1))]
    x, z, v = (value.view(N, T, -1) for value in inputs[:3])
    m, c, w = inputs[3:]
    q = torch.zeros(N, T + 2, C, dtype=x.dtype)  # one frame of zeros on either side
    for n, t, i in itertools.product(range(N), range(T), range(C)):
        f = sum(m[0, i, j] * z[n, t, j] for j in range(r)) + c[0, i]
        b = sum(m[1, i, j] * v[n, t, j] for j in range(r)) + c[1, i]
        e = 0.5 * (1 / (1 + (-f).exp()) - 0.5) + 0.5 * (1 / (1 + (-b).exp()) - 0.5)
        q[n, t + 1, i] = x[n, t, i] * (1 + e)
    y = sum(w[:, k] * q[:, k : k + T] for k in range(3))
    actual = kernels.diff_gate_shift(*inputs, num_segments=T, backend="reference")
    torch.testing.assert_close(actual, y.view(N * T, C, 1, 1), rtol=0, atol=1e-14)


SHAPES = [
    # N, T, C, r, (H, W)
    (1, 1, 8, 1, (1, 1)),
    (3, 2, 64, 4, (7, 7)),
    (1, 8, 72, 5, (7, 7)),
    (2, 16, 3, 64, (5, 3)),
    (3, 9, 8, 2, (4, 9)),
    (1, 8, 512, 32, (1, 2)),
    (2, 8, 128, 8, (3, 7)),
    (1, 2, 256, 16, (9, 9)),
    (2, 4, 1, 33, (3, 3)),
    (1, 2, 8, 3, (40, 40)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple, dtype: torch.dtype, device: str) -> None:
    inputs = make(*shape, dtype=dtype, device=device)
    actual = run(inputs, shape[1])
    for value, like in zip(actual, [inputs[0], *inputs], strict=True):
        assert value.dtype == like.dtype and value.shape == like.shape
        if value.dim() == 4:
            assert value.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual, inputs, shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_gates(dtype: torch.dtype, device: str) -> None:
    """Far outside the range of exp: gates are 0 or 1, gradients finite."""
    x, z, v, m, c, w = (t.detach() for t in make(1, 2, 16, 2, (3, 3), dtype=dtype, device=device))
    inputs = [value.requires_grad_() for value in (x, z * 1e4, v * 1e4, m, c, w)]
    actual = run(inputs, 2)
    assert all(torch.isfinite(value).all() for value in actual)
    for value, expected in zip(actual, run(inputs, 2, "reference"), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_visible(device: str) -> None:
    inputs = [value.detach() for value in make(1, 2, 16, 2, (3, 3), device=device)]
    inputs[1][1, 0, 2, 2] = torch.nan
    y = kernels.diff_gate_shift(*inputs, num_segments=2)
    assert torch.isnan(y[:, :, 2, 2]).all() and torch.isnan(y).sum() == 2 * 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 8])
def test_misaligned_storage(offset: int, device: str) -> None:
    inputs = make(2, 4, 16, 8, (3, 5), dtype=torch.float16, device=device, offset=offset)
    assert_close(run(inputs, 4), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_slice_of_the_batch(device: str) -> None:
    inputs = make(4, 4, 8, 2, (3, 3), device=device)
    inputs[:3] = [value.detach()[4:12].requires_grad_() for value in inputs[:3]]
    assert_close(run(inputs, 4, "auto"), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_of_any_strides(device: str) -> None:
    inputs = make(2, 4, 8, 2, (3, 3), device=device)
    strided = list(inputs)
    for i in (3, 4, 5):
        value = inputs[i].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not value.is_contiguous()
        strided[i] = value.requires_grad_()
    assert all(map(torch.equal, run(strided, 4), run(inputs, 4)))


# Layouts, backends and messages.


@needs_extension
def test_high_ranks_and_other_gradients_are_refused() -> None:
    high_rank = make(1, 2, 4, 65, (2, 2))
    with pytest.raises(RuntimeError, match="but z has 65 channels, more than 64"):
        kernels.diff_gate_shift(*high_rank, num_segments=2, backend="cpp")
    with pytest.raises(ValueError, match=r"m must be \[2, C, r\] = \[2, 4, 1..64\]"):
        torch.ops.accel_kernels.diff_gate_shift(*high_rank, 2)
    inputs = [value.detach() for value in make(2, 4, 8, 2, (3, 3))]
    with pytest.raises(ValueError, match="diff_gate_shift_backward: grad must be like x"):
        torch.ops.accel_kernels.diff_gate_shift_backward(inputs[1], *inputs, 4)


BAD_ARGUMENTS = {
    "rank": (0, lambda x: x[0], "x must be \\[N\\*T, C, H, W\\]"),
    "frames": (0, lambda x: x[:6], "x must hold whole clips of num_segments = 4"),
    "differences": (1, lambda z: z[:, :1], "z must be \\[N\\*T, r, H, W\\] = \\[8, 2, 3, 3\\]"),
    "size": (2, lambda v: v[..., :1], "v must be \\[N\\*T, r, H, W\\] = \\[8, 2, 3, 3\\]"),
    "half": (2, lambda v: v.half(), "v must have the dtype of x"),
    "matrix": (3, lambda m: m[:1], "m must be \\[2, C, r\\] = \\[2, 8, "),
    "offset": (4, lambda c: c[:, :5], "c must be \\[2, C\\] = \\[2, 8\\]"),
    "taps": (5, lambda w: w[:, :2], "w must be \\[C, 3\\] = \\[8, 3\\]"),
    "half_matrix": (3, lambda m: m.half(), "m must be .*, got"),
    "half_offset": (4, lambda c: c.half(), "c must be .*, got"),
    "half_taps": (5, lambda w: w.half(), "w must be .*, got"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=needs_extension)])
def test_bad_arguments(name: str, direct: bool) -> None:
    """The front end and the operator itself both refuse, with the same words."""
    position, change, message = BAD_ARGUMENTS[name]
    inputs = [value.detach() for value in make(2, 4, 8, 2, (3, 3))]
    inputs[position] = change(inputs[position])
    if direct and inputs[position].dim() == 4:
        inputs[position] = inputs[position].contiguous(memory_format=torch.channels_last)
    with pytest.raises((ValueError, TypeError), match=f"^diff_gate_shift: {message}"):
        if direct:
            torch.ops.accel_kernels.diff_gate_shift(*inputs, 4)
        else:
            kernels.diff_gate_shift(*inputs, num_segments=4)
