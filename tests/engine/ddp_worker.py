"""One rank of trainings on synthetic clips or micro-tubes.

[torchrun] ddp_worker.py OUT KEY=VALUE,.. KEY=VALUE,..

Writes metrics and weights of rank 0 to OUT, for each configuration. Every step takes the same 12
clips of 2 segments, dealt out in micro-batches as the loader does it.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from accel.engine.detection import DetectionStep
from accel.engine.distributed import World, start_world, stop_world
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.engine.tube_evaluation import priors_for
from accel.models import build_model
from accel.models.detectors import build_detector
from accel.models.norm import set_implementation, synchronize
from pipelines.loader import Batch
from pipelines.microtube_loader import MicrotubeBatch
from pipelines.order import train_positions

GLOBAL = 12
DEFAULTS = {"model": "tanet", "steps": "20", "micro": "2", "compression": "none", "bn": "own"}
DEFAULTS |= {"dropout": "0"}


def train(world: World, options: dict[str, str]) -> dict[str, Any]:
    micro, steps = int(options["micro"]), int(options["steps"])
    seed_everything(0, "model")
    detector = options["model"] == "amtnet"
    model = _detector() if detector else _classifier(options, world)
    device = torch.device("cpu")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    length = 1 if detector else model.frames_per_segment
    accumulation = GLOBAL // (micro * world.size)
    more = {"priors": priors_for(64, 3), "pixel_scale": 1.0} if detector else {}
    step = (DetectionStep if detector else TrainStep)(
        world.wrap(model, device, accumulation=accumulation, compression=options["compression"]),
        Optimizer(model, OptimConfig(lr=0.01)),
        Precision(PrecisionConfig(), device, mean=mean, std=std, frames_per_segment=length),
        accumulation=accumulation,
        clip_norm=20.0,
        seed=0,
        world=world,
        ranges=Ranges("off"),
        **more,
    )

    def batch(index: int) -> Any:
        positions = train_positions(
            index, rank=world.rank, world_size=world.size, micro_batch=micro, global_batch=GLOBAL
        )
        return _microtubes(positions) if detector else _clips(positions, length)

    batches = (batch(index) for index in range(steps * accumulation))
    metrics = [step(batches, iteration, stop=world.rank == 1) for iteration in range(steps)]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return {"metrics": torch.stack(metrics), "model": weights}


def _classifier(options: dict[str, str], world: World) -> Any:
    model = build_model(
        options["model"],
        num_classes=3,
        num_segments=2,
        depth=18,
        width=8,
        stages=2,
        dropout=float(options["dropout"]),
    )
    if options["bn"] == "fused":
        set_implementation(model, "fused")
    if options["bn"] == "synchronized":
        synchronize(model, lambda values: world.sum_([values]))
    return model


def _detector() -> Any:
    return build_detector("amtnet", num_classes=4, width=4, levels=3)


def _clips(positions: Sequence[int], length: int) -> Batch:
    clips = []
    for position in positions:
        generator = torch.Generator().manual_seed(position)
        shape = (2 * length, 32, 32, 3)
        clips.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    labels = torch.tensor([position % 3 for position in positions])
    return Batch(torch.stack(clips), labels, torch.tensor(list(positions)))


def _microtubes(positions: Sequence[int]) -> MicrotubeBatch:
    """One or two actions each, large and small: micro-batches differ in their positive priors."""
    frames, boxes, labels = [], [], []
    for position in positions:
        generator = torch.Generator().manual_seed(position)
        frames.append(torch.randn(2, 3, 64, 64, generator=generator))
        corner = torch.rand(2, 1, 2, generator=generator) * 0.5
        side = 0.1 + 0.4 * torch.rand(2, 1, 2, generator=generator)
        boxes.append(torch.cat([corner, corner + side], dim=-1).expand(2, 2, 4))
        labels.append(torch.tensor([position % 3, -1 if position % 4 else 1]))
    return MicrotubeBatch((torch.cat(frames),), torch.stack(boxes), torch.stack(labels))


def main() -> None:
    out, *configurations = sys.argv[1:]
    torch.set_num_threads(1)
    world = start_world("cpu", 60)
    results = [
        train(world, DEFAULTS | dict(pair.split("=") for pair in text.split(",") if pair))
        for text in configurations
    ]
    if world.is_main:
        torch.save(results, out)
    stop_world()


if __name__ == "__main__":
    main()
