"""mas_fuse: compiled operator against the reference, layouts, dtypes, PyTorch's subsystems."""

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kernels
from kernels import _backend, _library, reference

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


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend from the environment, and no fallback reported yet."""
    monkeypatch.delenv(_backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_backend, "_reported", set())


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


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device: str) -> None:
    inputs = make(0, 4, 8, 2, (5, 5), device=device)
    out, *grads = run(inputs, 4)
    assert out.shape == inputs[0].shape
    for grad, value in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5))[1:], ids=str)
def test_some_gradients_only(needed: tuple[bool, ...], device: str) -> None:
    inputs = make(2, 3, 16, 2, (5, 7), device=device)
    everything = run(inputs, 3)[1:]
    leaves = [v.detach().requires_grad_(want) for v, want in zip(inputs, needed, strict=True)]
    out = kernels.mas_fuse(*leaves, num_segments=3)
    out.backward(incoming(out))
    for leaf, want, expected in zip(leaves, needed, everything, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_incoming_gradient_of_any_strides(device: str) -> None:
    inputs = make(2, 4, 8, 2, (3, 3), device=device)
    for reduce in (Tensor.mean, lambda y: y[..., 1:].sum(), lambda y: y.contiguous().prod(0).sum()):
        grads = [
            torch.autograd.grad(
                reduce(kernels.mas_fuse(*inputs, num_segments=4, backend=backend)), inputs
            )
            for backend in ("auto", "reference")
        ]
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_repeats_bit_by_bit(dtype: torch.dtype, device: str) -> None:
    inputs = make(2, 9, 64, 2, (14, 14), dtype=dtype, device=device)
    first = run(inputs, 9)
    threads = torch.get_num_threads()
    try:
        for repeat in range(10):
            torch.set_num_threads(1 + repeat % 2)
            assert all(map(torch.equal, first, run(inputs, 9)))
    finally:
        torch.set_num_threads(threads)


def test_gradcheck_of_the_reference() -> None:
    inputs = make(2, 3, 2, 2, (1, 2))

    def function(*values: Tensor) -> Tensor:
        return kernels.mas_fuse(*values, num_segments=3, backend="reference")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_of_the_operator(device: str) -> None:
    inputs = make(2, 3, 2, 2, (1, 2), device=device)
    assert torch.autograd.gradcheck(
        lambda *values: kernels.mas_fuse(*values, num_segments=3), inputs
    )


@needs_extension
def test_second_derivative_of_the_operator_is_refused() -> None:
    inputs = make(1, 2, 2, 1, (2, 2))
    out = kernels.mas_fuse(*inputs, num_segments=2)
    (dx,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives.*backend="reference"'):
        dx.sum().backward()


# Layouts, backends and messages.


@pytest.mark.parametrize("index", [0, 1, 3])
def test_other_layout_runs_the_reference_with_one_warning(index: int) -> None:
    inputs = [value.detach() for value in make(2, 4, 8, 2, (3, 3))]
    other = list(inputs)
    other[index] = other[index].contiguous()
    with pytest.warns(RuntimeWarning, match="mas_fuse: using the slower PyTorch reference"):
        out = kernels.mas_fuse(*other, num_segments=4)
    torch.testing.assert_close(out, kernels.mas_fuse(*inputs, num_segments=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.mas_fuse(*other, num_segments=4)


@needs_extension
@pytest.mark.parametrize("index", [0, 1, 3])
def test_other_layout_is_refused_by_a_forced_backend_and_by_the_operator(index: int) -> None:
    inputs = [value.detach() for value in make(2, 4, 8, 2, (3, 3))]
    inputs[index] = inputs[index].contiguous()
    message = f"mas_fuse: backend=cpp was asked for, but {NAMES[index]} is not contiguous in"
    with pytest.raises(RuntimeError, match=message):
        kernels.mas_fuse(*inputs, num_segments=4, backend="cpp")
    message = f"mas_fuse: {NAMES[index]} must be contiguous in channels_last"
    with pytest.raises(ValueError, match=message):
        torch.ops.accel_kernels.mas_fuse(*inputs, 4)


def test_reference_without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "AVAILABLE", False)
    inputs = make(1, 2, 4, 1, (2, 2))
    with pytest.warns(RuntimeWarning, match="mas_fuse: using the slower PyTorch reference"):
        actual = run(inputs, 2)
    assert all(map(torch.equal, actual, run(inputs, 2, "reference")))


@needs_extension
def test_backend_selects_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "mas_fuse", unexpected)
    monkeypatch.setenv("ACCEL_KERNELS", "cpp")
    run(make(1, 2, 4, 1, (2, 2)), 2)
    with pytest.raises(AssertionError, match="the reference ran"):
        run(make(1, 2, 4, 1, (2, 2)), 2, "reference")


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


# PyTorch's subsystems.


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    inputs = make(2, 2, 4, 2, (2, 3), device=device)
    torch.library.opcheck(torch.ops.accel_kernels.mas_fuse, (*inputs, 2))
    values = [value.detach() for value in inputs]
    for mask in ([True] * 5, [True, False, True, False, True], [False, True, False, True, False]):
        args = (torch.ones_like(values[0]), *values, 2, mask)
        torch.library.opcheck(torch.ops.accel_kernels.mas_fuse_backward, args)


class Block(torch.nn.Module):
    """Layers around the operator, as models use it."""

    def __init__(self, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.reduce = torch.nn.Conv2d(8, 2, 1, bias=False)
        self.logits = torch.nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: Tensor, b: Tensor, w: Tensor) -> Tensor:
        m = self.reduce(x)
        mean = x.unflatten(0, (-1, self.num_segments)).mean(1)  # [N, C, H, W]
        d = self.logits(mean.contiguous(memory_format=torch.channels_last))
        return torch.relu(
            kernels.mas_fuse(x.to(m.dtype), m, b, d, w, num_segments=self.num_segments)
        )


def block_and_inputs(device: str = "cpu") -> tuple[Block, list[Tensor]]:
    torch.manual_seed(0)
    x, _, b, _, w = make(2, 4, 8, 2, (3, 3), dtype=torch.float32, device=device)
    return Block(4).to(device).to(memory_format=torch.channels_last), [x, b, w]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Half activations from convolutions and fp32 coefficients: the operator runs in half."""
    block, (x, b, w) = block_and_inputs(device)
    with warnings.catch_warnings(), torch.autocast(device, dtype):
        warnings.simplefilter("error")
        out = block(x, b, w)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert b.grad.dtype == torch.float32 and w.grad.dtype == torch.float32
    assert torch.isfinite(block.reduce.weight.grad).all()
    assert torch.isfinite(block.logits.weight.grad).all()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_as_one_graph(
    compiler: str, backend: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend is not None:
        monkeypatch.setenv("ACCEL_KERNELS", backend)
    block, inputs = block_and_inputs(device)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    expected, actual = block(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    leaves = [*inputs, *block.parameters()]
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@needs_extension
def test_export() -> None:
    block, inputs = block_and_inputs()
    inputs = tuple(value.detach() for value in inputs)
    program = torch.export.export(block.eval(), inputs)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("accel_kernels.mas_fuse.default") == 1
    torch.testing.assert_close(program.module()(*inputs), block(*inputs))


@pytest.mark.needs_cuda
@needs_extension
def test_cuda_graph_capture() -> None:
    inputs = make(2, 8, 512, 8, (7, 7), dtype=torch.float16, device="cuda")
    expected = run(inputs, 8)
    with torch.cuda.stream(torch.cuda.Stream()):
        run(inputs, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, 8)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.needs_cuda
@needs_extension
def test_cuda_matches_the_twin() -> None:
    """Same split of the sums on both: fp64 gradients agree to a few roundings."""
    inputs = make(3, 9, 72, 3, (14, 14))
    on_device = [v.detach().cuda().requires_grad_() for v in inputs]
    for one, other in zip(run(inputs, 9), run(on_device, 9), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-12, atol=1e-12)
