"""Training and evaluating a detector in the engine: micro-tubes in, video-mAP out."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from accel.detection.average_precision import (
    FrameBoxes,
    frame_ap,
    frame_boxes,
    frame_detection_boxes,
)
from accel.detection.boxes import decode
from accel.detection.candidates import (
    Candidates,
    FilterRule,
    background_last,
    filter_boxes,
    pixel_boxes,
)
from accel.detection.labelling import LabelRule, Tube, is_kept, trim
from accel.detection.linking import link
from accel.detection.losses import multibox_loss
from accel.detection.matching import Matches, match
from accel.detection.priors import IMAGE_SIZE, ssd300_priors, ssd_priors
from accel.detection.video_ap import TruthTube, video_map
from accel.engine.detection_config import DetectionConfig
from accel.engine.optim import Optimizer
from accel.engine.profiling import RECORDERS
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.engine.trainer import Trainer
from accel.errors import CheckpointError, ConfigError
from accel.models.convert.amtnet import fill_trunk
from accel.models.detectors import Detector, build_detector
from accel.models.vgg_ssd import map_sizes
from accel.models.weights import read_state_dict
from pipelines.microtube_loader import MicrotubeBatch, MicrotubeLoader, read_images, stream_inputs
from pipelines.microtubes import TRAIN_GAPS, Microtube, list_microtubes
from pipelines.moving_objects import generate_moving_objects
from pipelines.ssd_augment import plain_view
from pipelines.tube_data import TubeSet, open_tube_set

logger = logging.getLogger(__name__)

_CHUNK = 16  # micro-tubes per forward of an evaluation
_FRAME_RULE = FilterRule(score_threshold=0.01, keep=20)


@dataclass(frozen=True)
class DetectionScores:
    """Metrics of one evaluation over the test videos."""

    video_map_20: float
    """Video-mAP at an overlap of 0.2."""
    video_map_50: float
    video_map_75: float
    video_map_50_95: float
    """Mean over the overlaps 0.5 to 0.95."""
    frame_map_50: float
    """Frame-mAP at an overlap of 0.5 (the MATLAB integration)."""
    accuracy: float
    """Share of videos whose best tube has the right class."""
    num_videos: int

    @property
    def rating(self) -> float:
        """What the best checkpoint is chosen by."""
        return self.video_map_50

    @property
    def text(self) -> str:
        """For the log."""
        return (
            f"video-mAP@0.5 {self.video_map_50:.4f}, frame-mAP@0.5 {self.frame_map_50:.4f}, "
            f"accuracy {self.accuracy:.4f}"
        )


def priors_for(size: int, levels: int, scale: float = 1.0) -> Tensor:
    """Prior boxes [P, 4] of a network for images of `size` pixels with `levels` maps.

    Args:
        size: pixels of a side.
        levels: 2 to 6.
        scale: boxes are so many times as large as the published ones.

    Raises:
        ValueError: an image too small for so many maps.
    """
    if (size, levels, scale) == (IMAGE_SIZE, 6, 1.0):
        return ssd300_priors()
    return ssd_priors(map_sizes(size, levels), scale=scale)


class FrameDetector:
    """Boxes and scores of every frame of a video, from a trained network.

    Args:
        model: in evaluation mode.
        config: what it was trained with.
        device: of the model.
    """

    def __init__(self, model: Detector, config: DetectionConfig, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        self._priors = priors_for(config.size, config.levels, config.prior_scale).to(device)

    @torch.inference_mode()
    def __call__(self, streams: Sequence[Tensor], frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, P, 4] (ltrb, fractions) and scores [N, P, K] (background first) of N
        micro-tubes.

        Args:
            streams: inputs [N*T, 3*F, S, S], bytes minus means.
            frame: whose box of each micro-tube.
        """
        inputs = [x.to(self._device) / self._config.pixel_scale for x in streams]
        conf, loc = self._model(*inputs)
        boxes = decode(loc.float(), self._priors)[:, :, frame]
        return boxes.cpu().numpy(), conf.float().softmax(-1).cpu().numpy()


def video_items(num_frames: int, config: DetectionConfig) -> list[tuple[tuple[int, ...], int]]:
    """For every frame of a video the micro-tube that shows it, and its place in it.

    A micro-tube begins at each frame; the last frames are the last ones of the last micro-tubes.

    Raises:
        ValueError: a video shorter than a micro-tube.
    """
    gap = 0 if config.gap == 20 else config.gap
    span = (config.num_frames - 1) * (gap + 1)
    if num_frames <= span:
        raise ValueError(f"expected more than {span} frames for a micro-tube, got {num_frames}.")
    items = []
    for frame in range(num_frames):
        place = 0 if frame + span < num_frames else config.num_frames - 1
        start = frame - (span if place else 0)
        items.append((tuple(start + i * (gap + 1) for i in range(config.num_frames)), place))
    return items


def video_detections(
    data: TubeSet, video: int, detector: FrameDetector, config: DetectionConfig
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Boxes [F, P, 4] in fractions, scores [F, P, K] with the background last, (width, height)."""
    annotation = data.videos[video]
    nothing = np.zeros((0, config.num_frames, 4), dtype=np.float32)
    boxes, scores = [], []
    items = video_items(annotation.num_frames, config)
    size = (0, 0)
    for first in range(0, len(items), _CHUNK):
        chunk = items[first : first + _CHUNK]
        inputs = []
        for frames, _ in chunk:
            item = Microtube(video, frames, np.zeros(0, dtype=np.int64), nothing)
            images, numbers = read_images(data, item, config.view)
            size = (images.shape[2], images.shape[1])
            pixels = plain_view(images, size=config.size)
            inputs.append(stream_inputs(data, item, config.view, pixels, numbers))
        streams = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*inputs, strict=True)]
        places = np.array([place for _, place in chunk])
        found = [detector(streams, int(place)) for place in np.unique(places)]
        chosen = np.searchsorted(np.unique(places), places)
        rows = np.arange(len(chunk))
        boxes.append(np.stack([b for b, _ in found])[chosen, rows])
        scores.append(found[0][1])
    return np.concatenate(boxes), background_last(np.concatenate(scores)), size


def evaluate_tubes(
    model: Detector,
    data: TubeSet,
    config: DetectionConfig,
    device: torch.device,
    poll: Any = lambda: None,
) -> DetectionScores:
    """Detect, link, label and compare: the published chain over all test videos.

    Args:
        model: left in training mode if it was.
        poll: called after every video; may raise to end the evaluation early.
    """
    was_training = model.training
    model.eval()
    detector = FrameDetector(model, config, device)
    rule = LabelRule(change_cost=config.change_cost)
    found: list[list[Tube]] = []
    truth: list[list[TruthTube]] = []
    frame_found: list[FrameBoxes] = []
    frame_truth: list[FrameBoxes] = []
    offset = 0
    try:
        for index, video in enumerate(data.videos):
            if data.training[index]:
                continue
            boxes, scores, size = video_detections(data, index, detector, config)
            tubes = find_tubes(boxes, scores, size, config, data.num_classes)
            found.append([tube for tube in tubes if is_kept(tube, rule)])
            truth.append([TruthTube(t.label, t.start, t.boxes_xywh) for t in video.tubes])
            per_frame = filter_boxes(
                frame_detection_boxes(boxes, size), scores, _FRAME_RULE, data.num_classes
            )
            frame_found.append(frame_boxes(per_frame, offset))
            frame_truth += [
                FrameBoxes(
                    np.arange(t.start, t.end) + offset,
                    np.full(len(t.boxes_xywh), t.label),
                    np.concatenate(
                        [t.boxes_xywh[:, :2], t.boxes_xywh[:, :2] + t.boxes_xywh[:, 2:]], axis=1
                    ),
                    np.ones(len(t.boxes_xywh)),
                )
                for t in video.tubes
            ]
            offset += video.num_frames
            poll()
    finally:
        model.train(was_training)
    videos = video_map(found, truth, num_classes=data.num_classes)
    frames = frame_ap(
        _joined(frame_found),
        _joined(frame_truth),
        num_classes=data.num_classes,
        iou_threshold=0.5,
        integration="matlab",
    )
    return DetectionScores(
        videos.at(0.2),
        videos.at(0.5),
        videos.at(0.75),
        videos.averaged,
        frames.mean,
        videos.accuracy,
        len(found),
    )


def find_tubes(
    boxes: np.ndarray,
    scores: np.ndarray,
    size: tuple[int, int],
    config: DetectionConfig,
    num_classes: int,
) -> list[Tube]:
    """All tubes of a video from its boxes in fractions and its scores, background last."""
    rule = FilterRule(score_threshold=config.score_threshold)
    candidates: Candidates = filter_boxes(pixel_boxes(boxes, size), scores, rule, num_classes)
    paths = [path for own in link(candidates) for path in own]
    return trim(paths, LabelRule(change_cost=config.change_cost), num_classes)


def _joined(parts: Sequence[FrameBoxes]) -> FrameBoxes:
    return FrameBoxes(
        np.concatenate([p.frames for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.boxes for p in parts]),
        np.concatenate([p.scores for p in parts]),
    )


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
        self._priors, self._scale = priors, pixel_scale

    def _micro_batches(self, batches: Iterator[MicrotubeBatch]) -> Iterator[_Matched]:
        # The divisor is known when all boxes are, so all micro-batches of the step are taken first.
        step = list(super()._micro_batches(batches))
        with self.ranges("matching"):
            matches = [match(batch.boxes, batch.labels, self._priors) for batch in step]
            positive = torch.stack([(own.labels > 0).sum() for own in matches]).sum().float()
            self._world.sum_([positive])
            # What is added up is averaged over the micro-batches and the processes.
            divisor = positive.clamp(min=1) / (self._accumulation * self._world.size)
        for batch, own in zip(step, matches, strict=True):
            yield _Matched(batch, own, divisor)

    def _forward(self, batch: Any) -> Tensor:
        with self.ranges("ingest"):
            inputs = [x / self._scale for x in batch.batch.streams]
        with self._precision.autocast():
            with self.ranges("forward"):
                conf, loc = self._model(*inputs)
        with self.ranges("loss"):
            localization, classification = multibox_loss(
                conf, loc, *batch.matches, divisor=batch.divisor
            )
            return localization + classification


class DetectionTrainer(Trainer):
    """One run of a recipe whose `detection.network` is not "none"; see `Trainer`."""

    rating_name = "video_map_50"
    scores_type = DetectionScores

    def _open_dataset(self) -> Any:
        config, data = self.recipe.detection, self.recipe.data
        root = Path(data.root)
        if not data.root:
            if config.dataset != "moving_objects":
                raise ConfigError(f"data.root: {config.dataset} needs the folder of the set.")
            if not self.world.is_main:
                self.world.barrier()
            root = generate_moving_objects(data.resolved_cache_dir())
            if self.world.is_main:
                self.world.barrier()
        streams = [name for name, _ in config.view.streams]
        return open_tube_set(
            root,
            config.dataset,
            split=config.split,
            streams=streams,
            least_frames=config.least_frames,
            deny_list=data.deny_list,
        )

    def _build(self, *, pretrained: bool) -> None:
        recipe, config = self.recipe, self.recipe.detection
        seed_everything(recipe.run.seed, "model")
        try:
            priors = priors_for(config.size, config.levels, config.prior_scale)
        except ValueError as error:
            raise ConfigError(f"detection.size: {error}") from error
        assert config.network != "none"
        model = build_detector(
            config.network, num_classes=self.dataset.num_classes + 1, **config.network_options
        )
        if pretrained:
            _start(model.base, config.start_base)
            if config.start_extra:
                _start(model.trunks[-1], config.start_extra)
        model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.detector: Detector = model
        self.model = model
        self.optimizer = Optimizer(model, recipe.optim)
        self.ranges = Ranges(RECORDERS[recipe.log.profile])
        self.profiler = self._open_profiler()
        self.train_loader = self.val_loader = self._open_microtubes()  # type: ignore[assignment]
        self.step = DetectionStep(
            self._wrapped_model(),
            self.optimizer,
            self.precision,
            accumulation=self.accumulation,
            clip_norm=recipe.optim.clip_norm,
            seed=recipe.run.seed,
            world=self.world,
            ranges=self.ranges,
            priors=priors.to(self.device),
            pixel_scale=config.pixel_scale,
        )

    def _open_microtubes(self) -> MicrotubeLoader:
        recipe, config = self.recipe, self.recipe.detection
        data: Any = self.dataset
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
                rank=self.world.rank,
                world_size=self.world.size,
                device=self.device,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._loaders.append(loader)  # type: ignore[arg-type]
        return loader

    def _measure(self) -> Any:
        # Every process evaluates all videos, and with the same statistics of norms: all decide the
        # same. The boxes of a video are linked in one place.
        self.world.broadcast_(list(self.detector.buffers()))
        poll = self._stop_if_asked if self.world.size == 1 else lambda: None
        data: Any = self.dataset
        return evaluate_tubes(self.detector, data, self.recipe.detection, self.device, poll)


def _start(trunk: nn.Module, file: str) -> None:
    if not file:
        return
    try:
        report = fill_trunk(trunk, read_state_dict(file))
    except ValueError as error:
        raise CheckpointError(file, f"does not fit the trunk: {error}") from error
    if report.kept:
        raise CheckpointError(
            file, f"lacks {len(report.kept)} tensors of the trunk, such as {report.kept[0]}."
        )
    logger.info("%s: %d tensors start the trunk", file, len(report.loaded))
