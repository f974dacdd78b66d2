"""Exact evaluation: every clip of the split once, for any batch size and number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from accel.engine.distributed import World
from accel.engine.metrics import ClassificationMeter, Scores
from accel.engine.precision import Precision
from accel.engine.timing import Ranges
from pipelines.loader import Loader


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """Evaluation on the validation split: one center view, frames in the middle of the segments."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    batch: int = 0
    """Clips per forward of one process; 0 = train.micro_batch."""
    every_epochs: int = 1
    """Evaluate after every so many epochs (and always at the end), >= 1."""

    def __post_init__(self) -> None:
        if self.batch < 0:
            raise ValueError(f"test.batch: must be >= 0 (0 = train.micro_batch), got {self.batch}.")
        if self.every_epochs < 1:
            raise ValueError(f"test.every_epochs: must be >= 1, got {self.every_epochs}.")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    num_classes: int,
    precision: Precision,
    world: World,
    ranges: Ranges,
    poll: Callable[[], None],
) -> Scores:
    """Metrics of `model` over all clips of `loader`, summed over ranks as integers.

    Args:
        model: the bare network (not a DDP wrapper); left in train mode if it was.
        poll: called after every batch; may raise to end the evaluation early (a stop request).
    """
    # Each rank keeps its own batch-norm statistics while training; rank 0's are the saved ones.
    world.broadcast_(list(model.buffers()))
    meter = ClassificationMeter(num_classes, precision.device)
    was_training = model.training
    model.eval()
    try:
        with ranges("evaluation"):
            for batch in loader.epoch(0):
                frames = precision.network_input(batch.clips)
                with precision.autocast():
                    logits = model(frames)
                meter.update(logits, batch.labels)
                poll()
    finally:
        model.train(was_training)
    world.sum_(meter.tensors())
    return meter.compute()
