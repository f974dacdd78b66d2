"""branch_fuse: compiled operator against the reference, layouts, dtypes, PyTorch's subsystems."""

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
NAMES = ("f1", "f2", "f3", "s")


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend from the environment, and no fallback reported yet."""
    monkeypatch.delenv(_backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_backend, "_reported", set())


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
def test_empty_batch(device: str) -> None:
    inputs = make(0, 4, 8, (5, 5), device=device)
    out, *grads = run(inputs, 4)
    assert out.shape == inputs[0].shape
    for grad, value in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_some_gradients_only(needed: tuple[bool, ...], device: str) -> None:
    inputs = make(2, 3, 16, (5, 7), device=device)
    everything = run(inputs, 3)[1:]
    leaves = [v.detach().requires_grad_(want) for v, want in zip(inputs, needed, strict=True)]
    out = kernels.branch_fuse(*leaves, num_segments=3)
    if not needed[3]:
        saved = [t for t in out.grad_fn.saved_tensors if t is not None]
        assert not any(t.shape == out.shape for t in saved)
    out.backward(incoming(out))
    for leaf, want, expected in zip(leaves, needed, everything, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, expected)


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


@pytest.mark.parametrize("device", DEVICES)
def test_incoming_gradient_of_any_strides(device: str) -> None:
    inputs = make(2, 4, 8, (3, 3), device=device)
    for reduce in (Tensor.mean, lambda y: y[..., 1:].sum(), lambda y: y.contiguous().prod(0).sum()):
        grads = [
            torch.autograd.grad(
                reduce(kernels.branch_fuse(*inputs, num_segments=4, backend=backend)), inputs
            )
            for backend in ("auto", "reference")
        ]
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_repeats_bit_by_bit(dtype: torch.dtype, device: str) -> None:
    inputs = make(2, 9, 64, (14, 14), dtype=dtype, device=device)
    first = run(inputs, 9)
    threads = torch.get_num_threads()
    try:
        for repeat in range(10):
            torch.set_num_threads(1 + repeat % 2)
            assert all(map(torch.equal, first, run(inputs, 9)))
    finally:
        torch.set_num_threads(threads)


def test_gradcheck_of_the_reference() -> None:
    inputs = make(2, 3, 2, (1, 2))

    def function(*values: Tensor) -> Tensor:
        return kernels.branch_fuse(*values, num_segments=3, backend="reference")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_of_the_operator(device: str) -> None:
    inputs = make(2, 3, 2, (1, 2), device=device)
    assert torch.autograd.gradcheck(
        lambda *values: kernels.branch_fuse(*values, num_segments=3), inputs
    )


@needs_extension
def test_second_derivative_of_the_operator_is_refused() -> None:
    inputs = make(1, 2, 2, (2, 2))
    out = kernels.branch_fuse(*inputs, num_segments=2)
    (df,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives.*backend="reference"'):
        df.sum().backward()


# Layouts, backends and messages.


@pytest.mark.parametrize("index", [0, 1, 2])
def test_other_layout_runs_the_reference_with_one_warning(index: int) -> None:
    inputs = [value.detach() for value in make(2, 4, 8, (3, 3))]
    other = list(inputs)
    other[index] = other[index].contiguous()
    with pytest.warns(RuntimeWarning, match="branch_fuse: using the slower PyTorch reference"):
        out = kernels.branch_fuse(*other, num_segments=4)
    torch.testing.assert_close(out, kernels.branch_fuse(*inputs, num_segments=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.branch_fuse(*other, num_segments=4)


@needs_extension
@pytest.mark.parametrize("index", [0, 1, 2])
def test_other_layout_is_refused_by_a_forced_backend_and_by_the_operator(index: int) -> None:
    inputs = [value.detach() for value in make(2, 4, 8, (3, 3))]
    inputs[index] = inputs[index].contiguous()
    message = f"branch_fuse: backend=cpp was asked for, but {NAMES[index]} is not contiguous in"
    with pytest.raises(RuntimeError, match=message):
        kernels.branch_fuse(*inputs, num_segments=4, backend="cpp")
    message = f"branch_fuse: {NAMES[index]} must be contiguous in channels_last"
    with pytest.raises(ValueError, match=message):
        torch.ops.accel_kernels.branch_fuse(*inputs, 4)


def test_reference_without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "AVAILABLE", False)
    inputs = make(1, 2, 4, (2, 2))
    with pytest.warns(RuntimeWarning, match="branch_fuse: using the slower PyTorch reference"):
        actual = run(inputs, 2)
    assert all(map(torch.equal, actual, run(inputs, 2, "reference")))


@needs_extension
def test_backend_selects_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "branch_fuse", unexpected)
    monkeypatch.setenv("ACCEL_KERNELS", "cpp")
    run(make(1, 2, 4, (2, 2)), 2)
    with pytest.raises(AssertionError, match="the reference ran"):
        run(make(1, 2, 4, (2, 2)), 2, "reference")


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


# PyTorch's subsystems.


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    inputs = make(2, 2, 4, (2, 3), device=device)
    torch.library.opcheck(torch.ops.accel_kernels.branch_fuse, (*inputs, 2))
    values = [value.detach() for value in inputs]
    for mask in ([True] * 4, [True, False, True, False], [False, False, False, True]):
        args = (torch.ones_like(values[0]), *values, 2, mask)
        torch.library.opcheck(torch.ops.accel_kernels.branch_fuse_backward, args)


class Block(torch.nn.Module):
    """Layers around the operator, as models use it."""

    def __init__(self, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        branches = [convolution(x) for convolution in self.convolutions]
        shares = s.softmax(1)
        return torch.relu(kernels.branch_fuse(*branches, shares, num_segments=self.num_segments))


def block_and_inputs(device: str = "cpu") -> tuple[Block, list[Tensor]]:
    torch.manual_seed(0)
    x, _, _, s = make(2, 4, 8, (3, 3), dtype=torch.float32, device=device)
    return Block(4).to(device).to(memory_format=torch.channels_last), [x, s]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Half branches from convolutions and fp32 weights: the operator runs in half."""
    block, (x, s) = block_and_inputs(device)
    with warnings.catch_warnings(), torch.autocast(device, dtype):
        warnings.simplefilter("error")
        out = block(x, s)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert s.grad.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


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
    assert names.count("accel_kernels.branch_fuse.default") == 1
    torch.testing.assert_close(program.module()(*inputs), block(*inputs))


@pytest.mark.needs_cuda
@needs_extension
def test_cuda_graph_capture() -> None:
    inputs = make(2, 8, 64, (14, 14), dtype=torch.float16, device="cuda")
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
    inputs = make(3, 9, 72, (14, 14))
    on_device = [v.detach().cuda().requires_grad_() for v in inputs]
    for one, other in zip(run(inputs, 9), run(on_device, 9), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-13, atol=1e-13)
