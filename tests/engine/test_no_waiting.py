"""The loop never waits for the device, and a skipped step leaves no trace."""

import ast
import inspect
import textwrap
from dataclasses import asdict
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from accel.engine import batchnorm, precision, recorder, step, timing, trainer
from accel.engine.batchnorm import StepStatistics
from accel.engine.config import load_recipe
from accel.engine.distributed import World
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges, Readback
from accel.engine.trainer import Trainer
from accel.models import build_model
from kernels import reference
from pipelines.loader import Batch

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What makes the host wait for the device when the tensor is there.
WAITS = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "is_nonzero", "equal"}


def _train_step(
    mode="fp32", model=None, accumulation=1, frames_per_segment=1, skips=False, **options
):
    seed_everything(0, "model")
    if model is None:
        model = build_model("tanet", num_classes=3, num_segments=2, depth=18, width=8, stages=2)
    settings = PrecisionConfig(mode=mode, **options)
    return model, TrainStep(
        model,
        Optimizer(model, OptimConfig(lr=0.05)),
        Precision(settings, CPU, mean=MEAN, std=STD, frames_per_segment=frames_per_segment),
        accumulation=accumulation,
        clip_norm=1.0,
        seed=0,
        world=World(),
        ranges=Ranges("off"),
        skips=skips,
    )


def _batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        clips = torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8, generator=generator)
        yield Batch(clips, torch.tensor([0, 1, 2]), torch.arange(3))


def _calls(function):
    """Names of all methods and functions that the source of `function` calls."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def test_the_code_of_a_step_calls_nothing_that_waits():
    for module in (step, batchnorm, precision):
        waiting = WAITS & set(_calls(module))
        assert not waiting, f"{module.__name__} calls {waiting}"
    looped = (trainer.Trainer._train_step, recorder.StepRecorder.add, timing.Readback.__init__)
    for function in looped:
        assert not WAITS & set(_calls(function)), function
    # Numbers of the host become tensors by filling, which is no copy.
    for function in (reference.exchange_statistics, reference.update_running, kernels.bn_act):
        assert not (WAITS | {"new_tensor", "tensor", "as_tensor"}) & set(_calls(function)), function
    # The one place that waits, for a step that ended before the last launch.
    assert "synchronize" in set(_calls(timing.Readback.values))


def test_no_operator_of_a_step_reads_the_device(monkeypatch):
    """On a CPU the operators behind .item(), .nonzero() and bool(tensor) show themselves too."""
    reading = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
                reading.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in ("fp32", "bf16", "fp16"):
        _, train_step = _train_step(mode, accumulation=2)
        train_step(_batches(2), 0)  # the first call may set things up
        with Watch():
            train_step(_batches(2, seed=1), 1)
        # Fused SGD on a CPU reads its own flag and scale there; nothing else may.
        assert set(reading) <= {"aten._local_scalar_dense.default"}
        assert not reading or mode == "fp16", reading


class _Event:
    """A stand-in for CUDA's events that writes down who waits for what."""

    log: ClassVar[list[str]] = []

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("wait")


def test_metrics_are_read_after_the_next_step_was_launched(tiny_recipe, tmp_path, monkeypatch):
    log = _Event.log
    log.clear()
    launch = TrainStep.__call__

    def launched(self, batches, iteration, **options):
        log.append(f"step {iteration}")
        return launch(self, batches, iteration, **options)

    def readback(self, tensor):
        self._host, self._done = tensor, _Event()
        self._done.record()

    monkeypatch.setattr(TrainStep, "__call__", launched)
    monkeypatch.setattr(Readback, "__init__", readback)
    own = Trainer(load_recipe(tiny_recipe, {"train.max_steps": "4"}), tmp_path / "run")
    try:
        own.fit()
    finally:
        own.close()
    expected = ["step 0", "record"]
    for iteration in range(1, 4):
        expected += [f"step {iteration}", "wait", "record"]
    assert log == [*expected, "wait"]


def test_a_skipped_step_changes_nothing_at_all():
    # A loss scale of 2^127 overflows every gradient, whatever the network.
    model, train_step = _train_step("fp16", init_scale=2.0**127, accumulation=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = train_step(_batches(2), 0)
    assert metrics[2] == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert train_step.precision.scaler.get_scale() == 2.0**126


def test_a_step_skipped_without_a_loss_scale_changes_nothing_either():
    model, train_step = _train_step(skips=True)
    name_of_weight, weight = list(model.named_parameters())[-1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    metrics = train_step(_batches(1), 0)
    assert metrics[2] == 1 and not torch.isfinite(metrics[4:]).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    hook.remove()
    metrics = train_step(_batches(1), 1)
    assert metrics[2] == 0 and torch.isfinite(metrics).all()
    assert not torch.equal(weight, before[name_of_weight])


def test_an_applied_step_moves_the_statistics_as_without_the_guard():
    model, train_step = _train_step("fp16", init_scale=4.0)
    other, plain = _train_step("fp16", init_scale=4.0)
    plain._statistics = None
    for iteration in range(2):
        assert torch.equal(
            train_step(_batches(1, iteration), iteration), plain(_batches(1, iteration), iteration)
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_ruined_statistics_come_back():
    norm = torch.nn.BatchNorm2d(5)
    frozen = torch.nn.BatchNorm1d(3).eval()
    model = torch.nn.ModuleList([norm, frozen])
    statistics = StepStatistics(model)
    statistics.keep()
    norm(torch.full((2, 5, 2, 2), float("inf")))
    assert norm.running_mean.isinf().all() and norm.num_batches_tracked == 1
    statistics.restore_if(torch.zeros(()))
    assert norm.running_mean.isinf().all()
    statistics.restore_if(torch.ones(()))
    fresh = torch.nn.BatchNorm2d(5).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())
    assert frozen.num_batches_tracked == 0
    model.load_state_dict(model.state_dict())  # still ordinary buffers


class _LayoutCopies(TorchDispatchMode):
    """Writes down copies that give an activation another layout."""

    def __init__(self, model):
        super().__init__()
        self.parameters = {tuple(p.shape) for p in model.parameters()}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            activation = result.dim() >= 4 and result.shape[0] > 2 and result.numel() > 512
            if (
                activation
                and tuple(result.shape) not in self.parameters
                and result.stride() != source.stride()
            ):
                self.found.append((name, tuple(result.shape)))
        return result


# In channels_last every operator takes and gives tensors as they lie in memory. Known copies:
KNOWN_COPIES = {
    "tdn": [("clone", (8, 3, 32, 32))],  # the middle frame, 3 of 15 channels
    # And 7 of 8 frames of a quarter of a site's channels, in each of the motion layers.
    "msn": [("clone", (8, 3, 32, 32)), *[("clone", (7, 4, 8, 8))] * 4],
}


@pytest.mark.parametrize("name", ["tsn", "tsm", "tanet", "masnet", "amsnet", "tdn", "msn"])
def test_no_silent_layout_copies_of_activations(name):
    recipe = load_recipe("demo_motion8", {"model.name": name, "model.stages": "2"})
    seed_everything(0, "model")
    model = build_model(**asdict(recipe.model), num_classes=3, num_segments=4)
    length = recipe.model.frames_per_segment
    _, train_step = _train_step(model=model, frames_per_segment=length)
    clips = torch.randint(0, 256, (2, 4 * length, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(clips, torch.tensor([0, 1]), torch.arange(2))
    train_step(iter([batch]), 0)
    with _LayoutCopies(model) as copies:
        train_step(iter([batch]), 1)
    assert copies.found == KNOWN_COPIES.get(name, [])


def test_a_layout_copy_would_be_found():
    model = build_model("tsn", num_classes=3, num_segments=2, depth=18, width=8, stages=1)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    hook = model.trunk.layer1.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
    with _LayoutCopies(model) as copies:
        model(x)
    hook.remove()
    assert copies.found == [("clone", (4, 8, 8, 8))]
