"""Optimizer steps on random clips that leave a run as it was: to try and to time them."""

import contextlib
import itertools
import time
from collections.abc import Iterator

import torch

from accel.engine.config import Recipe
from accel.engine.step import TrainStep
from pipelines.loader import Batch


def random_batch(recipe: Recipe, clips: int, num_classes: int, device: torch.device) -> Batch:
    """A micro-batch of noise with the shapes of a recipe's training batches."""
    size = recipe.augment.size
    frames = recipe.sampling.num_segments * recipe.model.frames_per_segment
    generator = torch.Generator().manual_seed(0)
    shape = (clips, frames, size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (clips,), generator=generator)
    colors = None
    if recipe.augment.color_jitter != "none":
        colors = torch.eye(3, 4, device=device).repeat(clips * frames, 1, 1)
    return Batch(pixels.to(device), labels.to(device), torch.arange(clips), colors)


class Rehearsal:
    """Steps of a run that has not begun, on one micro-batch again and again.

    Args:
        step: of the run, in one process.
        batch: random ones do.
    """

    rounds = 2
    """Timed rounds; the faster one counts."""

    steps = 5
    """Steps of a round."""

    def __init__(self, step: TrainStep, batch: Batch) -> None:
        self._step = step
        self._batch = batch

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Weights, statistics, momentum and loss scale come back; gradients go."""
        tensors, scaler = self._step.state(), self._step.precision.scaler
        kept = [tensor.detach().clone() for tensor in tensors]
        scale = scaler.state_dict()
        try:
            yield
        finally:
            self._step.abandon()
            with torch.no_grad():
                for tensor, before in zip(tensors, kept, strict=True):
                    tensor.copy_(before)
            if scaler.is_enabled():
                scaler.load_state_dict(scale)

    def run(self, steps: int) -> None:
        """Do steps and wait for them; inside `untouched`."""
        for iteration in range(steps):
            self._step(itertools.repeat(self._batch), iteration)
        if self._batch.clips.device.type == "cuda":
            torch.cuda.synchronize(self._batch.clips.device)

    def seconds_per_step(self, warm_up: int) -> float:
        """Time of one step, after `warm_up` of them."""
        with self.untouched():
            self.run(warm_up)
            times = []
            for _ in range(self.rounds):
                start = time.perf_counter()
                self.run(self.steps)
                times.append(time.perf_counter() - start)
        return min(times) / self.steps
