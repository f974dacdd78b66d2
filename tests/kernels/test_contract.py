"""What every differentiable operator without state keeps to: gradients, layouts, backends,
PyTorch's subsystems. What is an operator's own is in its test_<operator>.py; bn_act, whose running
statistics change, has all of it there."""

import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from kernels import _library, reference

needs_extension = pytest.mark.needs_extension
DEVICES = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[needs_extension, pytest.mark.needs_cuda]),
]
LAST = torch.channels_last


class Maps(NamedTuple):
    """Shape of an input that is an activation: [batch, channels, H, W], channels_last."""

    batch: int
    channels: int


class Operator(NamedTuple):
    """An operator in one of its forms."""

    name: str
    shapes: Callable[[int, int, int], dict[str, Maps | tuple[int, ...] | None]]
    """Of N, T, C to the inputs: activations, coefficients, or None for what is left out. The
    output has the shape of the first input."""
    clips: bool = True
    """Whether it takes num_segments."""
    masks: tuple[tuple[bool, ...], ...] = ()
    """output_mask arguments that the check of the backward operator passes; () if it takes none."""
    backward_inputs: int | None = None
    """How many of the inputs the backward operator takes; None: all."""
    rounding: float = 1e-12
    """By which fp64 gradients may differ from the reference's."""
    mask_rounding: float = 0.0
    """By which fp64 gradients may differ if others are not asked for."""
    device_rounding: float = 1e-12
    """By which fp64 results of the CUDA kernels may differ from the C++ twin's."""
    compile_rounding: float | None = None
    """By which fp32 gradients of a compiled block may differ; None: PyTorch's default."""

    def make(
        self,
        N: int,
        T: int,
        C: int,
        size: tuple[int, int],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> list[Tensor | None]:
        """Inputs that require gradients."""
        generator = torch.Generator().manual_seed(N * 1000 + T * 100 + C)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs: list[Tensor | None] = []
        for shape in self.shapes(N, T, C).values():
            if shape is None:
                inputs.append(None)
                continue
            is_maps = isinstance(shape, Maps)
            value = torch.randn((*shape, *size) if is_maps else shape, generator=generator)
            value = value.to(device, dtype if is_maps else wide)
            if value.dim() == 4:  # activations, and weights of convolutions
                value = value.contiguous(memory_format=LAST)
            inputs.append(value.requires_grad_())
        return inputs

    def __call__(
        self, inputs: list[Tensor | None], num_segments: int, backend: str | None = None
    ) -> Tensor:
        options = {"num_segments": num_segments} if self.clips else {}
        return getattr(kernels, self.name)(*inputs, **options, backend=backend)

    def run(
        self, inputs: list[Tensor | None], num_segments: int, backend: str | None = None
    ) -> list[Tensor]:
        """The output and the gradients of all inputs."""
        out = self(inputs, num_segments, backend)
        return [out, *torch.autograd.grad(out, present(inputs), incoming(out))]

    def compiled(self, inputs: list[Tensor | None], num_segments: int) -> Tensor:
        """The compiled operator itself, without the front end."""
        operator = getattr(torch.ops.accel_kernels, self.name)
        return operator(*inputs, *([num_segments] if self.clips else []))


def present(inputs: list[Tensor | None]) -> list[Tensor]:
    return [value for value in inputs if value is not None]


def detached(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if value is None else value.detach() for value in inputs]


def incoming(out: Tensor) -> Tensor:
    """A gradient that depends on the position."""
    grad = torch.linspace(-1, 2, out.numel(), device=out.device).to(out.dtype)
    return grad.view(out.shape).contiguous(memory_format=LAST)


def temporal_taps(per_sample: bool, gated: bool) -> Operator:
    return Operator(
        "temporal_taps",
        lambda N, T, C: {
            "x": Maps(N * T, C),
            "w": (N, C, 3) if per_sample else (C, 3),
            "a": (N, T, C) if gated else None,
        },
        masks=((True, True, gated), (True, False, False), (False, True, False)),
        mask_rounding=1e-13,
        device_rounding=1e-13,
    )


def deform_conv(biased: bool) -> Operator:
    return Operator(
        "deform_conv",
        lambda N, T, C: {
            "x": Maps(N * T, C),
            "offset": Maps(N * T, 18),
            "weight": (C, C, 3, 3),
            "bias": (C,) if biased else None,
        },
        clips=False,
        masks=((True, True, True, True), (True, True, False, False))[: 1 + biased],
        backward_inputs=3,
        rounding=1e-9,
        mask_rounding=1e-12,
        compile_rounding=1e-4,
    )


MAS_FUSE = Operator(
    "mas_fuse",
    lambda N, T, C: {
        "x": Maps(N * T, C),
        "m": Maps(N * T, 2),
        "b": (C, 2),
        "d": Maps(N, 2 * C),
        "w": (C, 3),
    },
    masks=((True,) * 5, (True, False, True, False, True), (False, True, False, True, False)),
    compile_rounding=1e-4,
)
BRANCH_FUSE = Operator(
    "branch_fuse",
    lambda N, T, C: {**{name: Maps(N * T, C) for name in ("f1", "f2", "f3")}, "s": (N, 3, C)},
    masks=((True,) * 4, (True, False, True, False), (False, False, False, True)),
    device_rounding=1e-13,
    compile_rounding=1e-4,
)
DIFF_GATE_SHIFT = Operator(
    "diff_gate_shift",
    lambda N, T, C: {
        "x": Maps(N * T, C),
        "z": Maps(N * T, 2),
        "v": Maps(N * T, 2),
        "m": (2, C, 2),
        "c": (2, C),
        "w": (C, 3),
    },
)
SHARED_TAPS, DEFORM_CONV = temporal_taps(False, False), deform_conv(True)
CLIPS = [temporal_taps(True, True), MAS_FUSE, BRANCH_FUSE, DIFF_GATE_SHIFT]
OPERATORS = [*CLIPS, DEFORM_CONV]
FORMS = [*OPERATORS, SHARED_TAPS, temporal_taps(True, False), temporal_taps(False, True)]
FORMS += [deform_conv(False)]
CLIP_FORMS = [form for form in FORMS if form.clips]


def over(operators: list[Operator]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operator", operators, ids=lambda operator: operator.name)


# Results and gradients.


@over(FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(operator: Operator, device: str) -> None:
    inputs = operator.make(0, 4, 8, (5, 5), device=device)
    out, *grads = operator.run(inputs, 4)
    assert out.shape == inputs[0].shape
    for grad, value in zip(grads, present(inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@over(OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_some_gradients_only(operator: Operator, device: str) -> None:
    inputs = operator.make(2, 9, 16, (5, 7), device=device)
    everything = operator.run(inputs, 9)[1:]
    for needed in list(itertools.product([False, True], repeat=len(inputs)))[1:]:
        leaves = [v.detach().requires_grad_(want) for v, want in zip(inputs, needed, strict=True)]
        out = operator(leaves, 9)
        out.backward(incoming(out))
        for leaf, want, expected in zip(leaves, needed, everything, strict=True):
            assert (leaf.grad is not None) == want, needed
            if want:
                rounding = operator.mask_rounding
                torch.testing.assert_close(leaf.grad, expected, rtol=rounding, atol=rounding)


@over(OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_incoming_gradient_of_any_strides(operator: Operator, device: str) -> None:
    inputs = operator.make(2, 4, 8, (3, 3), device=device)
    for reduce in (Tensor.mean, lambda y: y[..., 1:].sum(), lambda y: y.contiguous().prod(0).sum()):
        grads = [
            torch.autograd.grad(reduce(operator(inputs, 4, backend)), inputs)
            for backend in ("auto", "reference")
        ]
        for actual, expected in zip(*grads, strict=True):
            rounding = operator.rounding
            torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)


@over([*CLIPS, SHARED_TAPS])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_repeats_bit_by_bit(operator: Operator, dtype: torch.dtype, device: str) -> None:
    inputs = operator.make(4, 9, 64, (14, 14), dtype=dtype, device=device)
    first = operator.run(inputs, 9)
    threads = torch.get_num_threads()
    try:
        for repeat in range(6):
            torch.set_num_threads(1 + repeat % 3)
            assert all(map(torch.equal, first, operator.run(inputs, 9)))
    finally:
        torch.set_num_threads(threads)


def with_gradients_of(
    operator: Operator, inputs: list[Tensor | None], num_segments: int, backend: str | None
) -> Callable[..., Tensor]:
    """The operator as a function of the inputs that are present."""

    def function(*values: Tensor) -> Tensor:
        given = iter(values)
        filled = [None if value is None else next(given) for value in inputs]
        return operator(filled, num_segments, backend)

    return function


@over(CLIP_FORMS)
def test_gradcheck_of_the_reference(operator: Operator) -> None:
    inputs = operator.make(2, 3, 2, (1, 2))
    function = with_gradients_of(operator, inputs, 3, "reference")
    assert torch.autograd.gradcheck(function, present(inputs))
    assert torch.autograd.gradgradcheck(function, present(inputs))


@over(CLIP_FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_of_the_operator(operator: Operator, device: str) -> None:
    inputs = operator.make(2, 3, 2, (1, 2), device=device)
    function = with_gradients_of(operator, inputs, 3, None)
    assert torch.autograd.gradcheck(function, present(inputs))


@over(OPERATORS)
@needs_extension
def test_second_derivative_of_the_operator_is_refused(operator: Operator) -> None:
    inputs = operator.make(1, 2, 2, (2, 2))
    out = operator(inputs, 2)
    (dx,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives.*backend="reference"'):
        dx.sum().backward()


@over(CLIP_FORMS)
@pytest.mark.needs_cuda
@needs_extension
def test_cuda_matches_the_twin(operator: Operator) -> None:
    """Same split of the sums on both: fp64 gradients agree to a few roundings."""
    inputs = operator.make(3, 9, 72, (14, 14))
    on_device = [None if v is None else v.detach().cuda().requires_grad_() for v in inputs]
    for one, other in zip(operator.run(inputs, 9), operator.run(on_device, 9), strict=True):
        rounding = operator.device_rounding
        torch.testing.assert_close(one, other.cpu(), rtol=rounding, atol=rounding)


# Layouts and backends.

ACTIVATIONS = [
    pytest.param(operator, index, id=f"{operator.name}-{name}")
    for operator in OPERATORS
    for index, (name, shape) in enumerate(operator.shapes(1, 1, 1).items())
    if isinstance(shape, Maps)
]


@pytest.mark.parametrize(("operator", "index"), ACTIVATIONS)
def test_other_layout_runs_the_reference_with_one_warning(operator: Operator, index: int) -> None:
    inputs = detached(operator.make(2, 4, 8, (3, 3)))
    other = list(inputs)
    other[index] = inputs[index].contiguous()
    text = f"{operator.name}: using the slower PyTorch reference"
    with pytest.warns(RuntimeWarning, match=text):
        out = operator(other, 4)
    torch.testing.assert_close(out, operator(inputs, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator(other, 4)


@needs_extension
@pytest.mark.parametrize(("operator", "index"), ACTIVATIONS)
def test_other_layout_is_refused_by_a_forced_backend_and_by_the_operator(
    operator: Operator, index: int
) -> None:
    inputs = detached(operator.make(2, 4, 8, (3, 3)))
    inputs[index] = inputs[index].contiguous()
    name = list(operator.shapes(1, 1, 1))[index]
    message = f"{operator.name}: backend=cpp was asked for, but {name} is not contiguous in"
    with pytest.raises(RuntimeError, match=message):
        operator(inputs, 4, "cpp")
    message = f"{operator.name}: {name} must be contiguous in channels_last"
    with pytest.raises(ValueError, match=message):
        operator.compiled(inputs, 4)


@over(OPERATORS)
def test_missing_extension_falls_back_with_one_warning(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "AVAILABLE", False)
    monkeypatch.setattr(_library, "REASON", "kernels._C is not built")
    inputs = operator.make(2, 4, 8, (3, 3))
    with pytest.warns(RuntimeWarning, match="because kernels._C is not built") as caught:
        first = operator.run(inputs, 4)
        operator.run(inputs, 4)
    assert len(caught) == 1
    assert f"{operator.name}: using the slower PyTorch reference" in str(caught[0].message)
    assert all(map(torch.equal, first, operator.run(inputs, 4, "reference")))
    with pytest.raises(RuntimeError, match=r"backend=cpp was asked for, but kernels._C is not"):
        operator.run(inputs, 4, "cpp")


@over(OPERATORS)
@needs_extension
def test_backend_selects_the_implementation(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, operator.name, unexpected)
    monkeypatch.setenv("ACCEL_KERNELS", "cpp")
    inputs = operator.make(1, 2, 4, (2, 2))
    operator.run(inputs, 2)
    with pytest.raises(AssertionError, match="the reference ran"):
        operator.run(inputs, 2, "reference")


# PyTorch's subsystems.


@over([*OPERATORS, SHARED_TAPS, deform_conv(False)])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(operator: Operator, device: str) -> None:
    inputs = operator.make(2, 2, 4, (2, 3), device=device)
    segments = [2] if operator.clips else []
    forward = getattr(torch.ops.accel_kernels, operator.name)
    torch.library.opcheck(forward, (*inputs, *segments))
    values = detached(inputs)[: operator.backward_inputs]
    grad = torch.ones_like(values[0])
    backward = getattr(torch.ops.accel_kernels, f"{operator.name}_backward")
    for mask in operator.masks or (None,):
        arguments = (grad, *values, *segments, *([] if mask is None else [list(mask)]))
        torch.library.opcheck(backward, arguments)


class Block(torch.nn.Module):
    """Layers around the operator, as models use it: a convolution makes each activation."""

    def __init__(self, operator: Operator, num_segments: int) -> None:
        super().__init__()
        self.operator = operator
        self.num_segments = num_segments
        shapes = operator.shapes(1, 1, 8).items()
        self.convolutions = torch.nn.ModuleDict(
            {
                name: torch.nn.Conv2d(shape.channels, shape.channels, 1)
                for name, shape in shapes
                if isinstance(shape, Maps)
            }
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        names = self.operator.shapes(1, 1, 8)
        values = [
            self.convolutions[name](value) if name in self.convolutions else value
            for name, value in zip(names, inputs, strict=True)
        ]
        return torch.relu(self.operator(values, self.num_segments))


def block_and_inputs(operator: Operator, device: str = "cpu") -> tuple[Block, list[Tensor]]:
    torch.manual_seed(0)
    block = Block(operator, 4).to(device).to(memory_format=LAST)
    return block, present(operator.make(2, 4, 8, (3, 3), dtype=torch.float32, device=device))


@over(OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(operator: Operator, dtype: torch.dtype, device: str) -> None:
    """Half activations from convolutions and fp32 coefficients: the operator runs in half."""
    block, inputs = block_and_inputs(operator, device)
    with warnings.catch_warnings(), torch.autocast(device, dtype):
        warnings.simplefilter("error")
        out = block(*inputs)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    for value in (*inputs, *block.parameters()):
        assert value.grad.dtype == torch.float32 and torch.isfinite(value.grad).all()


COMPILATIONS = [
    pytest.param(
        compiler,
        backend,
        operator,
        id=f"{compiler}-{backend}-{operator.name}",
        marks=[pytest.mark.slow] if compiler == "inductor" else [],
    )
    for compiler, backend, operators in (
        ("aot_eager", "auto", OPERATORS),
        ("aot_eager", "reference", OPERATORS),
        ("inductor", "auto", OPERATORS),
        ("inductor", "reference", [*CLIPS[:3], DEFORM_CONV]),
    )
    for operator in operators
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("compiler", "backend", "operator"), COMPILATIONS)
def test_compiles_as_one_graph(
    compiler: str,
    backend: str,
    operator: Operator,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCEL_KERNELS", backend)
    block, inputs = block_and_inputs(operator, device)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    expected, actual = block(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    leaves = [*inputs, *block.parameters()]
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        rounding = operator.compile_rounding
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


@pytest.mark.usefixtures("fresh_compiler")
@over(OPERATORS)
@needs_extension
def test_export(operator: Operator) -> None:
    block, inputs = block_and_inputs(operator)
    arguments = tuple(detached(inputs))
    program = torch.export.export(block.eval(), arguments)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count(f"accel_kernels.{operator.name}.default") == 1
    torch.testing.assert_close(program.module()(*arguments), block(*arguments))


@over(OPERATORS)
@pytest.mark.needs_cuda
@needs_extension
def test_cuda_graph_capture(operator: Operator) -> None:
    inputs = operator.make(2, 8, 64, (14, 14), dtype=torch.float16, device="cuda")
    expected = operator.run(inputs, 8)
    with torch.cuda.stream(torch.cuda.Stream()):
        operator.run(inputs, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator.run(inputs, 8)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
