"""What a run trains: its data, network, step and measure, as the trainer's loop sees them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.graphs import Graphs
from accel.engine.optim import Optimizer
from accel.engine.precision import Precision
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from pipelines.loader import Loader
from pipelines.microtube_loader import MicrotubeLoader
from pipelines.order import Split


@dataclass(frozen=True)
class Setting:
    """What the parts of a run are built from."""

    recipe: Recipe
    world: World
    device: torch.device
    precision: Precision
    ranges: Ranges
    accumulation: int
    """Micro-batches per optimizer step of this process."""

    graphs: Graphs | None
    """What records the steps; None = they are launched one by one."""

    quarantine: Path
    """File of the run that lists unusable videos."""

    on_close: contextlib.ExitStack
    """What ends with the run, also one that could not be built."""

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The network as the step calls it, which exchanges gradients with the other processes."""
        # DDP remembers the stream it was made on, and exchanges gradients there.
        with self.graphs.side_stream() if self.graphs else contextlib.nullcontext():
            return self.world.wrap(
                model,
                self.device,
                accumulation=self.accumulation,
                compression=self.recipe.run.compress_gradients,
                ranges=self.ranges,
            )


class Task(ABC):
    """Recognition (`recognition.py`) or detection (`detection.py`): what differs between them.

    Args:
        setting: of the run.
        dataset: of `open_dataset`.
        stored: the checkpoint that the run continues from: its decoders read the videos where they
            can, and weights to start from are not needed again. None = a fresh start.
    """

    rating_name: ClassVar[str]
    """What the best checkpoint is chosen by (`best_top1` holds it), as the scores call it."""

    scores_type: ClassVar[Callable[..., Any]]
    """Makes the scores of an evaluation again from a checkpoint's."""

    model: nn.Module
    optimizer: Optimizer
    step: TrainStep
    train_loader: Loader | MicrotubeLoader
    val_loader: Loader | MicrotubeLoader

    video_loaders: Mapping[Split, Loader]
    """Those of the loaders that decode videos and know which are unusable."""

    @staticmethod
    @abstractmethod
    def open_dataset(recipe: Recipe, world: World) -> Any:
        """The data of both splits; on rank 0 first, where something is generated."""

    @abstractmethod
    def __init__(self, setting: Setting, dataset: Any, stored: Mapping[str, Any] | None) -> None:
        """Build network, optimizer, loaders and step."""

    @abstractmethod
    def rehearse(self, batch: Any) -> dict[str, list[int]]:
        """One forward and backward of a micro-batch, finished on the device; shapes by name.

        The network is left with gradients and must not be trained after.
        """

    @abstractmethod
    def measure(self, poll: Callable[[], None]) -> Any:
        """Evaluate; the same scores on all processes.

        Args:
            poll: called between batches; may raise to end the evaluation. Only of use with one
                process: several may hold different numbers of batches, so they could not agree.
        """

    @property
    def decoders(self) -> list[str]:
        """Who decodes and scales each split: other ones differ by a few grey levels."""
        return [self.train_loader.backend, self.val_loader.backend]


def task_of(recipe: Recipe) -> type[Task]:
    """What a recipe is about."""
    if recipe.detection.network != "none":
        from accel.engine.detection import Detection

        return Detection
    from accel.engine.recognition import Recognition

    return Recognition
