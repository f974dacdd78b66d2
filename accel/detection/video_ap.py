"""Video-mAP: tubes against annotated tubes by their overlap in space and time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from accel.detection.average_precision import average_precision
from accel.detection.labelling import Tube

IOU_THRESHOLDS = (0.2, *(round(0.5 + 0.05 * i, 2) for i in range(10)))
"""0.2, and 0.5 to 0.95 by 0.05."""


@dataclass(frozen=True)
class TruthTube:
    """An annotated action."""

    label: int
    """Class, 0-based."""

    start: int
    """First frame, 0-based."""

    boxes_xywh: np.ndarray
    """[n, 4] left, top, width, height, pixels, as the annotation has them."""


@dataclass(frozen=True)
class VideoScores:
    """Video-mAP and its companions at several thresholds."""

    thresholds: tuple[float, ...]
    """Least overlaps, exclusive."""

    class_ap: np.ndarray
    """[thresholds, A]"""

    mean_iou: np.ndarray
    """[thresholds]: overlap of the right tubes, mean over the classes. For information."""

    accuracy: float
    """Share of videos whose best tube has the class of the video's last annotated tube."""

    @property
    def mean_ap(self) -> np.ndarray:
        """[thresholds]: mean over all classes."""
        mean: np.ndarray = self.class_ap.mean(axis=1)
        return mean

    def at(self, threshold: float) -> float:
        """Video-mAP at one of the thresholds."""
        return float(self.mean_ap[self.thresholds.index(threshold)])

    @property
    def averaged(self) -> float:
        """Mean of the video-mAP over the thresholds 0.5 to 0.95."""
        inside = [i for i, threshold in enumerate(self.thresholds) if 0.5 <= threshold <= 0.95]
        return float(self.mean_ap[inside].mean())


def tube_iou(truth: TruthTube, start: int, boxes_xywh: np.ndarray) -> float:
    """Overlap in time times the mean overlap in space over the common frames.

    Args:
        truth: the annotated tube.
        start: first frame of the detected one, 0-based.
        boxes_xywh: its boxes [n, 4], left, top, width, height, pixels.
    """
    first, last = truth.start, truth.start + len(truth.boxes_xywh) - 1
    end = start + len(boxes_xywh) - 1
    begin, until = max(first, start), min(last, end)
    # Parity: ROAD: one common frame counts as none.
    if until <= begin:
        return 0.0
    in_time = (until - begin + 1) / (max(last, end) - min(first, start) + 1)
    own = truth.boxes_xywh[begin - first : until - first + 1].astype(np.float64)
    # Parity: ROAD: detections, already 1-based, are moved and widened by one pixel once more.
    other = boxes_xywh[begin - start : until - start + 1].astype(np.float64) + 1
    upper = np.minimum(own[:, :2] + own[:, 2:], other[:, :2] + other[:, 2:])
    side = np.maximum(upper - np.maximum(own[:, :2], other[:, :2]), 0)
    shared = side[:, 0] * side[:, 1]
    union = own[:, 2] * own[:, 3] + other[:, 2] * other[:, 3] - shared
    return float(in_time * (shared / (union + np.finfo(np.float64).eps)).mean())


def video_map(
    found: Sequence[Sequence[Tube]],
    truth: Sequence[Sequence[TruthTube]],
    *,
    num_classes: int,
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> VideoScores:
    """Video-mAP of the tubes of many videos.

    In each video the tubes, best first, claim the unclaimed annotated tube of their class that they
    overlap most; one is right when this overlap is above the threshold.

    Args:
        found: per video, the tubes that count (`labelling.is_kept`).
        truth: per video, the annotated tubes.
        num_classes: A.
        thresholds: overlaps.

    Raises:
        ValueError: the numbers of videos differ.
    """
    if len(found) != len(truth):
        raise ValueError(
            f"video_map: got tubes of {len(found)} and annotations of {len(truth)} videos."
        )
    labels: list[int] = []
    scores: list[float] = []
    overlaps: list[np.ndarray] = []  # of each tube's hits, [thresholds]; 0: wrong
    right = 0
    levels = np.asarray(thresholds)
    for tubes, annotated in zip(found, truth, strict=True):
        ranked = sorted(tubes, key=lambda tube: -tube.score)
        if ranked and annotated:
            right += ranked[0].label == annotated[-1].label
        claimed = np.zeros((len(levels), len(annotated)), dtype=bool)
        for tube in ranked:
            labels.append(tube.label)
            scores.append(tube.score)
            overlaps.append(_claim(tube, annotated, claimed, levels))
    num_truth = np.bincount(
        [tube.label for annotated in truth for tube in annotated], minlength=num_classes
    )
    label = np.array(labels, dtype=np.int64)
    score = np.array(scores).astype(np.float32)
    overlap = np.array(overlaps).reshape(-1, len(levels))
    class_ap = np.zeros((len(levels), num_classes))
    class_iou = np.zeros((len(levels), num_classes))
    for a in range(num_classes):
        own = label == a
        for i in range(len(levels)):
            hits = overlap[own, i] > 0
            class_ap[i, a] = average_precision(score[own], hits, int(num_truth[a]))
            if own.any():
                # Parity: ROAD: a class with detections and no right one has a mean overlap of 0.1.
                class_iou[i, a] = (overlap[own, i].sum() + 1e-6) / (hits.sum() + 1e-5)
    return VideoScores(
        tuple(thresholds), class_ap, class_iou.mean(axis=1), right / max(len(truth), 1)
    )


def _claim(
    tube: Tube, annotated: Sequence[TruthTube], claimed: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """Overlap of the tube with what it rightly claims at each level, else 0; marks the claims."""
    own = [i for i, other in enumerate(annotated) if other.label == tube.label]
    if not own:
        return np.zeros(len(levels))
    boxes = np.concatenate([tube.boxes[:, :2], tube.boxes[:, 2:] - tube.boxes[:, :2]], axis=1)
    iou = np.zeros(len(annotated))
    iou[own] = [tube_iou(annotated[i], tube.start, boxes) for i in own]
    free = np.where(claimed, 0, iou)  # [thresholds, G]
    best = free.argmax(axis=1)
    value = free[np.arange(len(levels)), best]
    hit = value > levels
    claimed[np.nonzero(hit)[0], best[hit]] = True
    return np.where(hit, value, 0)
