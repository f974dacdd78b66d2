"""branch_fuse: compiled operator against the reference, layouts, dtypes, messages."""

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
NAMES = ("f1", "f2", "f3", "s")


def make(
    N: int,
    T: int,
    C: int,
    size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    offset: int = 0,
) -> list[Tensor]:
    """f1, f2, f3 in channels_last, `offset` elements into their allocations, and s; all require
    gradients."""
    generator = torch.Generator().manual_seed(N * 1000 + T * 100 + C)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = []
    for _ in range(3):
        flat = torch.randn(offset + N * T * C * size[0] * size[1], generator=generator)
        flat = flat.to(device, dtype)[offset:]
        inputs.append(flat.view(N * T, *size, C).permute(0, 3, 1, 2))
    inputs.append(torch.randn(N, 3, C, generator=generator).to(device, wide))
    return [value.requires_grad_() for value in inputs]


def incoming(out: Tensor) -> Tensor:
    """A gradient that depends on the position."""
    grad = torch.linspace(-1, 2, out.numel(), device=out.device).to(out.dtype)
    return grad.view(out.shape).contiguous(memory_format=torch.channels_last)


def run(inputs: list[Tensor], num_segments: int, backend: str | None = None) -> list[Tensor]:
    """out and the gradients of all inputs."""
    out = kernels.branch_fuse(*inputs, num_segments=num_segments, backend=backend)
    return [out, *torch.autograd.grad(out, inputs, incoming(out))]


def assert_close(actual: list[Tensor], inputs: list[Tensor], num_segments: int) -> None:
    grad = incoming(actual[0].detach()).double()
    exact, absolute = (
        [value.detach().double().requires_grad_() for value in inputs],
        [value.detach().double().abs().requires_grad_() for value in inputs],
    )
    results = []
    for values, g in ((exact, grad), (absolute, grad.abs())):
        out = reference.branch_fuse(*values, num_segments=num_segments)
        results.append([out, *torch.autograd.grad(out, values, g)])
    for name, value, wanted, scale in zip(("out", *NAMES), actual, *results, strict=True):
        limit = BOUND[value.dtype] * scale
        if value.dtype == torch.float16:
            limit = limit + 2.0**-24  # fp16's smallest step
        assert ((value.double() - wanted).abs() <= limit + 1e-300).all(), name


def test_formula() -> None:
    """The reference against the formula written as loops."""
    N, T, C = 2, 3, 2
    inputs = [value.detach() for value in make(N, T, C, (1, 2))]
    expected = torch.zeros_like(inputs[0])
    for n, t, i, c in itertools.product(range(N), range(T), range(3), range(C)):
        expected[n * T + t, c] += inputs[3][n, i, c] * inputs[i][n * T + t, c]
    actual = kernels.branch_fuse(*inputs, num_segments=T, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


SHAPES = [
    # N, T, C, (H, W)
    (1, 1, 8, (1, 1)),
    (3, 2, 64, (7, 7)),
    (1, 8, 72, (7, 7)),
    (2, 16, 3, (5, 3)),
    (3, 9, 8, (4, 9)),
    (1, 8, 512, (1, 1)),
    (1, 2, 8, (56, 56)),
    (2, 4, 1, (3, 3)),
    (1, 2, 1536, (2, 2)),
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
@pytest.mark.parametrize("offset", [1, 2, 8])
def test_misaligned_storage(offset: int, device: str) -> None:
    inputs = make(2, 4, 16, (3, 5), dtype=torch.float16, device=device, offset=offset)
    assert_close(run(inputs, 4), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_the_batch(device: str) -> None:
    *branches, s = (value.detach() for value in make(4, 4, 8, (3, 3), device=device))
    inputs = [value.requires_grad_() for value in (*(f[4:12] for f in branches), s[1:3])]
    assert_close(run(inputs, 4), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_any_strides(device: str) -> None:
    *branches, s = make(2, 4, 8, (3, 3), device=device)
    strided = s.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert not strided.is_contiguous()
    assert all(map(torch.equal, run([*branches, strided], 4), run([*branches, s], 4)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_frozen_weights_keep_no_branches(needed: tuple[bool, ...], device: str) -> None:
    *branches, s = (value.detach() for value in make(2, 3, 16, (5, 7), device=device))
    leaves = [f.requires_grad_(want) for f, want in zip(branches, needed, strict=True)]
    out = kernels.branch_fuse(*leaves, s, num_segments=3)
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert not any(t.shape == out.shape for t in saved)


@pytest.mark.parametrize("device", DEVICES)
def test_one_branch_three_times(device: str) -> None:
    f, _, _, s = make(2, 4, 8, (3, 3), device=device)
    grads = [
        torch.autograd.grad(
            kernels.branch_fuse(f, f, f, s, num_segments=4, backend=backend).square().sum(), (f, s)
        )
        for backend in ("auto", "reference")
    ]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Layouts, backends and messages.


BAD_ARGUMENTS: dict[str, tuple[int, Callable[[Tensor], Tensor], str]] = {
    "rank": (0, lambda f: f[0], r"f1 must be \[N\*T, C, H, W\]"),
    "frames": (3, lambda s: s[:1], r"s must be \[N, 3, C\] = \[2, 3, 8\]"),
    "branches": (3, lambda s: s[:, :2], r"s must be \[N, 3, C\] = \[2, 3, 8\]"),
    "s_dtype": (3, lambda s: s.float(), r"s must be .*, got"),
    "f2": (1, lambda f: f[:4], "f2 must be like f1"),
    "f3_dtype": (2, lambda f: f.float(), r"f3 must be .*, got"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=needs_extension)])
def test_bad_arguments(name: str, direct: bool) -> None:
    """The front end and the operator itself both refuse, with the same words."""
    index, change, message = BAD_ARGUMENTS[name]
    inputs = [value.detach() for value in make(2, 4, 8, (3, 3))]
    inputs[index] = change(inputs[index])
    inputs[3] = inputs[3].contiguous()
    with pytest.raises((ValueError, TypeError), match=f"^branch_fuse: {message}"):
        if direct:
            torch.ops.accel_kernels.branch_fuse(*inputs, 4)
        else:
            kernels.branch_fuse(*inputs, num_segments=4)


@pytest.mark.parametrize("num_segments", [0, 3])
def test_clips_must_be_whole(num_segments: int) -> None:
    inputs = [value.detach() for value in make(2, 4, 8, (3, 3))]
    message = f"f1 must hold whole clips of num_segments = {num_segments}"
    with pytest.raises(ValueError, match=message):
        kernels.branch_fuse(*inputs, num_segments=num_segments)


@needs_extension
def test_backward_operator_refuses_missing_and_other_branches() -> None:
    f, _, _, s = (value.detach() for value in make(2, 4, 8, (3, 3)))
    backward = torch.ops.accel_kernels.branch_fuse_backward
    with pytest.raises(ValueError, match="branch_fuse_backward: ds needs f2, got None"):
        backward(f, f, None, f, s, 4, [True] * 4)
    with pytest.raises(ValueError, match="branch_fuse_backward: f3 must be like grad"):
        backward(f, f, f, f[:4], s, 4, [True] * 4)
