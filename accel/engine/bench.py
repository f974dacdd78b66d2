"""Rates of a recipe on this machine: the network alone, the input alone, and both together."""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from accel.engine import config as configs
from accel.engine.run import environment
from accel.engine.trainer import Trainer

MODES = ("compute", "loader", "train")


class Marks:
    """Moments between steps: events of a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Remember this moment; waits for nothing."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds between neighboring moments."""
        if self._cuda:
            self._marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(self._marks)]
        return [(b - a) * 1e3 for a, b in itertools.pairwise(self._marks)]


def bench(trainer: Trainer, *, warmups: int, steps: int) -> dict[str, Any]:
    """Measure every mode on the training set.

    compute: optimizer steps on one batch that stays on the device. loader: fetching the clips of
    as many steps. train: real steps. The rates are those of this process.

    Args:
        trainer: freshly built; its network has trained afterwards and must not be used.
        warmups: steps before each measurement, >= 1.
        steps: measured steps of each mode, >= 1.

    Returns:
        `rows` (mode, step_ms, p10_ms, p90_ms, clips_per_s, data_wait), `environment`, `recipe`,
        `recipe_sha256`, `loader`.
    """
    recipe, accumulation = trainer.recipe, trainer.accumulation
    clips = recipe.train.micro_batch * accumulation
    resident = next(trainer.train_loader.epoch(0))
    rows = []
    for mode in MODES:
        batches: Iterator[Any] = itertools.repeat(resident)
        if mode != "compute":
            epochs = (trainer.train_loader.epoch(epoch) for epoch in itertools.count())
            batches = itertools.chain.from_iterable(epochs)
        marks, waited = Marks(trainer.device), 0.0
        for index in range(warmups + steps):
            if index == warmups:
                marks.mark()
                waited = trainer.step.data_wait.total_s
            if mode == "loader":
                for _ in range(accumulation):
                    next(batches)
            else:
                trainer.step(batches, index)
            if index >= warmups:
                marks.mark()
        times = sorted(marks.intervals_ms())
        row = {"mode": mode, **_quantiles(times), "clips_per_s": 0.0, "data_wait": 0.0}
        row["clips_per_s"] = round(clips * 1e3 / float(row["step_ms"]), 2)
        if mode == "train":
            waited = trainer.step.data_wait.total_s - waited
            row["data_wait"] = round(waited * 1e3 / sum(times), 4)
        rows.append(row)
    return {
        "recipe": recipe.name,
        "recipe_sha256": configs.fingerprint(recipe),
        "loader": trainer.train_loader.description,
        "precision": recipe.precision.mode,
        "clips_per_step": clips,
        "steps": steps,
        "rows": rows,
        "environment": environment(trainer.device),
    }


def _quantiles(ordered: list[float]) -> dict[str, Any]:
    last = len(ordered) - 1
    values = {
        "step_ms": statistics.median(ordered),
        "p10_ms": ordered[round(0.1 * last)],
        "p90_ms": ordered[round(0.9 * last)],
    }
    return {name: round(value, 3) for name, value in values.items()}
