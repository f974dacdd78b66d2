"""Steps replayed on a GPU are the eager ones, within bounds that a frozen graph would break."""

import pytest
import torch

from accel.engine.distributed import World
from accel.engine.graphs import WARM_UP_STEPS, DeviceGraphs
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.models import build_model
from pipelines.loader import Batch

STEPS = 10
LOSS, MOMENTUM = 7e-4, 0.025
"""Largest difference of a loss, and of all momentum together: both relative. On a CPU
another order of summing makes less than a third of it, a frozen rate more than twice as much."""


def train(device, accumulation, *, graphs=False, frozen="", turned=False):
    """Losses [10], momentum (flat) and loss scale after ten steps in fp16.

    Args:
        frozen: what stays as it was at the first step after the warm-up, as in a graph that has
            recorded a host number or reads other memory: "input", "last input" (of a step), "rate".
        turned: clips in reverse order, so that sums are rounded otherwise.
    """
    seed_everything(0, "model")
    model = build_model(
        "tanet", num_classes=3, num_segments=2, depth=18, width=8, stages=2, dropout=0.0
    ).to(device)
    optimizer = Optimizer(model, OptimConfig(lr=0.01), device_rates=True)
    precision = Precision(
        PrecisionConfig(mode="fp16", init_scale=2.0**10),
        device,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    precision.scaler.set_growth_interval(4)
    step = TrainStep(
        model,
        optimizer,
        precision,
        accumulation=accumulation,
        clip_norm=20.0,
        seed=0,
        world=World(),
        ranges=Ranges("off"),
    )
    replay = step.launch("graph", DeviceGraphs(device)) if graphs else None
    losses = []
    for iteration in range(STEPS):
        known = min(iteration, WARM_UP_STEPS)
        optimizer.set_lr((1 + (known if frozen == "rate" else iteration)) / STEPS)
        batches = []
        for index in range(accumulation):
            last = index == accumulation - 1
            still = frozen == "input" or (frozen == "last input" and last)
            batches.append(_batch(known if still else iteration, index, device, turned))
        losses.append(step(iter(batches), iteration)[0])
    assert replay is None or replay.problem is None
    momentum = torch.cat([m.flatten() for m in optimizer.state_dict().values()])
    return torch.stack(losses).cpu(), momentum.cpu(), precision.scaler.get_scale()


def _batch(iteration, index, device, turned):
    generator = torch.Generator().manual_seed(100 * iteration + index)
    clips = torch.randint(0, 256, (6, 2, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (6,), generator=generator)
    order = torch.arange(6).flip(0) if turned else torch.arange(6)
    return Batch(clips[order].to(device), labels[order].to(device), order)


def differences(one, other):
    """Of the losses and of the momentum, relative."""
    loss = ((one[0] - other[0]).abs() / other[0].abs().clamp(min=1)).max()
    return float(loss), float((one[1] - other[1]).norm() / other[1].norm())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_bounds_hold_for_rounding_and_not_for_anything_frozen(accumulation):
    cpu = torch.device("cpu")
    eager = train(cpu, accumulation)
    assert eager[2] == 2.0**12  # it has grown twice
    loss, momentum = differences(train(cpu, accumulation, turned=True), eager)
    assert 3 * loss < LOSS and 3 * momentum < MOMENTUM
    for frozen in ("input", "last input", "rate"):
        loss, momentum = differences(train(cpu, accumulation, frozen=frozen), eager)
        assert loss > 2 * LOSS and momentum > 2 * MOMENTUM, frozen


@pytest.mark.needs_cuda
@pytest.mark.parametrize("accumulation", [1, 3])
def test_on_a_gpu(accumulation):
    device = torch.device("cuda", 0)
    eager, replayed = train(device, accumulation), train(device, accumulation, graphs=True)
    loss, momentum = differences(replayed, eager)
    assert loss < LOSS and momentum < MOMENTUM
    assert replayed[2] == eager[2] == 2.0**12
