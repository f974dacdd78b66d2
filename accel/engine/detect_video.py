"""Detecting actions in a stream of frames: decode, detect, link online, draw, count the time."""

import collections
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.detection.candidates import FilterRule, background_last, pixel_boxes
from accel.detection.fusion import Fusion, fused_candidates
from accel.detection.linking import Linker
from accel.engine.checkpoint import load_verified, write_atomically
from accel.engine.detection_config import DetectionConfig
from accel.engine.tube_evaluation import FrameDetector
from accel.errors import CheckpointError, ConfigError
from accel.models.detectors import Detector, build_detector, describe_detector
from accel.models.weights import import_weights, load_foreign, read_state_dict
from pipelines.errors import MediaError
from pipelines.flow import BOUND_PX, FlowFunction, flow_images
from pipelines.microtubes import image_numbers, stacked
from pipelines.ssd_augment import plain_view
from pipelines.streaming import VideoWriter, draw_boxes, frame_rate, read_frames
from pipelines.tubes import UCF24_CLASSES

logger = logging.getLogger(__name__)

_COLORS = ((230, 60, 60), (60, 180, 75), (70, 110, 230), (240, 170, 30), (160, 70, 200))


@dataclass(frozen=True)
class FoundBox:
    """One box of one frame."""

    frame: int
    """0-based."""
    label: int
    """Class, 0-based."""
    score: float
    tube: int
    """Number of the path it was linked to."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, pixels."""


def load_detector(
    path: Path, class_names: Sequence[str] = ()
) -> tuple[Detector, DetectionConfig, tuple[str, ...]]:
    """A trained detector, its settings and its class names, from a checkpoint.

    Either one of a training run, which knows all three, or published (converted) weights: those are
    taken for the published input, and without names for UCF24 when they have its 24 classes.

    Raises:
        CheckpointError: neither.
        ConfigError: another number of names than classes.
    """
    content = load_foreign(path)
    if isinstance(content, dict) and content.get("format") == "accel-run-1":
        state = load_verified(path)
        known = {field.name for field in fields(DetectionConfig)}
        stored = state["recipe"].get("detection", {})
        config = DetectionConfig(**{key: stored[key] for key in stored if key in known})
        if config.network == "none":
            raise CheckpointError(path, "is of a classification run, not of a detector.")
        names = tuple(class_names or state["class_names"])
        model = build_detector(
            config.network,
            num_classes=len(state["class_names"]) + 1,
            **config.network_options,
        )
        model.load_state_dict(state["model"])
    else:
        weights = read_state_dict(path)
        system = "amtnet" if any(".loc." in n or "core_" in n for n in weights) else "ssd300"
        described = describe_detector(weights, path, system)
        config = DetectionConfig(
            network=described["name"],
            num_frames=described.get("num_frames", 1),
            stack=described["input_frames"],
            fusion=described.get("fusion", "none"),
            width=described["width"],
            levels=described["levels"],
            batch_norm=described["batch_norm"],
        )
        model = build_detector(**described)
        import_weights(model, path)
        names = tuple(class_names)
        if not names and described["num_classes"] == len(UCF24_CLASSES) + 1:
            names = tuple(UCF24_CLASSES)
    if len(names) != model.num_classes - 1:
        raise ConfigError(
            f"--classes: {path} has {model.num_classes - 1} classes, got {len(names)} names."
        )
    return model.eval(), config, names


class _Stream:
    """The images that one network sees, as they come."""

    def __init__(self, detector: FrameDetector, compute_flow: FlowFunction | None) -> None:
        self.detector, self.config = detector, detector.config
        gap = 0 if self.config.gap == 20 else self.config.gap
        self._step = gap + 1
        self.span = (self.config.num_frames - 1) * self._step
        self.seen = 0
        self._compute_flow = compute_flow
        self._before: np.ndarray | None = None  # the frame before, for flow
        self._views: collections.deque[np.ndarray] = collections.deque()
        self._first = 0  # frame of _views[0]

    def push(self, image: np.ndarray) -> None:
        """Take the next image [H, W, 3] RGB, of the stream or, where flow is computed, of RGB."""
        if self._compute_flow is not None:
            before, self._before = self._before, image
            if before is None:
                return
            image = flow_images(self._compute_flow(np.stack([before, image])), BOUND_PX)[0]
        bgr = np.ascontiguousarray(image[..., ::-1])
        self._views.append(plain_view(bgr[None], size=self.config.size)[0])
        self.seen += 1

    def finish(self) -> None:
        """The last frame has the flow of the one before."""
        if self._compute_flow is not None and self._views:
            self._views.append(self._views[-1])
            self.seen += 1

    @property
    def ready(self) -> int:
        """Frames whose micro-tube and stacks have been seen, wherever the stream ends."""
        return self.seen - self.span - self.config.stack // 2 - 1

    @property
    def least(self) -> int:
        """Frames without which the network sees nothing."""
        return max(self.span + 1, self.config.stack, 1 + (self._compute_flow is not None))

    def detect(self, frame: int, *, ended: bool) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [1, P, 4] in fractions and scores [1, P, K], background last, of a frame."""
        num_frames = self.seen if ended else self.seen + 1
        last = frame + self.span >= num_frames
        first = frame - self.span * last
        frames = tuple(first + i * self._step for i in range(self.config.num_frames))
        stack = self.config.stack
        numbers = sorted({n for f in frames for n in image_numbers(f, num_frames, stack)})
        images = np.stack([self._views[n - 1 - self._first] for n in numbers])
        inputs = torch.from_numpy(stacked(images, numbers, frames, num_frames, stack))
        tubes, scores = self.detector([inputs])
        # What is behind the reach of the frames to come is forgotten.
        keep = max(0, frame + 1 - self.span - stack)
        while self._first < keep:
            self._views.popleft()
            self._first += 1
        return tubes[:, :, self.config.num_frames - 1 if last else 0], background_last(scores)


class OnlineDetector:
    """Boxes of the frames of a stream, linked as they come.

    A frame's boxes are given out when the frames that its micro-tube and its stacks need have been
    seen; at the end of the stream the last ones follow. The result is that of the stored video.

    Args:
        detectors: one network, or that of the base and that of the second stream; each sees one
            stream.
        threshold: scores of boxes that are linked are larger.
        fusion: of two networks' detections.
        compute_flow: of the second network's stream, from RGB; None: its images are given.

    Raises:
        ConfigError: networks that do not fit each other or the fusion.
    """

    def __init__(
        self,
        detectors: Sequence[FrameDetector],
        threshold: float,
        *,
        fusion: Fusion = "none",
        compute_flow: FlowFunction | None = None,
    ) -> None:
        if len(detectors) != (1 if fusion == "none" else 2):
            raise ConfigError(f'fusion "{fusion}": got {len(detectors)} networks.')
        if any(d.config.fusion != "none" for d in detectors):
            raise ConfigError("accel detect: a network of two streams in one is not taken.")
        if len({d.num_classes for d in detectors}) > 1:
            raise ConfigError("accel detect: the networks have different numbers of classes.")
        priors = {(d.config.size, d.config.levels, d.config.prior_scale) for d in detectors}
        if fusion == "mean" and len(priors) > 1:
            raise ConfigError('fusion "mean": the networks must have the same prior boxes.')
        flows = [None, compute_flow]
        self._streams = [_Stream(d, flow) for d, flow in zip(detectors, flows, strict=False)]
        self._num_classes = detectors[0].num_classes
        self._linker = Linker(self._num_classes)
        self._rule = FilterRule(score_threshold=threshold)
        self._fusion: Fusion = fusion
        self._done = 0
        self._seen = 0
        self._size = (0, 0)
        self.seconds = {"detection": 0.0, "suppression": 0.0, "linking": 0.0}
        """Spent in preprocessing, flow and networks; in filtering, fusion and NMS; in linking."""

    def push(self, frame: np.ndarray, second: np.ndarray | None = None) -> list[list[FoundBox]]:
        """Take the next frame; the boxes of the frames that are now complete.

        Args:
            frame: [H, W, 3] RGB.
            second: that of the second stream, if its images are given.
        """
        start = time.perf_counter()
        self._size = (frame.shape[1], frame.shape[0])
        for stream, image in zip(self._streams, (frame, second), strict=False):
            stream.push(frame if image is None else image)
        self._seen += 1
        self.seconds["detection"] += time.perf_counter() - start
        ready = min(stream.ready for stream in self._streams)
        return [self._detect(f, ended=False) for f in range(self._done, ready)]

    def finish(self) -> list[list[FoundBox]]:
        """The boxes of the last frames.

        Raises:
            ConfigError: the stream was shorter than what the network sees at once.
        """
        least = max(stream.least for stream in self._streams)
        if self._seen < least:
            raise ConfigError(
                f"accel detect: the network needs at least {least} frames, got {self._seen}."
            )
        for stream in self._streams:
            stream.finish()
        return [self._detect(f, ended=True) for f in range(self._done, self._seen)]

    def _detect(self, frame: int, *, ended: bool) -> list[FoundBox]:
        begin = time.perf_counter()
        seen = [stream.detect(frame, ended=ended) for stream in self._streams]
        detected = time.perf_counter()
        found = fused_candidates(
            [(pixel_boxes(boxes, self._size), scores) for boxes, scores in seen],
            self._fusion,
            self._rule,
            self._num_classes,
        )
        suppressed = time.perf_counter()
        links = self._linker.step(found.boxes[0], found.scores[0], found.counts[0])
        self._done = frame + 1
        result = [
            FoundBox(
                frame,
                int(label),
                float(found.scores[0, label, i]),
                int(links.path[label, i]),
                _plain(found.boxes[0, label, i] - 1),
            )
            for label, i in zip(*np.nonzero(found.present()[0]), strict=True)
        ]
        self.seconds["detection"] += detected - begin
        self.seconds["suppression"] += suppressed - detected
        self.seconds["linking"] += time.perf_counter() - suppressed
        return result


def _plain(box: np.ndarray) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(float(v), 2) for v in box)
    return left, top, right, bottom


def detect_stream(
    frames: Iterable[tuple[np.ndarray, np.ndarray | None]], detector: OnlineDetector
) -> Iterator[tuple[np.ndarray, list[FoundBox]]]:
    """Every frame with its boxes, in order; runs a few frames behind the stream.

    Args:
        frames: each with that of the second stream, if its images are given.
        detector: new.
    """
    waiting: collections.deque[np.ndarray] = collections.deque()
    for frame, second in frames:
        waiting.append(frame)
        for boxes in detector.push(frame, second):
            yield waiting.popleft(), boxes
    for boxes in detector.finish():
        yield waiting.popleft(), boxes


def draw(frame: np.ndarray, boxes: Sequence[FoundBox], class_names: Sequence[str]) -> np.ndarray:
    """The frame with boxes, class names, scores and tube numbers."""
    labelled = [
        (
            found.box,
            f"{class_names[found.label]} {found.score:.2f} #{found.tube}",
            _COLORS[found.tube % len(_COLORS)],
        )
        for found in boxes
    ]
    return draw_boxes(frame, labelled)


def summarize(boxes: Sequence[FoundBox], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per tube: number, class, first and last frame, boxes, mean score; best first."""
    tubes: dict[int, list[FoundBox]] = collections.defaultdict(list)
    for found in boxes:
        tubes[found.tube].append(found)
    rows = [
        {
            "tube": number,
            "class": class_names[own[0].label],
            "first_frame": own[0].frame,
            "last_frame": own[-1].frame,
            "boxes": len(own),
            "score": sum(found.score for found in own) / len(own),
        }
        for number, own in tubes.items()
    ]
    return sorted(rows, key=lambda row: (-int(row["boxes"]), -float(row["score"])))


def _pairs(
    source: str, second: str, max_frames: int, seconds: dict[str, float]
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The frames of both sources; ends with the first one, at max_frames or at Ctrl-C."""
    first, other = read_frames(source), read_frames(second) if second else None
    count = 0
    while not max_frames or count < max_frames:
        begin = time.perf_counter()
        try:
            frame = next(first, None)
            image = next(other, None) if other is not None else None
        except KeyboardInterrupt:
            logger.warning("stopped; what was seen is written")
            return
        seconds["decoding"] += time.perf_counter() - begin
        if other is not None and (frame is None) != (image is None):
            shorter = source if frame is None else second
            raise MediaError(shorter, f"ends after {count} frames, the other stream goes on.")
        if frame is None:
            return
        if image is not None and image.shape != frame.shape:
            raise MediaError(second, f"has images of another size than {source}.")
        count += 1
        yield frame, image


def detect_to_folder(
    source: str,
    out: Path,
    detector: OnlineDetector,
    class_names: Sequence[str],
    *,
    second: str = "",
    video: bool = True,
    max_frames: int = 0,
) -> dict[str, Any]:
    """Detect in a stream; write `tubes.json` and, if asked, the drawn `tubes.webm`.

    Args:
        source: see `pipelines.streaming.read_frames`.
        out: the folder.
        detector: new.
        class_names: of its classes.
        second: images of the second stream; "": there is none, or it is computed.
        video: draw.
        max_frames: end after so many; 0: with the source, or at Ctrl-C.

    Returns:
        The summary: frames, frames per second, milliseconds per frame by part, tubes.

    Raises:
        pipelines.errors.MediaError: the stream cannot be read, or the video cannot be written.
        ConfigError: the stream is too short, or the folder cannot be written.
    """
    rate = frame_rate(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}.") from error
    writer = VideoWriter(out / "tubes.webm", rate) if video else None
    found: list[FoundBox] = []
    seconds = {"decoding": 0.0}
    count, drawing_s = 0, 0.0
    start = time.perf_counter()
    try:
        frames = _pairs(source, second, max_frames, seconds)
        for frame, boxes in detect_stream(frames, detector):
            found += boxes
            count += 1
            begin = time.perf_counter()
            if writer is not None:
                writer.write(draw(frame, boxes, class_names))
            drawing_s += time.perf_counter() - begin
    finally:
        if writer is not None:
            writer.close()
    total = time.perf_counter() - start
    parts = {**seconds, **detector.seconds, "drawing": drawing_s}
    summary = {
        "input": source,
        "frames": count,
        "fps": count / total,
        "ms_per_frame": {name: 1e3 * value / count for name, value in parts.items()},
        "video_fps": rate,
        "tubes": summarize(found, class_names),
    }
    content = summary | {
        "class_names": list(class_names),
        "detections": [asdict(box) for box in found],
    }
    write_atomically(out / "tubes.json", (json.dumps(content, indent=1) + "\n").encode())
    return summary
