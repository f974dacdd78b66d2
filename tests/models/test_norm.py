"""BatchNormAct2d: both implementations, alone and in a network."""

import pytest
import torch

from accel.errors import ConfigError
from accel.models import build_model, norm
from accel.models.norm import (
    BatchNormAct2d,
    ConvBeforeNorm2d,
    conv_norm,
    set_implementation,
    synchronize,
)

pytestmark = pytest.mark.needs_extension


@pytest.fixture(autouse=True)
def cpp_kernels(monkeypatch):
    """A fallback would be an error."""
    monkeypatch.setenv("ACCEL_KERNELS", "cpp")


def _pair(**options):
    """Two equal norms, by "torch" and "fused"."""
    norms = [BatchNormAct2d(8, **options).double() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for parameter in norms[0].parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    norms[1].load_state_dict(norms[0].state_dict())
    norms[1].implementation = "fused"
    return norms


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_implementations_agree(relu, with_shortcut, pool, memory_format):
    generator = torch.Generator().manual_seed(1)
    x, shortcut, grad = (
        torch.randn(4, 8, 5, 3, generator=generator, dtype=torch.float64).contiguous(
            memory_format=memory_format
        )
        for _ in range(3)
    )
    results = []
    for module in _pair(relu=relu):
        values = []
        for training in (True, True, False):
            leaves = [x.clone().requires_grad_(), shortcut.clone().requires_grad_()]
            y = module.train(training)(leaves[0], leaves[1] if with_shortcut else None, pool=pool)
            y, pooled = y if pool else (y, torch.zeros(()))
            ((y * grad).sum() + pooled.square().sum()).backward()
            values += [y, pooled, leaves[0].grad]
            values += [leaves[1].grad] if with_shortcut else []
        values += [parameter.grad for parameter in module.parameters()]
        results.append(values + list(module.state_dict().values()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _network(implementation, **options):
    torch.manual_seed(0)
    options = {"depth": 50, "width": 8, "stages": 2, "dropout": 0.0} | options
    model = build_model(
        "tanet", num_classes=5, num_segments=4, batch_norm=implementation, **options
    )
    return model.double()


@pytest.mark.parametrize("partial_bn", [False, True])
def test_network_does_the_same(partial_bn):
    frames = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for implementation in ("torch", "fused"):
        model = _network(implementation, partial_bn=partial_bn)
        logits = model(frames)
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits, **gradients, **model.state_dict()})
    one, other = results
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-10, msg=name)


def test_fused_network_runs_one_operator_per_norm(monkeypatch):
    calls = []
    monkeypatch.setattr(
        norm.kernels,
        "bn_act",
        lambda *a, f=norm.kernels.bn_act, **k: (calls.append(k), f(*a, **k))[1],
    )
    model = _network("fused")
    model(torch.randn(4, 3, 32, 32).double())
    norms = [m for m in model.modules() if isinstance(m, BatchNormAct2d)]
    assert len(calls) == len(norms)
    assert sum(options["pool"] for options in calls) == 7  # of the blocks, for TAM
    calls.clear()
    for implementation in ("torch", "auto"):  # "auto" on a CPU is "torch"
        set_implementation(model, implementation)
        model(torch.randn(4, 3, 32, 32).double())
    assert not calls


def test_automatic_choice_follows_the_device(monkeypatch):
    module = BatchNormAct2d(8).double()
    monkeypatch.setattr(module, "_fused", lambda *arguments: "fused")
    x = torch.randn(2, 8, 3, 3).double()
    assert isinstance(module(x), torch.Tensor)
    monkeypatch.setattr(norm, "_FUSED_IS_FASTER", frozenset({"cpu"}))
    assert module(x) == "fused"


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"got 'cudnn', expected one of \['auto', 'fused'"):
        set_implementation(BatchNormAct2d(8), "cudnn")
    with pytest.raises(ConfigError, match=r"model.batch_norm: got 'cudnn'"):
        build_model("tsn", num_classes=5, num_segments=4, batch_norm="cudnn")


def test_synchronized_norms_sum_over_the_processes():
    """As if another process had the same clips: sums double, statistics and gradients stay."""
    x = torch.randn(4, 8, 5, 3, generator=torch.Generator().manual_seed(1)).double()
    alone, together = _pair()
    sizes = []

    def all_reduce(tensor):
        sizes.append(tensor.numel())
        tensor.mul_(2)

    synchronize(together, all_reduce)
    results = []
    for module in (alone, together):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, module.weight.grad, module.bias.grad, module.running_mean])
    assert sizes == [2 * 8 + 1, 2 * 8]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # The unbiased variance is of twice as many rows.
    rows = x.numel() // 8
    step = [m.running_var - 0.9 for m in (alone, together)]
    factor = (2 * rows / (2 * rows - 1)) / (rows / (rows - 1))
    torch.testing.assert_close(step[1], step[0] * factor, rtol=1e-12, atol=1e-12)
    together.eval()(x)
    assert len(sizes) == 2


@pytest.mark.parametrize("implementation", ["torch", "fused"])
def test_bias_before_a_norm_has_no_gradient_in_training(implementation):
    """All else is as in the plain chain, where that gradient has rounding errors."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    conv = ConvBeforeNorm2d(3, 8, 3, bias=True).double()
    norms = _pair()
    for norm_ in norms:
        norm_.implementation = implementation
    for training in (True, True, False):
        results = []
        for norm_, chain in zip(norms, (conv_norm, lambda c, n, v: n(c(v))), strict=True):
            conv.zero_grad()
            y = chain(conv, norm_.train(training), x)
            y.square().sum().backward()
            results.append((y, conv.weight.grad, *norm_.state_dict().values(), conv.bias.grad))
        (*values, db), (*expected, expected_db) = results
        assert all(torch.equal(*pair) for pair in zip(values, expected, strict=True))
        torch.testing.assert_close(db, expected_db, rtol=0, atol=1e-10)
        assert bool(db.any()) != training
