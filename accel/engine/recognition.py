"""Training a classifier of clips in the engine: batches of clips in, top-k out."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from accel.engine.config import Recipe
from accel.engine.data import open_loader, open_shared_dataset
from accel.engine.distributed import World
from accel.engine.evaluate import evaluate
from accel.engine.metrics import Scores
from accel.engine.optim import Optimizer
from accel.engine.seeding import seed_everything
from accel.engine.state import decoders_of
from accel.engine.step import TrainStep, training_loss
from accel.engine.task import Setting, Task
from accel.models import build_model
from accel.models.norm import synchronize
from accel.models.recompute import recompute_activations
from pipelines.datasets import Dataset
from pipelines.loader import Batch, Loader
from pipelines.order import Split

logger = logging.getLogger(__name__)


class Recognition(Task):
    """See `Task`."""

    rating_name = "top1"
    scores_type = Scores
    train_loader: Loader
    val_loader: Loader

    @staticmethod
    def open_dataset(recipe: Recipe, world: World) -> Dataset:
        """See `Task.open_dataset`."""
        return open_shared_dataset(recipe, world)

    def __init__(
        self, setting: Setting, dataset: Dataset, stored: Mapping[str, Any] | None
    ) -> None:
        recipe, world = setting.recipe, setting.world
        self._setting, self._dataset = setting, dataset
        fresh = stored is None
        if fresh and recipe.published.init != "none" and not recipe.model.pretrained:
            logger.warning(
                "the published run starts from %s weights, this one from random ones; pass "
                "--model.pretrained FILE.",
                recipe.published.init,
            )
        seed_everything(recipe.run.seed, "model")
        settings = recipe.model if fresh else replace(recipe.model, pretrained="")
        self.model = build_model(
            **asdict(settings),
            num_classes=dataset.num_classes,
            num_segments=recipe.sampling.num_segments,
        ).to(setting.device)
        recompute_activations(self.model, recipe.train.checkpoint_activations)
        if recipe.train.sync_bn and world.size > 1:
            synchronize(self.model, lambda values: world.sum_([values]))
        self.optimizer = Optimizer(self.model, recipe.optim)
        setting.ranges.mark(self.model.named_parts())
        train_decoder, val_decoder = decoders_of(stored)
        micro_batch = recipe.train.micro_batch
        self.train_loader = self._open_loader("train", micro_batch, train_decoder)
        self.val_loader = self._open_loader("val", recipe.test.batch or micro_batch, val_decoder)
        self.video_loaders = {"train": self.train_loader, "val": self.val_loader}
        self.step = TrainStep(
            setting.wrapped(self.model),
            self.optimizer,
            setting.precision,
            accumulation=setting.accumulation,
            clip_norm=recipe.optim.clip_norm,
            seed=recipe.run.seed,
            world=world,
            ranges=setting.ranges,
            skips=recipe.train.skip_nonfinite > 0,
        )

    def _open_loader(self, split: Split, micro_batch: int, trained_with: str) -> Loader:
        setting = self._setting
        loader = open_loader(
            setting.recipe,
            self._dataset,
            split,
            micro_batch=micro_batch,
            world=setting.world,
            device=setting.device,
            ranges=setting.ranges,
            quarantine=setting.quarantine,
            trained_with=trained_with,
        )
        setting.on_close.callback(loader.close)
        return loader

    def rehearse(self, batch: Batch) -> dict[str, list[int]]:
        """See `Task.rehearse`."""
        precision = self._setting.precision
        frames = precision.network_input(batch.clips, batch.colors)
        with precision.autocast():
            output = self.model(frames)
            torch.autograd.backward(training_loss(output, batch.labels))
        if self._setting.device.type == "cuda":
            torch.cuda.synchronize()
        logits = getattr(output, "logits", output)
        return {"clips": list(batch.clips.shape), "logits": list(logits.shape)}

    def measure(self, poll: Callable[[], None]) -> Scores:
        """See `Task.measure`."""
        return evaluate(
            self.model,
            self.val_loader,
            num_classes=self._dataset.num_classes,
            precision=self._setting.precision,
            world=self._setting.world,
            ranges=self._setting.ranges,
            poll=poll,
        )
