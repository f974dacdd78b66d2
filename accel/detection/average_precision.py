"""Average precision, and the frame-AP of boxes in both published integrations."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from accel.detection.candidates import FRAME_SIZE, Candidates


@dataclass(frozen=True)
class FrameBoxes:
    """Boxes of many frames, one per row."""

    frames: np.ndarray
    """[N] int64: frame (of any video; numbers only have to differ)."""

    labels: np.ndarray
    """[N] int64: class, 0-based."""

    boxes: np.ndarray
    """[N, 4] left, top, right, bottom."""

    scores: np.ndarray
    """[N]; of ground truth anything."""


@dataclass(frozen=True)
class FrameAP:
    """Frame-AP of every class."""

    ap: np.ndarray
    """[A]; 0 for a class without ground truth."""

    num_truth: np.ndarray
    """[A] int64: boxes to be found."""

    num_found: np.ndarray
    """[A] int64: detections."""

    @property
    def mean(self) -> float:
        """Frame-mAP: the mean over all classes."""
        return float(self.ap.mean())


def average_precision(scores: np.ndarray, hits: np.ndarray, num_truth: int) -> float:
    """Exact area under the precision-recall curve, precision made monotone.

    Args:
        scores: [N]; equal ones keep their order.
        hits: [N] bool.
        num_truth: what there was to find.

    Returns:
        0 to 1; 0 without detections or without anything to find.
    """
    if not num_truth or not len(scores):
        return 0.0
    found = np.cumsum(hits[np.argsort(-scores, kind="stable")])
    recall = np.concatenate([[0], found / num_truth, [1]])
    precision = np.concatenate([[0], found / np.arange(1, len(found) + 1), [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.nonzero(recall[1:] != recall[:-1])[0] + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def frame_ap(
    found: FrameBoxes,
    truth: FrameBoxes,
    *,
    num_classes: int,
    iou_threshold: float,
    integration: Literal["python", "matlab"] = "python",
) -> FrameAP:
    """Frame-AP: a detection is right when it overlaps an unclaimed box of its class enough.

    The integrations differ in the geometry and in which boxes a detection may claim:

    * "python": corners without the last pixel; the largest overlap among the unclaimed boxes of the
      detection's class;
    * "matlab" (the published tables): the detection's sides are right - left + 1; the largest
      overlap among all unclaimed boxes of the frame.

    Args:
        found: detections in any order; of equal scores in a frame and class the earlier is first.
        truth: ground truth.
        num_classes: A.
        iou_threshold: least overlap.
        integration: see above.
    """
    order = np.lexsort((-found.scores, found.labels, found.frames))
    frames, labels, boxes = found.frames[order], found.labels[order], found.boxes[order]
    scores = found.scores[order].astype(np.float32)
    hits = np.zeros(len(frames), dtype=bool)
    truth_of: dict[int, np.ndarray] = {
        int(frame): np.nonzero(truth.frames == frame)[0] for frame in np.unique(truth.frames)
    }
    claimed = np.zeros(len(truth.frames), dtype=bool)
    sought = set(zip(truth.frames.tolist(), truth.labels.tolist(), strict=True))
    pairs = zip(frames.tolist(), labels.tolist(), strict=True)
    possible = np.fromiter((pair in sought for pair in pairs), bool, len(frames))
    last_pixel = int(integration == "matlab")
    for i in np.nonzero(possible)[0]:
        rows = truth_of[int(frames[i])]
        # Parity: ROAD: the MATLAB search runs over the boxes of all classes.
        own = integration == "matlab" or truth.labels[rows] == labels[i]
        rows = rows[~claimed[rows] & own]
        if not len(rows):
            continue
        overlap = _iou(boxes[i], truth.boxes[rows], last_pixel)
        best = int(overlap.argmax())
        hits[i] = overlap[best] >= iou_threshold
        claimed[rows[best]] |= hits[i]
    num_truth = np.bincount(truth.labels, minlength=num_classes)
    ap = [
        average_precision(scores[own], hits[own], int(num_truth[a]))
        for a in range(num_classes)
        for own in [labels == a]
    ]
    return FrameAP(np.array(ap), num_truth, np.bincount(labels, minlength=num_classes))


def frame_detection_boxes(
    boxes_ltrb: np.ndarray, frame_size: tuple[int, int] = FRAME_SIZE
) -> np.ndarray:
    """Boxes [..., 4] in 1-based pixels as the MATLAB frame-AP has them, from fractions."""
    width, height = frame_size
    boxes = boxes_ltrb.astype(np.float64) * (width, height, width, height) + 1
    boxes[..., :2] = np.maximum(boxes[..., :2], 1)
    boxes[..., 2:] = np.minimum(boxes[..., 2:], (width, height))
    clipped: np.ndarray = boxes
    return clipped


def frame_boxes(candidates: Candidates, first_frame: int = 0) -> FrameBoxes:
    """The candidates of a video, frame by frame and class by class.

    Args:
        candidates: of the video.
        first_frame: number of its first frame.
    """
    frame, label, box = np.nonzero(candidates.present())
    at = (frame, label, box)
    return FrameBoxes(frame + first_frame, label, candidates.boxes[at], candidates.scores[at])


def _iou(box: np.ndarray, others: np.ndarray, last_pixel: int) -> np.ndarray:
    """Overlap of a detection, whose last pixel may count, with boxes [G, 4] of the truth."""
    side = np.minimum(box[2:] + last_pixel, others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.maximum(side, 0).prod(axis=1)
    area = (box[2:] - box[:2] + last_pixel).prod()
    union = area + (others[:, 2:] - others[:, :2]).prod(axis=1) - shared
    overlap: np.ndarray = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap
