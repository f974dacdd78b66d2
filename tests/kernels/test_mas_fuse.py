"""mas_fuse: compiled operator against the reference, layouts, dtypes, messages."""

import itertools
from collections.abc import Callable

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
NAMES = ("x", "m", "b", "d", "w")


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
    """x, m, b, d, w that require gradients; x, m, d in channels_last, `offset` elements into their
    allocations."""
    generator = torch.Generator().manual_seed(N * 1000 + T * 100 + C)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(batch: int, channels: int) -> Tensor:
        flat = torch.randn(offset + batch * channels * size[0] * size[1], generator=generator)
        flat = flat.to(device, dtype)[offset:]
        return flat.view(batch, *size, channels).permute(0, 3, 1, 2)

    def coefficient(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, wide)

    inputs = [activation(N * T, C), activation(N * T, r), coefficient(C, r)]
    inputs += [activation(N, 2 * C), coefficient(C, 3)]
    return [value.requires_grad_() for value in inputs]


def incoming(out: Tensor) -> Tensor:
    """A gradient that depends on the position."""
    grad = torch.linspace(-1, 2, out.numel(), device=out.device).to(out.dtype)
    return grad.view(out.shape).contiguous(memory_format=torch.channels_last)


def run(inputs: list[Tensor], num_segments: int, backend: str | None = None) -> list[Tensor]:
    """out and the gradients of all inputs."""
    out = kernels.mas_fuse(*inputs, num_segments=num_segments, backend=backend)
    return [out, *torch.autograd.grad(out, inputs, incoming(out))]


def scale_function(
    x: Tensor, m: Tensor, b: Tensor, d: Tensor, w: Tensor, shares: Tensor, num_segments: int
) -> Tensor:
    """Of absolute values: what the rounding errors of out are relative to, and by its gradients
    those of the gradients. `shares` is the softmax of d: constant here, so that the gradient of |d|
    is s0 s1 sum |h| (|y| + |x|)."""
    s0, s1 = shares.repeat_interleave(num_segments, 0).unbind(1)
    motion = torch.einsum("njhw,cj->nchw", m, b)
    logits = d.unflatten(1, (2, -1)).sum(1).repeat_interleave(num_segments, 0)
    q = s0 * motion + s1 * x + logits * s0 * s1 * (motion + x)
    return reference.temporal_taps(q, w, num_segments=num_segments)


def assert_close(actual: list[Tensor], inputs: list[Tensor], num_segments: int) -> None:
    exact = [value.detach().double().requires_grad_() for value in inputs]
    absolute = [value.detach().abs().requires_grad_() for value in exact]
    shares = exact[3].detach().unflatten(1, (2, -1)).softmax(1)
    out = reference.mas_fuse(*exact, num_segments=num_segments)
    scale = scale_function(*absolute, shares, num_segments)
    grad = incoming(actual[0].detach()).double()
    expected = [out, *torch.autograd.grad(out, exact, grad)]
    scales = [scale, *torch.autograd.grad(scale, absolute, grad.abs())]
    for name, value, wanted, bound in zip(("out", *NAMES), actual, expected, scales, strict=True):
        limit = BOUND[value.dtype] * bound
        if value.dtype == torch.float16:
            limit = limit + 2.0**-24  # fp16's smallest step
        assert ((value.double() - wanted).abs() <= limit + 1e-300).all(), name


def test_formula() -> None:
    """The reference against the formula written as loops."""
    N, T, C, r = 2, 3, 2, 2
    x, m, b, d, w = (value.detach() for value in make(N, T, C, r, (1, 1)))
    x, m, d = x.view(N, T, C), m.view(N, T, r), d.view(N, 2, C)
    q = torch.zeros(N, T + 2, C, dtype=x.dtype)  # one frame of zeros on either side
    for n, t, c in itertools.product(range(N), range(T), range(C)):
        y = sum(b[c, j] * m[n, t, j] for j in range(r))
        e0, e1 = d[n, 0, c].exp(), d[n, 1, c].exp()
        q[n, t + 1, c] = (e0 * y + e1 * x[n, t, c]) / (e0 + e1)
    expected = sum(w[:, k] * q[:, k : k + T] for k in range(3)).view(N * T, C, 1, 1)
    inputs = [value.detach() for value in make(N, T, C, r, (1, 1))]
    actual = kernels.mas_fuse(*inputs, num_segments=T, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


SHAPES = [
    # N, T, C, r, (H, W)
    (1, 1, 8, 1, (1, 1)),
    (3, 2, 64, 1, (7, 7)),
    (1, 8, 72, 3, (7, 7)),
    (2, 16, 3, 2, (5, 3)),
    (3, 9, 8, 4, (4, 9)),
    (1, 8, 512, 8, (1, 1)),
    (1, 2, 256, 4, (8, 9)),
    (2, 4, 1, 1, (3, 3)),
    (1, 3, 1536, 32, (2, 1)),
    (1, 2, 8, 9, (40, 40)),
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
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_misaligned_storage(offset: int, device: str) -> None:
    inputs = make(2, 4, 16, 2, (3, 5), dtype=torch.float16, device=device, offset=offset)
    assert_close(run(inputs, 4), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_extreme_logits(dtype: torch.dtype, device: str) -> None:
    """Shares of exactly 0 and 1, nothing overflows."""
    x, m, b, d, w = make(1, 2, 8, 1, (2, 4), dtype=dtype, device=device)
    d = torch.full_like(d, 3e4)
    d[:, 8:] = -3e4
    d[..., 0, :] *= -1
    inputs = [x, m, b, d.requires_grad_(), w]
    out, *grads = run(inputs, 2)
    assert all(torch.isfinite(value).all() for value in (out, *grads))
    assert torch.count_nonzero(grads[3]) == 0
    assert torch.count_nonzero(grads[0][:, :, 1]) == 0  # all weight on the motion there
    assert torch.count_nonzero(grads[1][:, :, 0]) == 0
    assert_close([out, *grads], inputs, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_the_batch(device: str) -> None:
    x, m, b, d, w = (value.detach() for value in make(4, 4, 8, 2, (3, 3), device=device))
    inputs = [value.requires_grad_() for value in (x[4:12], m[4:12], b, d[1:3], w)]
    assert_close(run(inputs, 4), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_of_any_strides(device: str) -> None:
    x, m, b, d, w = make(2, 4, 8, 2, (3, 3), device=device)
    strided = [v.detach().t().contiguous().t().requires_grad_() for v in (b, w)]
    assert not any(v.is_contiguous() for v in strided)
    assert all(map(torch.equal, run([x, m, strided[0], d, strided[1]], 4), run([x, m, b, d, w], 4)))


# Layouts, backends and messages.


BAD_ARGUMENTS: dict[str, tuple[int, Callable[[Tensor], Tensor], str]] = {
    "rank": (0, lambda x: x[0], r"x must be \[N\*T, C, H, W\]"),
    "frames": (0, lambda x: x[:7], "x must hold whole clips of num_segments = 4"),
    "m_rank": (1, lambda m: m[0], r"m must be "),
    "m_frames": (1, lambda m: m[:4], r"m must be \[N\*T, r, H, W\] with r from 1 to 32"),
    "m_channels": (1, lambda m: m.repeat(1, 20, 1, 1), "m must be .* with r from 1 to 32"),
    "m_dtype": (1, lambda m: m.float(), "m must be .*, got"),
    "b": (2, lambda b: b[:, :1], r"b must be \[C, r\] = \[8, 2\]"),
    "b_dtype": (2, lambda b: b.half(), "b must be .*, got"),
    "d": (3, lambda d: d[:, :8], r"d must be \[N, 2\*C, H, W\] = \[2, 16, 3, 3\]"),
    "d_dtype": (3, lambda d: d.float(), "d must be .*, got"),
    "w": (4, lambda w: w[:, :2], r"w must be \[C, 3\] = \[8, 3\]"),
    "w_dtype": (4, lambda w: w.float(), "w must be .*, got"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=needs_extension)])
def test_bad_arguments(name: str, direct: bool) -> None:
    """The front end and the operator itself both refuse, with the same words."""
    index, change, message = BAD_ARGUMENTS[name]
    inputs = [value.detach() for value in make(2, 4, 8, 2, (3, 3))]
    inputs[index] = change(inputs[index])
    if inputs[index].dim() == 4:
        inputs[index] = inputs[index].contiguous(memory_format=torch.channels_last)
    with pytest.raises((ValueError, TypeError), match=f"^mas_fuse: {message}"):
        if direct:
            torch.ops.accel_kernels.mas_fuse(
                *(v if v.dim() == 4 else v.contiguous() for v in inputs), 4
            )
        else:
            kernels.mas_fuse(*inputs, num_segments=4)


@needs_extension
def test_backward_operator_refuses_another_gradient() -> None:
    inputs = [value.detach() for value in make(2, 4, 8, 2, (3, 3))]
    backward = torch.ops.accel_kernels.mas_fuse_backward
    with pytest.raises(ValueError, match="mas_fuse_backward: grad must be like x"):
        backward(inputs[0][:4], *inputs, 4, [True] * 5)
    with pytest.raises(TypeError, match=r"mas_fuse_backward: grad must be .* like x"):
        backward(inputs[0].float(), *inputs, 4, [True] * 5)
