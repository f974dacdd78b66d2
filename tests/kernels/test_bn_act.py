"""bn_act: compiled operator against the reference, statistics, processes, PyTorch's subsystems."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
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
# Of the sum of absolute terms: two roundings of 16-bit types, fp32 and fp64 accumulation.
BOUND = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-19,
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}
MOMENTUM, EPS = 0.1, 1e-5


class Form(NamedTuple):
    """What of the operator is used."""

    shortcut: bool
    relu: bool
    training: bool
    pool: bool


FORMS = [Form(*values) for values in itertools.product([False, True], repeat=4)]
BLOCK = Form(shortcut=True, relu=True, training=True, pool=False)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    shortcut: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    grad: Tensor
    grad_pooled: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What takes gradients."""
        first = [self.x, self.weight, self.bias]
        return first if self.shortcut is None else [*first, self.shortcut]


def make(
    B: int,
    C: int,
    size: tuple[int, int],
    form: Form,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    offset: int = 0,
) -> Inputs:
    """Activations in channels_last, `offset` elements into their allocations; all leaves."""
    generator = torch.Generator().manual_seed(B * 1000 + C)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(mean: float, std: float) -> Tensor:
        flat = torch.randn(offset + B * C * size[0] * size[1], generator=generator) * std + mean
        return flat.to(device, dtype)[offset:].view(B, *size, C).permute(0, 3, 1, 2)

    def channels(mean: float, std: float) -> Tensor:
        return (torch.randn(C, generator=generator) * std + mean).to(device, wide)

    return Inputs(
        activation(0.5, 2).requires_grad_(),
        channels(0.5, 1).requires_grad_(),
        channels(0, 1).requires_grad_(),
        activation(0, 1).requires_grad_() if form.shortcut else None,
        channels(0, 1),
        channels(0, 1).exp(),
        activation(0.1, 1),
        torch.randn(B, C, generator=generator).to(device, wide),
    )


def apply(
    inputs: Inputs, form: Form, backend: str | None = None, **options: object
) -> list[Tensor]:
    """y, and pooled if the form has it."""
    outputs = kernels.bn_act(
        *inputs[:3],
        inputs.running_mean,
        inputs.running_var,
        inputs.shortcut,
        relu=form.relu,
        training=form.training,
        momentum=MOMENTUM,
        eps=EPS,
        pool=form.pool,
        backend=backend,
        **options,
    )
    assert isinstance(outputs, tuple) == form.pool
    return list(outputs) if form.pool else [outputs]


def run(inputs: Inputs, form: Form, backend: str | None = None, **options: object) -> list[Tensor]:
    """Outputs, gradients of the leaves, and the new running statistics; inputs stay as they are."""
    inputs = inputs._replace(
        running_mean=inputs.running_mean.clone(), running_var=inputs.running_var.clone()
    )
    outputs = apply(inputs, form, backend, **options)
    grads = [inputs.grad, inputs.grad_pooled][: len(outputs)]
    return [
        *outputs,
        *torch.autograd.grad(outputs, inputs.leaves, grads),
        inputs.running_mean,
        inputs.running_var,
    ]


def expected_and_bound(inputs: Inputs, form: Form) -> list[tuple[Tensor, Tensor]]:
    """Results in fp64 without intermediate rounding, each with the error that is allowed.

    The error is relative to the sum of absolute terms. An element whose sign is within the error
    of zero may pass the ReLU or not: its whole gradient counts as error.
    """
    dtype = inputs.x.dtype
    own, wide = BOUND[dtype], BOUND[inputs.weight.dtype]
    exact = Inputs(*(None if v is None else v.detach().double() for v in inputs))
    exact = exact._replace(
        **{
            name: getattr(exact, name).requires_grad_()
            for name in ("x", "weight", "bias", *(("shortcut",) if form.shortcut else ()))
        }
    )
    results = run(exact, form, "reference")
    x, weight, bias = (v.detach() for v in exact[:3])
    rows = x.numel() // x.shape[1]
    if form.training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        mean, var = exact.running_mean, exact.running_var

    def of_channels(value: Tensor) -> Tensor:
        return value[:, None, None]

    rstd = (var + EPS).rsqrt()
    scale = of_channels(weight.abs() * rstd)
    size = x.abs() + of_channels(mean.abs())  # absolute terms of x - mean
    y_size = scale * size + of_channels(bias.abs())
    n = (x - of_channels(mean)) * of_channels(weight * rstd) + of_channels(bias)
    if form.shortcut:
        n, y_size = n + exact.shortcut.detach(), y_size + exact.shortcut.detach().abs()
    unclear = (n.abs() <= wide * y_size) if form.relu else torch.zeros_like(n, dtype=torch.bool)

    g = exact.grad.abs()
    if form.pool:
        g = g + exact.grad_pooled.abs()[..., None, None] / (x.shape[2] * x.shape[3])
    xh = size * of_channels(rstd)

    def gradients(error: Tensor, relative: float) -> list[Tensor]:
        """Bounds of dx, dweight, dbias and dshortcut for an error of the gated gradient."""
        dweight, dbias = (error * xh).sum((0, 2, 3)), error.sum((0, 2, 3))
        dx = error
        if form.training:
            dx = dx + (of_channels(dbias) + xh * of_channels(dweight)) / rows
        return [relative * scale * dx, wide * dweight, wide * dbias, relative * error]

    # One relative error of all terms; and all of what is unclear.
    bounds = [
        a + b / of_bound
        for a, b, of_bound in zip(
            gradients(g, own), gradients(g * unclear, 1), (1, wide, wide, 1), strict=True
        )
    ]
    statistics = [
        wide * (exact.running_mean.abs() + size.mean((0, 2, 3))),
        wide * (exact.running_var + size.square().mean((0, 2, 3))),
    ]
    outputs = [own * y_size, (own + wide) * y_size.mean((-2, -1))][: 1 + form.pool]
    all_bounds = [*outputs, *bounds[: 3 + form.shortcut], *statistics]
    return list(zip(results, all_bounds, strict=True))


def assert_close(actual: list[Tensor], inputs: Inputs, form: Form) -> None:
    for value, (expected, bound) in zip(actual, expected_and_bound(inputs, form), strict=True):
        if value.dtype == torch.float16:
            bound = bound + 2.0**-24  # fp16's smallest step
        error = (value.double() - expected).abs()
        assert (error <= bound + 1e-300).all(), (error / bound).nan_to_num().max()


SHAPES = [
    # B, C, (H, W)
    (2, 8, (1, 1)),
    (6, 64, (7, 7)),
    (8, 72, (7, 7)),
    (3, 3, (5, 3)),
    (1, 8, (4, 9)),
    (8, 512, (1, 1)),
    (2, 8, (56, 56)),
    (2, 1, (3, 3)),
    (4, 1536, (2, 2)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple, dtype: torch.dtype, device: str) -> None:
    for form in FORMS:
        inputs = make(*shape, form, dtype=dtype, device=device)
        actual = run(inputs, form)
        assert actual[0].is_contiguous(memory_format=torch.channels_last)
        assert actual[0].dtype == dtype
        assert [v.dtype for v in actual[1 + form.pool :][: len(inputs.leaves)]] == [
            v.dtype for v in inputs.leaves
        ]
        assert_close(actual, inputs, form)


def test_formula() -> None:
    """The reference against the formula written as loops over the channels."""
    form = Form(shortcut=True, relu=True, training=True, pool=True)
    inputs = make(3, 4, (2, 5), form)
    y, pooled, *_, running_mean, running_var = run(inputs, form, "reference")
    for c in range(4):
        values = inputs.x[:, c]
        n = (values - values.mean()) / (values.var(correction=0) + EPS).sqrt()
        n = n * inputs.weight[c] + inputs.bias[c] + inputs.shortcut[:, c]
        torch.testing.assert_close(y[:, c], n.clamp_min(0), rtol=0, atol=1e-13)
        torch.testing.assert_close(pooled[:, c], n.clamp_min(0).mean((1, 2)), rtol=0, atol=1e-13)
        for running, old, new in (
            (running_mean, inputs.running_mean, values.mean()),
            (running_var, inputs.running_var, values.var(correction=1)),
        ):
            torch.testing.assert_close(running[c], 0.9 * old[c] + 0.1 * new, rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 8])
def test_misaligned_storage(offset: int, device: str) -> None:
    inputs = make(4, 16, (3, 5), BLOCK, dtype=torch.float16, device=device, offset=offset)
    assert_close(run(inputs, BLOCK), inputs, BLOCK)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_far_from_zero(device: str) -> None:
    """A mean 4096 times the deviation leaves the variance accurate; so does an outlier in front."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 28, 28, generator=generator)
    for spoiled in (x + 4096, torch.cat([x[:, :, :1] + 1000, x[:, :, 1:]], dim=2)):
        spoiled = spoiled.to(device, memory_format=torch.channels_last)
        statistics = torch.ops.accel_kernels.bn_act_statistics(spoiled, None, None, 0.0)
        var, mean = torch.var_mean(spoiled.double(), (0, 2, 3), correction=0)
        largest = spoiled.abs().max().item()
        torch.testing.assert_close(statistics[0].double(), mean, rtol=0, atol=2.0**-22 * largest)
        torch.testing.assert_close(statistics[1].double(), var, rtol=2e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_constant_channel_has_variance_zero(device: str) -> None:
    x = torch.full((4, 8, 9, 9), 3.7, device=device).contiguous(memory_format=torch.channels_last)
    _, var = torch.ops.accel_kernels.bn_act_statistics(x, None, None, 0.0)
    assert torch.equal(var, torch.zeros_like(var))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(training: bool, device: str) -> None:
    form = Form(shortcut=True, relu=True, training=training, pool=True)
    inputs = make(0, 8, (5, 5), form, device=device)
    y, pooled, dx, dweight, dbias, dshortcut, running_mean, running_var = run(inputs, form)
    assert y.shape == dx.shape == dshortcut.shape == inputs.x.shape and pooled.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros_like(dweight)) and torch.equal(dbias, dweight)
    assert torch.equal(running_mean, inputs.running_mean)
    assert torch.equal(running_var, inputs.running_var)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [form for form in FORMS if form.relu], ids=str)
def test_some_gradients_only(form: Form, device: str) -> None:
    inputs = make(3, 16, (5, 7), form, device=device)
    everything = run(inputs, form)[1 + form.pool : -2]
    for needed in itertools.product([False, True], repeat=len(inputs.leaves)):
        if not any(needed):
            continue
        leaves = [
            v.detach().requires_grad_(want) for v, want in zip(inputs.leaves, needed, strict=True)
        ]
        some = Inputs(*leaves[:3], leaves[3] if form.shortcut else None, *inputs[4:])
        outputs = apply(some, form)
        torch.autograd.backward(outputs, [inputs.grad, inputs.grad_pooled][: len(outputs)])
        for leaf, want, expected in zip(leaves, needed, everything, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)
        inputs = make(3, 16, (5, 7), form, device=device)  # running statistics as before


def saved_elements(y: Tensor) -> dict[torch.dtype, int]:
    """Elements that the operator keeps for its backward pass, by dtype."""
    saved: dict[torch.dtype, int] = {}
    for tensor in y.grad_fn.saved_tensors:
        if tensor is not None:
            saved[tensor.dtype] = saved.get(tensor.dtype, 0) + tensor.numel()
    return saved


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_for_the_backward_pass(device: str) -> None:
    B, C, size = 2, 16, (5, 5)
    norm, activation = 4 * C, B * C * 25
    for form in FORMS:
        inputs = make(B, C, size, form, device=device)
        saved = saved_elements(apply(inputs, form)[0])
        assert saved[torch.float64] == norm + activation
        mask = activation // 8 if form.relu and form.shortcut else 0
        assert saved.get(torch.uint8, 0) == mask
        if not form.training:  # frozen parameters: no activation at all
            frozen = inputs._replace(weight=inputs.weight.detach(), bias=inputs.bias.detach())
            saved = saved_elements(apply(frozen, form)[0])
            assert saved[torch.float64] == norm
            assert saved.get(torch.uint8, 0) == (activation // 8 if form.relu else 0)
    with torch.no_grad():
        assert apply(make(B, C, size, BLOCK), BLOCK)[0].grad_fn is None


@pytest.mark.parametrize("device", DEVICES)
def test_incoming_gradient_of_any_strides(device: str) -> None:
    form = Form(shortcut=True, relu=True, training=True, pool=True)
    for reduce in (
        lambda y, pooled: y.mean() + pooled[:, ::2].square().mean(),
        lambda y, pooled: y[..., 1:].sum(),
        lambda y, pooled: y.contiguous().prod(0).sum() + pooled.t().contiguous().prod(0).sum(),
        lambda y, pooled: pooled.square().sum(),
    ):
        grads = []
        for backend in ("auto", "reference"):
            inputs = make(4, 8, (3, 3), form, device=device)
            loss = reduce(*apply(inputs, form, backend))
            grads.append(torch.autograd.grad(loss, inputs.leaves))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_repeats_bit_by_bit(dtype: torch.dtype, device: str) -> None:
    form = Form(shortcut=True, relu=True, training=True, pool=True)
    inputs = make(9, 64, (28, 28), form, dtype=dtype, device=device)
    first = run(inputs, form)
    threads = torch.get_num_threads()
    try:
        for repeat in range(6):
            torch.set_num_threads(1 + repeat % 3)
            assert all(map(torch.equal, first, run(inputs, form)))
    finally:
        torch.set_num_threads(threads)


def test_rounding_of_the_reference_is_within_half_a_unit_of_the_norm() -> None:
    """It rounds the norm before the shortcut is added; the operator rounds once."""
    for dtype, unit in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        inputs = make(4, 16, (9, 9), BLOCK, dtype=dtype)
        y = run(inputs, BLOCK, "auto")[0].double()
        z = run(inputs, BLOCK, "reference")[0].double()
        plain = BLOCK._replace(shortcut=False, relu=False)
        norm = run(inputs._replace(shortcut=None), plain, "reference")[0].double()
        # Half a unit of the norm, and both final roundings.
        bound = 0.5 * unit * (norm.abs() + y.abs() + z.abs()) * 1.001
        assert ((y - z).abs() <= bound).all()
        if _library.AVAILABLE:
            assert not torch.equal(y, z)


def test_gradcheck_of_the_reference() -> None:
    for form in FORMS:
        inputs = make(2, 2, (1, 2), form)

        def function(*leaves: Tensor, form: Form = form, inputs: Inputs = inputs) -> list[Tensor]:
            rest = [v.clone() for v in inputs[4:]]
            new = Inputs(*leaves[:3], leaves[3] if form.shortcut else None, *rest)
            return tuple(apply(new, form, "reference"))

        assert torch.autograd.gradcheck(function, inputs.leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_of_the_operator(device: str) -> None:
    for form in FORMS:
        inputs = make(3, 2, (1, 2), form, device=device)

        def function(*leaves: Tensor, form: Form = form, inputs: Inputs = inputs) -> list[Tensor]:
            rest = [v.clone() for v in inputs[4:]]
            new = Inputs(*leaves[:3], leaves[3] if form.shortcut else None, *rest)
            return tuple(apply(new, form))

        assert torch.autograd.gradcheck(function, inputs.leaves)


@needs_extension
def test_second_derivative_of_the_operator_is_refused() -> None:
    inputs = make(2, 2, (2, 2), BLOCK)
    (dx,) = torch.autograd.grad(apply(inputs, BLOCK)[0].square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives.*backend="reference"'):
        dx.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_change_of_running_statistics_is_counted(device: str) -> None:
    """Autograd sees that what an evaluation forward pass saved is no longer there."""
    form = BLOCK._replace(training=False)
    inputs = make(2, 4, (3, 3), form, device=device)
    (y,) = apply(inputs, form)
    apply(inputs, BLOCK)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Several processes.

WORKER = """
import sys, torch, torch.distributed as dist
import kernels
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
answers = []
for case in torch.load(f"{folder}/cases", weights_only=True):
    first, last = case["shares"][rank : rank + 2]
    def mine(value):
        return value[first:last].contiguous(memory_format=torch.channels_last)
    x, shortcut = (mine(case[name]).requires_grad_() for name in ("x", "shortcut"))
    weight, bias = (case[name].requires_grad_() for name in ("weight", "bias"))
    sizes = []
    def all_reduce(tensor):
        sizes.append(tensor.numel())
        dist.all_reduce(tensor)
    y, pooled = kernels.bn_act(
        x, weight, bias, case["running_mean"], case["running_var"], shortcut, relu=True,
        training=True, momentum=0.1, eps=1e-5, pool=True, all_reduce=all_reduce,
        backend=case["backend"])
    grads = torch.autograd.grad(
        [y, pooled], [x, weight, bias, shortcut],
        [mine(case["grad"]), case["grad_pooled"][first:last]])
    results = [y.detach(), pooled.detach(), *grads, case["running_mean"], case["running_var"]]
    answers.append({"results": results, "sizes": sizes})
torch.save(answers, f"{folder}/answers{rank}")
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Unequal shares of the batch; then all of it in one process and none in the other."""
    form = Form(shortcut=True, relu=True, training=True, pool=True)
    codes = [("reference", torch.float64)]
    if _library.AVAILABLE:
        codes += [("cpp", torch.float64), ("cpp", torch.float32), ("cpp", torch.float16)]
    tasks = list(itertools.product(codes, ([0, 2, 5], [0, 5, 5])))
    names = ("x", "weight", "bias", "shortcut", "running_mean", "running_var", "grad")
    cases = []
    for (backend, dtype), shares in tasks:
        inputs = make(5, 8, (6, 7), form, dtype=dtype)
        values = {name: getattr(inputs, name).detach() for name in (*names, "grad_pooled")}
        cases.append({**values, "backend": backend, "shares": shares})
    torch.save(cases, tmp_path / "cases")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    answers = [torch.load(tmp_path / f"answers{rank}", weights_only=True) for rank in range(2)]
    for ((backend, dtype), _), one, other in zip(tasks, *answers, strict=True):
        # Forward sums, squares and rows; backward the sums of both parameter gradients (the
        # reference: those of what it exchanged forward).
        backward = 2 * 8 if backend == "cpp" else 2 * 8 + 1
        assert one["sizes"] == other["sizes"] == [2 * 8 + 1, backward]
        one, other = one["results"], other["results"]
        y, pooled, dx, dshortcut = (torch.cat([one[i], other[i]]) for i in (0, 1, 2, 5))
        assert torch.equal(one[6], other[6]) and torch.equal(one[7], other[7])
        actual = [y, pooled, dx, one[3] + other[3], one[4] + other[4], dshortcut, *one[6:]]
        inputs = make(5, 8, (6, 7), form, dtype=dtype)
        assert_close(actual, inputs, form)


# Layouts, backends and messages.


def test_other_layout_runs_the_reference_with_one_warning() -> None:
    inputs = make(2, 8, (3, 3), BLOCK)
    nchw = inputs._replace(x=inputs.x.detach().contiguous(), shortcut=inputs.shortcut.contiguous())
    with pytest.warns(RuntimeWarning, match="bn_act: using the slower PyTorch reference"):
        (y,) = apply(nchw, BLOCK)
    assert y.is_contiguous()
    torch.testing.assert_close(y, apply(inputs, BLOCK)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(nchw, BLOCK)


@needs_extension
@pytest.mark.parametrize("name", ["x", "shortcut"])
def test_other_layout_is_refused_by_a_forced_backend_and_by_the_operator(name: str) -> None:
    inputs = make(2, 8, (3, 3), BLOCK)
    nchw = inputs._replace(**{name: getattr(inputs, name).detach().contiguous()})
    message = f"bn_act: backend=cpp was asked for, but {name} is not contiguous in channels_last"
    with pytest.raises(RuntimeError, match=message):
        apply(nchw, BLOCK, "cpp")
    norm = (*(v.detach() for v in nchw[1:3]), nchw.running_mean, nchw.running_var)
    with pytest.raises(ValueError, match=f"bn_act: {name} must be contiguous in channels_last"):
        torch.ops.accel_kernels.bn_act(
            nchw.x.detach(), *norm, nchw.shortcut.detach(), EPS, True, True, False, False
        )


def test_missing_extension_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "AVAILABLE", False)
    monkeypatch.setattr(_library, "REASON", "kernels._C is not built")
    inputs = make(2, 8, (3, 3), BLOCK)
    with pytest.warns(RuntimeWarning, match="because kernels._C is not built") as caught:
        first = run(inputs, BLOCK)
        run(inputs, BLOCK)
    assert len(caught) == 1
    assert all(map(torch.equal, first, run(inputs, BLOCK, "reference")))
    with pytest.raises(RuntimeError, match=r"backend=cpp was asked for, but kernels._C is not"):
        run(inputs, BLOCK, "cpp")


@needs_extension
def test_forced_cpp_backend_runs_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "bn_act", unexpected)
    monkeypatch.setenv("ACCEL_KERNELS", "cpp")
    run(make(2, 4, (2, 2), BLOCK), BLOCK)


BAD_ARGUMENTS = {
    "rank": (lambda v: {"x": v.x[0]}, "x must be \\[B, C, H, W\\]"),
    "weight": (lambda v: {"weight": v.weight[:4]}, "weight must be \\[C\\] = \\[8\\], got \\[4\\]"),
    "half_bias": (lambda v: {"bias": v.bias.half()}, "bias must be torch.float64"),
    "running": (lambda v: {"running_var": v.running_var[:1]}, "running_var must be \\[C\\]"),
    "shortcut": (lambda v: {"shortcut": v.shortcut[:1]}, "shortcut must be like x"),
    "half_shortcut": (lambda v: {"shortcut": v.shortcut.half()}, "shortcut must be like x"),
    "single_row": (
        lambda v: {"x": v.x[:1, :, :1, :1], "shortcut": v.shortcut[:1, :, :1, :1]},
        "training needs more than one value per channel",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    change, message = BAD_ARGUMENTS[name]
    inputs = make(2, 8, (3, 3), BLOCK)
    with pytest.raises((ValueError, TypeError), match=f"^bn_act: {message}"):
        apply(inputs._replace(**change(inputs)), BLOCK)


@needs_extension
def test_operators_refuse_what_does_not_fit() -> None:
    inputs = make(2, 8, (3, 3), BLOCK)
    x, weight, bias, shortcut, mean, var, grad, _ = (v.detach() for v in inputs)
    norm, ops = (weight, bias, mean, var), torch.ops.accel_kernels
    flags = (EPS, True, True, False, False)
    with pytest.raises(ValueError, match="running_mean and running_var must both be tensors"):
        ops.bn_act_statistics(x, mean, None, 0.1)
    with pytest.raises(TypeError, match="mean must be"):
        ops.bn_act(x, weight, bias, mean.float(), var, None, *flags)
    with pytest.raises(ValueError, match="bias must be contiguous"):
        ops.bn_act(x, weight, torch.stack([bias, bias], 1)[:, 0], mean, var, None, *flags)
    with pytest.raises(ValueError, match="shortcut must be like x"):
        ops.bn_act(x, *norm, shortcut.float(), *flags)
    with pytest.raises(ValueError, match="mask must be the one of the forward pass"):
        ops.bn_act_backward_sums(grad, None, x, *norm, torch.zeros(3, dtype=torch.uint8), EPS, True)
    with pytest.raises(ValueError, match="relu needs x or the mask"):
        ops.bn_act_backward(
            grad, None, None, *norm, None, None, None, None, EPS, True, [True, False]
        )
    with pytest.raises(ValueError, match="dshortcut needs the mask"):
        ops.bn_act_backward(grad, None, x, *norm, None, None, None, None, EPS, True, [True, True])
    with pytest.raises(ValueError, match="depends on it through the statistics"):
        ops.bn_act_backward(
            grad, None, None, *norm, None, weight, bias, None, EPS, False, [True, False]
        )
    with pytest.raises(ValueError, match="grad_pooled must be"):
        ops.bn_act_backward_sums(grad, weight, x, *norm, None, EPS, True)


# PyTorch's subsystems.


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    ops = torch.ops.accel_kernels
    inputs = make(2, 12, (2, 3), BLOCK, device=device)
    x, weight, bias, shortcut, mean, var = inputs[:6]
    torch.library.opcheck(ops.bn_act_statistics, (x.detach(), mean.clone(), var.clone(), 0.1))
    torch.library.opcheck(ops.bn_act_statistics, (x.detach(), None, None, 0.1))
    norm = (mean, var)
    for batch_statistics in (False, True):
        # Statistics are no functions of x for the checker, so it may not compare its gradient
        # when they are: the operator's own tests do.
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        tests += ["test_aot_dispatch_dynamic"]
        for other, pool in ((None, True), (shortcut, False)):
            flags = (EPS, True, batch_statistics, pool, other is not None)
            torch.library.opcheck(
                ops.bn_act, (x, weight, bias, *norm, other, *flags), test_utils=tests
            )
    detached = tuple(v.detach() for v in (weight, bias, mean, var))
    mask = ops.bn_act(x.detach(), *detached, shortcut.detach(), EPS, True, True, False, True)[2]
    grad, x = inputs.grad, x.detach()
    torch.library.opcheck(
        ops.bn_act_backward_sums, (grad, inputs.grad_pooled, x, *detached, None, EPS, True)
    )
    torch.library.opcheck(ops.bn_act_backward_sums, (grad, None, x, *detached, mask, EPS, True))
    sums = (weight.detach(), bias.detach())
    count = weight.detach()[:1].abs()
    for source, gate, totals, wanted in (
        (x, None, (*sums, None), [True, False]),
        (x, mask, (*sums, count), [True, True]),
        (None, mask, (None, None, None), [False, True]),
    ):
        arguments = (grad, None, source, *detached, gate, *totals, EPS, True, wanted)
        torch.library.opcheck(ops.bn_act_backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Half activations from a convolution, fp32 parameters: the operator runs in half."""
    inputs = make(4, 8, (3, 3), BLOCK, dtype=torch.float32, device=device)
    convolution = torch.nn.Conv2d(8, 8, 1).to(device).to(memory_format=torch.channels_last)
    with torch.autocast(device, dtype):
        y = apply(inputs._replace(x=convolution(inputs.x), shortcut=None), BLOCK)[0]
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert inputs.weight.grad.dtype == torch.float32
    assert torch.isfinite(convolution.weight.grad).all()


class Block(torch.nn.Module):
    """A layer with the operator behind it, as models use it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(8, 8, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.norm
        return kernels.bn_act(
            self.convolution(x),
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            x,
            relu=True,
            training=self.training,
            momentum=MOMENTUM,
            eps=EPS,
            pool=True,
        )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(compiler: str, training: bool, device: str) -> None:
    torch.manual_seed(0)
    x = make(2, 8, (3, 3), BLOCK, dtype=torch.float32, device=device).x
    eager = Block().to(device).to(memory_format=torch.channels_last).train(training)
    other = Block().to(device).to(memory_format=torch.channels_last).train(training)
    other.load_state_dict(eager.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    results = []
    for block, function in ((eager, eager), (other, compiled)):
        for _ in range(2):
            y, pooled = function(x)
            grads = torch.autograd.grad(
                y.square().sum() + pooled.sum(), [x, *block.parameters()][:4]
            )
        results.append([y, pooled, *grads, *block.norm.buffers()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("fresh_compiler")
@needs_extension
@pytest.mark.parametrize("training", [False, True])
def test_export(training: bool) -> None:
    torch.manual_seed(0)
    x = make(2, 8, (3, 3), BLOCK, dtype=torch.float32).x.detach()
    block = Block().to(memory_format=torch.channels_last).train(training)
    program = torch.export.export(block, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("accel_kernels.bn_act.default") == 1
    exported = program.module()
    for one, two in zip(exported(x), block(x), strict=True):
        torch.testing.assert_close(one, two)
    buffers = dict(exported.named_buffers())
    assert training != torch.equal(block.norm.running_mean, torch.zeros(8))
    for name, value in block.named_buffers():
        torch.testing.assert_close(buffers[name], value)


@pytest.mark.needs_cuda
@needs_extension
def test_cuda_graph_capture() -> None:
    inputs = make(4, 64, (7, 7), BLOCK, dtype=torch.float16, device="cuda")
    expected = run(inputs, BLOCK)
    with torch.cuda.stream(torch.cuda.Stream()):
        run(inputs, BLOCK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, BLOCK)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.needs_cuda
@needs_extension
def test_cuda_matches_the_twin() -> None:
    """Same split of the sums on both: fp64 results agree to a few roundings."""
    form = Form(shortcut=True, relu=True, training=True, pool=True)
    inputs = make(9, 72, (14, 14), form)
    on_device = Inputs(*(v.detach().cuda() for v in inputs))
    for leaf in on_device.leaves:
        leaf.requires_grad_()
    for one, other in zip(run(inputs, form), run(on_device, form), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-12, atol=1e-13)
