"""From the test videos of a set to video-mAP: detect, fuse, link, label, compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from accel.detection.average_precision import (
    FrameBoxes,
    frame_ap,
    frame_boxes,
    frame_detection_boxes,
)
from accel.detection.boxes import decode
from accel.detection.candidates import FilterRule, background_last, pixel_boxes
from accel.detection.fusion import Fusion, fused_candidates
from accel.detection.labelling import LabelRule, Tube, is_kept, trim
from accel.detection.linking import Path as LinkedPath
from accel.detection.linking import link
from accel.detection.microtube_linking import (
    boxes_of_frames,
    link_microtubes,
    microtube_frames,
)
from accel.detection.priors import IMAGE_SIZE, ssd300_priors, ssd_priors
from accel.detection.video_ap import TruthTube, video_map
from accel.engine.detection_config import DetectionConfig
from accel.models.detectors import Detector
from accel.models.vgg_ssd import map_sizes
from pipelines.microtube_loader import read_images, stream_inputs
from pipelines.microtubes import Microtube
from pipelines.ssd_augment import plain_view
from pipelines.tube_data import TubeSet
from pipelines.tubes import VideoAnnotation

_CHUNK = 16  # micro-tubes per forward
_FRAME_RULE = FilterRule(score_threshold=0.01, keep=20)
_FRAME_BOOST_IOU = 0.3


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
    """Boxes and scores of micro-tubes, from a trained network.

    Args:
        model: in evaluation mode.
        config: what it was trained with.
        device: of the model.
    """

    def __init__(self, model: Detector, config: DetectionConfig, device: torch.device) -> None:
        self.config = config
        self.num_classes = model.num_classes - 1
        """Without background."""
        self._model, self._device = model, device
        self._priors = priors_for(config.size, config.levels, config.prior_scale).to(device)

    @torch.inference_mode()
    def __call__(self, streams: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, P, T, 4] (ltrb, fractions) and scores [N, P, K] (background first) of N
        micro-tubes.

        Args:
            streams: inputs [N*T, 3*F, S, S], bytes minus means.
        """
        inputs = [x.to(self._device) / self.config.pixel_scale for x in streams]
        conf, loc = self._model(*inputs)
        boxes = decode(loc.float(), self._priors)
        return boxes.cpu().numpy(), conf.float().softmax(-1).cpu().numpy()


class VideoDetections(NamedTuple):
    """What a network sees in a video."""

    boxes: np.ndarray
    """[F, P, 4] ltrb, fractions of the image; with whole micro-tubes [S, P, T, 4]."""

    scores: np.ndarray
    """[F, P, K] (or [S, ...]), background last."""

    size: tuple[int, int]
    """Width and height of the images, pixels."""


def _span(config: DetectionConfig) -> int:
    """Frames from the first to the last one of a micro-tube."""
    gap = 0 if config.gap == 20 else config.gap
    return (config.num_frames - 1) * (gap + 1)


def video_items(num_frames: int, config: DetectionConfig) -> list[tuple[tuple[int, ...], int]]:
    """For every frame of a video the micro-tube that shows it, and its place in it.

    A micro-tube begins at each frame; the last frames are the last ones of the last micro-tubes.

    Raises:
        ValueError: a video shorter than a micro-tube.
    """
    span = _span(config)
    if num_frames <= span:
        raise ValueError(f"expected more than {span} frames for a micro-tube, got {num_frames}.")
    items = []
    for frame in range(num_frames):
        place = 0 if frame + span < num_frames else config.num_frames - 1
        start = frame - (span if place else 0)
        items.append((_frames(start, config), place))
    return items


def microtube_starts(num_frames: int, config: DetectionConfig) -> list[int]:
    """First frames of micro-tubes that follow each other; the last one may overlap the one before.

    Raises:
        ValueError: a video shorter than a micro-tube.
    """
    span = _span(config)
    if num_frames <= span:
        raise ValueError(f"expected more than {span} frames for a micro-tube, got {num_frames}.")
    starts = list(range(0, num_frames - span, span + 1))
    last = num_frames - span - 1
    return starts if starts[-1] == last else [*starts, last]


def _frames(start: int, config: DetectionConfig) -> tuple[int, ...]:
    step = _span(config) // max(config.num_frames - 1, 1)
    return tuple(start + i * step for i in range(config.num_frames))


def _detected(
    data: TubeSet, video: int, detector: FrameDetector, frames: Sequence[tuple[int, ...]]
) -> VideoDetections:
    """The micro-tubes of these frames, [S, P, T, 4] and so on."""
    config = detector.config
    nothing = np.zeros((0, config.num_frames, 4), dtype=np.float32)
    boxes, scores, size = [], [], (0, 0)
    for first in range(0, len(frames), _CHUNK):
        inputs = []
        for own in frames[first : first + _CHUNK]:
            item = Microtube(video, own, np.zeros(0, dtype=np.int64), nothing)
            images, numbers = read_images(data, item, config.view)
            size = (images.shape[2], images.shape[1])
            pixels = plain_view(images, size=config.size)
            inputs.append(stream_inputs(data, item, config.view, pixels, numbers))
        streams = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*inputs, strict=True)]
        found = detector(streams)
        boxes.append(found[0])
        scores.append(found[1])
    return VideoDetections(np.concatenate(boxes), background_last(np.concatenate(scores)), size)


def video_detections(data: TubeSet, video: int, detector: FrameDetector) -> VideoDetections:
    """One box per prior and frame: that of the micro-tube that begins there."""
    items = video_items(data.videos[video].num_frames, detector.config)
    found = _detected(data, video, detector, [frames for frames, _ in items])
    places = np.array([place for _, place in items])
    boxes = found.boxes[np.arange(len(items)), :, places]
    return VideoDetections(boxes, found.scores, found.size)


def evaluate_tubes(
    detectors: Sequence[FrameDetector],
    data: TubeSet,
    *,
    fusion: Fusion = "none",
    poll: Callable[[], object] = lambda: None,
) -> DetectionScores:
    """Detect, link, label and compare: the published chain over all test videos.

    Args:
        detectors: one, or that of the base and that of the second stream. Thresholds and linking
            are the first one's.
        data: with the images of all their streams.
        fusion: of the detections of two.
        poll: called after every video; may raise to end the evaluation early.

    Raises:
        ValueError: a number of detectors that the fusion does not take; two of them with
            micro-tube linking, or with other priors and fusion "mean".
    """
    config, num_classes = detectors[0].config, data.num_classes
    if len(detectors) != (1 if fusion == "none" else 2):
        raise ValueError(f'fusion "{fusion}": got {len(detectors)} detectors.')
    if fusion != "none" and config.linking != "frames":
        raise ValueError('detection.linking: two detectors are fused per frame; expected "frames".')
    shapes = {(d.config.size, d.config.levels, d.config.prior_scale) for d in detectors}
    if fusion == "mean" and len(shapes) > 1:
        raise ValueError('fusion "mean": the detectors must have the same prior boxes.')
    rule = LabelRule(change_cost=config.change_cost)
    found: list[list[Tube]] = []
    truth: list[list[TruthTube]] = []
    frame_found: list[FrameBoxes] = []
    frame_truth: list[FrameBoxes] = []
    offset = 0
    for index, video in enumerate(data.videos):
        if data.training[index]:
            continue
        if config.linking == "microtubes":
            paths, own = _microtube_paths(data, index, detectors[0])
            seen = [own]
        else:
            seen = [video_detections(data, index, detector) for detector in detectors]
            paths = find_paths(seen, config, num_classes, fusion)
        candidates = fused_candidates(
            [(frame_detection_boxes(v.boxes, v.size), v.scores) for v in seen],
            fusion,
            _FRAME_RULE,
            num_classes,
            boost_iou=_FRAME_BOOST_IOU,
            frame_detection=True,
        )
        tubes = trim(paths, rule, num_classes)
        found.append([tube for tube in tubes if is_kept(tube, rule)])
        truth.append([TruthTube(t.label, t.start, t.boxes_xywh) for t in video.tubes])
        frame_found.append(frame_boxes(candidates, offset))
        frame_truth += _truth_boxes(video, offset)
        offset += video.num_frames
        poll()
    videos = video_map(found, truth, num_classes=num_classes)
    frames = frame_ap(
        _joined(frame_found),
        _joined(frame_truth),
        num_classes=num_classes,
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


def find_paths(
    streams: Sequence[VideoDetections],
    config: DetectionConfig,
    num_classes: int,
    fusion: Fusion = "none",
) -> list[LinkedPath]:
    """All paths of a video from the detections of one or two streams."""
    candidates = fused_candidates(
        [(pixel_boxes(own.boxes, own.size), own.scores) for own in streams],
        fusion,
        FilterRule(score_threshold=config.score_threshold),
        num_classes,
    )
    return [path for own in link(candidates) for path in own]


def _microtube_paths(
    data: TubeSet, video: int, detector: FrameDetector
) -> tuple[list[LinkedPath], VideoDetections]:
    """The paths of a video of linked micro-tubes, and what its frames show."""
    config, num_frames = detector.config, data.videos[video].num_frames
    starts = microtube_starts(num_frames, config)
    found = _detected(data, video, detector, [_frames(start, config) for start in starts])
    step = max(_span(config) // max(config.num_frames - 1, 1), 1)
    frames = microtube_frames(starts, num_frames, step)
    rule = FilterRule(score_threshold=config.score_threshold)
    pixels = pixel_boxes(found.boxes, found.size)
    paths = link_microtubes(pixels, found.scores, frames, rule, data.num_classes)
    boxes = boxes_of_frames(found.boxes[frames.owner], frames.position)
    return paths, VideoDetections(boxes, found.scores[frames.owner], found.size)


def _truth_boxes(video: VideoAnnotation, offset: int) -> list[FrameBoxes]:
    """The annotated boxes of a video, its first frame being number `offset`."""
    return [
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


def _joined(parts: Sequence[FrameBoxes]) -> FrameBoxes:
    return FrameBoxes(
        np.concatenate([p.frames for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.boxes for p in parts]),
        np.concatenate([p.scores for p in parts]),
    )
