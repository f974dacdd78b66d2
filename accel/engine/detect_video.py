"""Detecting actions in a stream of frames: decode, detect, link online, draw, count the time."""

import collections
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.detection.candidates import FilterRule, background_last, filter_boxes, pixel_boxes
from accel.detection.linking import Linker
from accel.engine.checkpoint import load_verified, write_atomically
from accel.engine.detection_config import DetectionConfig
from accel.engine.tube_evaluation import FrameDetector
from accel.errors import CheckpointError, ConfigError
from accel.models.detectors import Detector, build_detector, describe_detector
from accel.models.weights import import_weights, load_foreign, read_state_dict
from pipelines.microtubes import image_numbers, stacked
from pipelines.ssd_augment import plain_view
from pipelines.streaming import VideoWriter, draw_boxes, frame_rate, read_frames
from pipelines.tubes import UCF24_CLASSES

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


class OnlineDetector:
    """Boxes of the frames of a stream, linked as they come.

    A frame's boxes are given out when the frames that its micro-tube and its stacks need have been
    seen; at the end of the stream the last ones follow. The result is that of the stored video.

    Args:
        model: in evaluation mode, one stream.
        config: what it was trained with.
        device: of the model.
        threshold: scores of boxes that are linked are larger.
    """

    def __init__(
        self, model: Detector, config: DetectionConfig, device: torch.device, threshold: float
    ) -> None:
        self._config = config
        self._detector = FrameDetector(model, config, device)
        self._num_classes = model.num_classes - 1
        self._linker = Linker(self._num_classes)
        self._rule = FilterRule(score_threshold=threshold)
        self._gap = 0 if config.gap == 20 else config.gap
        self._span = (config.num_frames - 1) * (self._gap + 1)
        self._views: collections.deque[np.ndarray] = collections.deque()
        self._first = 0  # frame of _views[0]
        self._seen = 0
        self._done = 0
        self._size = (0, 0)
        self.network_s = 0.0
        """Seconds spent in preprocessing and the network."""
        self.linking_s = 0.0
        """Seconds spent in suppression and linking."""

    def push(self, frame: np.ndarray) -> list[list[FoundBox]]:
        """Take the next frame [H, W, 3] RGB; the boxes of the frames that are now complete."""
        start = time.perf_counter()
        self._size = (frame.shape[1], frame.shape[0])
        bgr = np.ascontiguousarray(frame[..., ::-1])
        self._views.append(plain_view(bgr[None], size=self._config.size)[0])
        self._seen += 1
        self.network_s += time.perf_counter() - start
        ready = self._seen - self._span - self._config.stack // 2 - 1
        return [self._detect(f, self._seen + 1) for f in range(self._done, ready)]

    def finish(self) -> list[list[FoundBox]]:
        """The boxes of the last frames.

        Raises:
            ConfigError: the stream was shorter than what the network sees at once.
        """
        least = max(self._span + 1, self._config.stack)
        if self._seen < least:
            raise ConfigError(
                f"accel detect: the network needs at least {least} frames, got {self._seen}."
            )
        return [self._detect(f, self._seen) for f in range(self._done, self._seen)]

    def _detect(self, frame: int, num_frames: int) -> list[FoundBox]:
        begin = time.perf_counter()
        last = frame + self._span >= num_frames
        first = frame - self._span * last
        frames = tuple(first + i * (self._gap + 1) for i in range(self._config.num_frames))
        stack = self._config.stack
        numbers = sorted({n for f in frames for n in image_numbers(f, num_frames, stack)})
        images = np.stack([self._views[n - 1 - self._first] for n in numbers])
        inputs = torch.from_numpy(stacked(images, numbers, frames, num_frames, stack))
        tubes, scores = self._detector([inputs])
        boxes = tubes[:, :, self._config.num_frames - 1 if last else 0]
        linked = time.perf_counter()
        self.network_s += linked - begin
        found = filter_boxes(
            pixel_boxes(boxes, self._size), background_last(scores), self._rule, self._num_classes
        )
        links = self._linker.step(found.boxes[0], found.scores[0], found.counts[0])
        self._done = frame + 1
        # What is behind the reach of the frames to come is forgotten.
        keep = max(0, self._done - self._span - stack)
        while self._first < keep:
            self._views.popleft()
            self._first += 1
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
        self.linking_s += time.perf_counter() - linked
        return result


def _plain(box: np.ndarray) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(float(v), 2) for v in box)
    return left, top, right, bottom


def detect_stream(
    frames: Iterable[np.ndarray], detector: OnlineDetector
) -> Iterator[tuple[np.ndarray, list[FoundBox]]]:
    """Every frame with its boxes, in order; runs a few frames behind the stream."""
    waiting: collections.deque[np.ndarray] = collections.deque()
    for frame in frames:
        waiting.append(frame)
        for boxes in detector.push(frame):
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


def detect_to_folder(
    source: Path,
    out: Path,
    detector: OnlineDetector,
    class_names: Sequence[str],
    *,
    video: bool = True,
) -> dict[str, Any]:
    """Detect in a stream; write `tubes.json` and, if asked, the drawn `tubes.webm`.

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
    count, drawing_s = 0, 0.0
    start = time.perf_counter()
    try:
        for frame, boxes in detect_stream(read_frames(source), detector):
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
    parts = {
        "network": detector.network_s,
        "linking": detector.linking_s,
        "drawing": drawing_s,
    }
    parts["decoding"] = max(total - sum(parts.values()), 0.0)
    summary = {
        "input": str(source),
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
