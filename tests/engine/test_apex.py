"""The adapter for apex's FusedSGD, with a stand-in that follows its kernel's documented rule."""

import sys
import types

import pytest
import torch

from accel.cli import doctor
from accel.engine import apex
from accel.engine.distributed import World
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.errors import ConfigError
from accel.models import build_model
from pipelines.loader import Batch

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FusedSGD(torch.optim.Optimizer):
    """apex/optimizers/fused_sgd.py and csrc/multi_tensor_sgd_kernel.cu, as they behave."""

    def __init__(
        self,
        params,
        lr,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        wd_after_momentum=False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "nesterov": nesterov})
        self.wd_after_momentum = wd_after_momentum
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)
        self.first_runs = []

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            first_run = True
            for p in parameters:
                first_run = "momentum_buffer" not in self.state[p]
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            self.first_runs.append(first_run)
            if self._dummy_overflow_buf.item():
                continue
            momentum, decay = group["momentum"], group["weight_decay"]
            for p in parameters:
                gradient, buffer = p.grad.clone(), self.state[p]["momentum_buffer"]
                if not self.wd_after_momentum:
                    gradient += decay * p
                if momentum:
                    own = gradient if first_run else (1 - group["dampening"]) * gradient
                    buffer.copy_(own if first_run else buffer * momentum + own)
                    gradient = gradient + momentum * buffer if group["nesterov"] else buffer.clone()
                if self.wd_after_momentum:
                    gradient += decay * p
                p -= group["lr"] * gradient


@pytest.fixture
def installed(monkeypatch):
    """Puts a package called apex in place."""

    def install(**members):
        package = types.ModuleType("apex")
        package.__path__ = []
        package.__spec__ = types.SimpleNamespace(name="apex", submodule_search_locations=[])
        monkeypatch.setitem(sys.modules, "apex", package)
        if members:
            optimizers = types.ModuleType("apex.optimizers")
            vars(optimizers).update(members)
            monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
        monkeypatch.setattr(apex, "_DEVICE_TYPES", ("cuda", "cpu"))

    return install


def _trained(implementation, mode="fp32", **options):
    seed_everything(0, "model")
    model = build_model("tanet", num_classes=3, num_segments=2, depth=18, width=8, stages=2)
    config = OptimConfig(implementation=implementation, groups="tanet_original", **options)
    optimizer = Optimizer(model, config)
    precision = Precision(PrecisionConfig(mode=mode, init_scale=2.0**10), CPU, mean=MEAN, std=STD)
    step = TrainStep(
        model,
        optimizer,
        precision,
        accumulation=1,
        clip_norm=1.0,
        seed=0,
        world=World(),
        ranges=Ranges("off"),
    )
    metrics = []
    for iteration in range(5):
        optimizer.set_lr(1 / (1 + iteration))
        if mode == "fp16" and iteration > 1:
            precision.scaler._scale.fill_(2.0**127 if iteration == 2 else 2.0**10)  # overflows
        clips = torch.full((3, 2, 32, 32, 3), 40 * iteration, dtype=torch.uint8)
        clips[1:] //= 2
        batch = Batch(clips, torch.tensor([0, 1, 2]), torch.arange(3))
        metrics.append(step(iter([batch]), iteration))
    momentum = {f"momentum.{name}": value for name, value in optimizer.state_dict().items()}
    return torch.stack(metrics), {**model.state_dict(), **momentum}, optimizer


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("fp32", {}),
        ("fp32", {"nesterov": True, "weight_decay": 0.01}),
        ("fp32", {"momentum": 0.0}),
        ("fp16", {}),
    ],
)
def test_steps_are_those_of_torch(installed, mode, options):
    installed(FusedSGD=FusedSGD)
    expected, tensors, _ = _trained("torch", mode, lr=0.05, **options)
    found, others, optimizer = _trained("apex", mode, lr=0.05, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert found[:, 2].tolist() == [0, 0, 1.0 if mode == "fp16" else 0, 0, 0]
    if options.get("momentum") != 0:
        assert not any(optimizer.sgd.first_runs)  # buffers of zeros are there before the first step
    assert not optimizer.sgd.wd_after_momentum


def test_a_flagged_step_changes_nothing(installed):
    installed(FusedSGD=FusedSGD)
    _, _, optimizer = _trained("apex")
    before = [p.detach().clone() for p in optimizer.parameters()]
    for parameter in optimizer.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.sgd.found_inf = torch.ones(())
    optimizer.sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.parameters(), strict=True))


def _error():
    with pytest.raises(ConfigError) as caught:
        _trained("apex")
    return str(caught.value)


def _doctor():
    return dict(doctor._report())["apex"]


def test_what_is_missing_is_said(installed, monkeypatch):
    assert _doctor() == "not installed (optional)"
    assert "apex cannot be used, not installed" in _error()
    installed()
    assert "PyPI's is a web toolkit" in _doctor() and "web toolkit" in _error()
    installed(FusedAdam=object)
    assert "no optimizers.FusedSGD" in _doctor()
    installed(FusedSGD=FusedSGD)
    assert _doctor().startswith("NVIDIA apex; --optim.implementation apex")
    monkeypatch.setattr(apex, "_DEVICE_TYPES", ("cuda",))
    assert "apex needs a GPU, this run is on cpu" in _error()

    class WithoutExtensions(FusedSGD):
        def __init__(self, *_, **__):
            raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    installed(FusedSGD=WithoutExtensions)
    assert "requires cuda extensions; use torch" in _error()
