"""Training a detector in the engine: micro-tubes in, video-mAP out."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel.detection.losses import multibox_loss
from accel.detection.matching import Matches, match
from accel.engine.config import Recipe
from accel.engine.detection_config import DetectionConfig
from accel.engine.distributed import World
from accel.engine.optim import Optimizer
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.task import Setting, Task
from accel.engine.tube_evaluation import (
    DetectionScores,
    FrameDetector,
    evaluate_tubes,
    priors_for,
)
from accel.errors import CheckpointError, ConfigError
from accel.models.convert.amtnet import fill_trunk
from accel.models.detectors import Detector, build_detector
from accel.models.vgg_ssd import SSD300
from accel.models.weights import import_weights, read_state_dict
from pipelines.microtube_loader import MicrotubeBatch, MicrotubeLoader
from pipelines.microtubes import TRAIN_GAPS, list_microtubes
from pipelines.moving_objects import generate_moving_objects
from pipelines.tube_data import TubeSet, open_tube_set

logger = logging.getLogger(__name__)

_VGG_FILE = re.compile(r"\d+\.(weight|bias)")  # names in vgg16_reducedfc.pth


class _Matched(NamedTuple):
    """A micro-batch, what each prior should predict, and the divisor of its loss."""

    batch: MicrotubeBatch
    matches: Matches
    divisor: Tensor


class DetectionStep(TrainStep):
    """An optimizer step with the MultiBox loss.

    The loss is divided by the positive priors of the whole global batch, over all micro-batches and
    processes, as published: how a batch is cut changes nothing.
    """

    def __init__(self, *args: Any, priors: Tensor, pixel_scale: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.priors, self._scale = priors, pixel_scale

    def _micro_batches(self, batches: Iterator[MicrotubeBatch]) -> Iterator[_Matched]:
        # The divisor is known when all boxes are, so all micro-batches of the step are taken first.
        step = list(super()._micro_batches(batches))
        with self.ranges("matching"):
            matches = [match(batch.boxes, batch.labels, self.priors) for batch in step]
            positive = torch.stack([(own.labels > 0).sum() for own in matches]).sum().float()
            self._world.sum_([positive])
            # What is added up is averaged over the micro-batches and the processes.
            divisor = positive.clamp(min=1) / (self._accumulation * self._world.size)
        for batch, own in zip(step, matches, strict=True):
            yield _Matched(batch, own, divisor)

    def _forward(self, batch: Any) -> Tensor:
        with self.ranges("ingest"):
            inputs = [x / self._scale for x in batch.batch.streams]
        with self.precision.autocast():
            with self.ranges("forward"):
                conf, loc = self._model(*inputs)
        with self.ranges("loss"):
            localization, classification = multibox_loss(
                conf, loc, *batch.matches, divisor=batch.divisor
            )
            return localization + classification


class Detection(Task):
    """See `Task`."""

    rating_name = "video_map_50"
    scores_type = DetectionScores
    model: Detector
    step: DetectionStep

    @staticmethod
    def open_dataset(recipe: Recipe, world: World) -> TubeSet:
        """See `Task.open_dataset`."""
        config, data = recipe.detection, recipe.data
        root = Path(data.root)
        if not data.root:
            if config.dataset != "moving_objects":
                raise ConfigError(f"data.root: {config.dataset} needs the folder of the set.")
            if not world.is_main:
                world.barrier()
            root = generate_moving_objects(data.resolved_cache_dir())
            if world.is_main:
                world.barrier()
        streams = [name for name, _ in config.view.streams]
        return open_tube_set(
            root,
            config.dataset,
            split=config.split,
            streams=streams,
            least_frames=config.least_frames,
            deny_list=data.deny_list,
        )

    def __init__(
        self, setting: Setting, dataset: TubeSet, stored: Mapping[str, Any] | None
    ) -> None:
        recipe, config = setting.recipe, setting.recipe.detection
        self._setting, self._data = setting, dataset
        seed_everything(recipe.run.seed, "model")
        try:
            priors = priors_for(config.size, config.levels, config.prior_scale)
        except ValueError as error:
            raise ConfigError(f"detection.size: {error}") from error
        assert config.network != "none"
        model = build_detector(
            config.network, num_classes=dataset.num_classes + 1, **config.network_options
        )
        if stored is None:
            if recipe.published.init != "none" and not config.start_base:
                logger.warning(
                    "the published run starts from %s weights, this one from random ones; pass "
                    "--detection.start_base FILE.",
                    recipe.published.init,
                )
            start_network(model, config)
        model = model.to(setting.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.optimizer = Optimizer(model, recipe.optim)
        self.train_loader = self.val_loader = self._open_microtubes()
        self.video_loaders = {}
        self.step = DetectionStep(
            setting.wrapped(model),
            self.optimizer,
            setting.precision,
            accumulation=setting.accumulation,
            clip_norm=recipe.optim.clip_norm,
            seed=recipe.run.seed,
            world=setting.world,
            ranges=setting.ranges,
            skips=recipe.train.skip_nonfinite > 0,
            priors=priors.to(setting.device),
            pixel_scale=config.pixel_scale,
        )

    def rehearse(self, batch: MicrotubeBatch) -> dict[str, list[int]]:
        """See `Task.rehearse`."""
        setting = self._setting
        inputs = [x / setting.recipe.detection.pixel_scale for x in batch.streams]
        with setting.precision.autocast():
            conf, loc = self.model(*inputs)
        priors = self.step.priors
        near, classes = multibox_loss(conf, loc, *match(batch.boxes, batch.labels, priors))
        torch.autograd.backward(near + classes)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        streams = {f"stream {k}": list(x.shape) for k, x in enumerate(batch.streams)}
        return {**streams, "conf": list(conf.shape), "loc": list(loc.shape)}

    def _open_microtubes(self) -> MicrotubeLoader:
        setting, data = self._setting, self._data
        recipe, config = setting.recipe, setting.recipe.detection
        try:
            items, _ = list_microtubes(
                data.videos,
                dataset=data.rules,
                training=data.training,
                num_frames=config.num_frames,
                gaps=TRAIN_GAPS if config.gap == 20 else (config.gap,),
            )
            loader = MicrotubeLoader(
                data,
                items,
                config.view,
                seed=recipe.run.seed,
                micro_batch=recipe.train.micro_batch,
                global_batch=recipe.train.global_batch,
                rank=setting.world.rank,
                world_size=setting.world.size,
                device=setting.device,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        setting.on_close.callback(loader.close)
        return loader

    def measure(self, poll: Callable[[], None]) -> DetectionScores:
        """See `Task.measure`."""
        # Every process evaluates all videos, and with the same statistics of norms: all decide the
        # same. The boxes of a video are linked in one place.
        setting = self._setting
        setting.world.broadcast_(list(self.model.buffers()))
        self.model.eval()
        try:
            detector = FrameDetector(self.model, setting.recipe.detection, setting.device)
            return evaluate_tubes([detector], self._data, poll=poll)
        finally:
            self.model.train()


def start_network(model: Detector, config: DetectionConfig) -> None:
    """Start the trunks from `config.start_base` and `start_extra`.

    An SSD that starts from a whole SSD takes its heads over too; from the layers of a VGG16
    (`vgg16_reducedfc.pth`) the extra layers keep their random start.

    Raises:
        CheckpointError: a file that does not fit.
    """
    for trunk, file in zip(model.trunks, (config.start_base, config.start_extra), strict=False):
        if not file:
            continue
        state = read_state_dict(file)
        if isinstance(model, SSD300) and any("loc.0.weight" in name for name in state):
            import_weights(model, file)
            continue
        from_vgg = all(_VGG_FILE.fullmatch(name) for name in state)
        if from_vgg:
            state = {f"vgg.{name}": value for name, value in state.items()}
        try:
            report = fill_trunk(trunk, state)
        except ValueError as error:
            raise CheckpointError(file, f"does not fit the trunk: {error}") from error
        lacking = [name for name in report.kept if not from_vgg or name.startswith("vgg.")]
        if lacking:
            raise CheckpointError(
                file, f"lacks {len(lacking)} tensors of the trunk, such as {lacking[0]}."
            )
        logger.info("%s: %d tensors start the trunk", file, len(report.loaded))
