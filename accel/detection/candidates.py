"""Boxes of a video that are worth linking: per frame and class, thresholded, cut and suppressed.

The rules are those of the published evaluation, which numbers pixels from 1.
"""

from dataclasses import dataclass

import numpy as np
import torch

import kernels

FRAME_SIZE = (320, 240)
"""Width and height in pixels to which the published evaluation scales all boxes."""


@dataclass(frozen=True, kw_only=True)
class FilterRule:
    """Which boxes of a frame and class stay."""

    score_threshold: float = 0.001
    """Scores must be larger."""

    candidates: int = 50
    """Best boxes that suppression sees, >= 1."""

    iou_threshold: float = 0.45
    """A box that overlaps a better one by more is dropped."""

    keep: int = 10
    """Best boxes that stay after suppression, >= 1."""


@dataclass(frozen=True)
class Candidates:
    """The boxes of F frames for A classes, padded: the last dimensions count up to n."""

    boxes: np.ndarray
    """[F, A, n, 4] left, top, right, bottom, pixels."""

    scores: np.ndarray
    """[F, A, n], best first in every frame and class."""

    all_scores: np.ndarray
    """[F, A, n, K]: the scores of all classes, actions first, then background (K >= A)."""

    counts: np.ndarray
    """[F, A] int64: boxes that are no padding."""

    def present(self) -> np.ndarray:
        """[F, A, n] bool: no padding."""
        present: np.ndarray = np.arange(self.scores.shape[2]) < self.counts[..., None]
        return present


def pixel_boxes(boxes_ltrb: np.ndarray, frame_size: tuple[int, int] = FRAME_SIZE) -> np.ndarray:
    """Boxes [..., 4] in 1-based pixels, for linking, from fractions of the image, in float64."""
    width, height = frame_size
    boxes = boxes_ltrb.astype(np.float64) * (width, height, width, height)
    # Parity: ROAD: left and top have no upper limit and right and bottom no lower one, so that a
    # box outside the image becomes an inverted one, and stays.
    boxes[..., :2] = np.maximum(boxes[..., :2], 0)
    boxes[..., 2:] = np.minimum(boxes[..., 2:], (width - 1, height - 1))
    clipped: np.ndarray = boxes + 1
    return clipped


def background_last(scores: np.ndarray) -> np.ndarray:
    """Scores [..., K] of a network, background first, with the background moved behind."""
    return np.roll(scores.astype(np.float64), -1, axis=-1)


def filter_boxes(
    boxes: np.ndarray, all_scores: np.ndarray, rule: FilterRule, num_classes: int
) -> Candidates:
    """The candidates among all boxes of a video.

    Args:
        boxes: [F, M, 4], one box per prior.
        all_scores: [F, M, K], actions first.
        rule: what stays.
        num_classes: A, the first columns of all_scores; <= K.
    """
    num_frames = len(boxes)
    chosen = np.full((num_frames, num_classes, rule.candidates), -1)
    for frame, scores in enumerate(all_scores[..., :num_classes]):
        columns, label = _best(scores.T, rule)
        chosen[frame, label, _rank(label)] = columns
    frames = np.arange(num_frames)[:, None, None]
    present = chosen >= 0
    scores = np.where(present, all_scores[frames, chosen, np.arange(num_classes)[:, None]], -np.inf)
    kept = suppress(boxes[frames, chosen], scores, rule.iou_threshold)[..., : rule.keep]
    return gather(boxes[frames, chosen], scores, all_scores[frames, chosen], kept)


def suppress(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Greedy non-maximum suppression as the published MATLAB does it.

    A box is dropped when it overlaps a better one by more than the threshold; of equal scores the
    later box is the better one. Areas are (right - left) * (bottom - top).

    Args:
        boxes: [..., n, 4].
        scores: [..., n]; -inf marks padding.
        iou_threshold: 0 to 1.

    Returns:
        [..., n] int64 indices into the n boxes, best first, filled up with -1.
    """
    shape = scores.shape
    if not scores.size:
        return np.full(shape, -1)
    # Boxes without area overlap nothing there: an infinite negative area does the same here.
    empty = (boxes[..., 2:] <= boxes[..., :2]).any(axis=-1, keepdims=True)
    boxes = np.where(empty, (0.0, 0.0, -np.inf, 1.0), boxes)
    # The operator takes the earlier one of equal scores: it sees the boxes in reverse.
    indices, _ = kernels.nms(
        torch.from_numpy(boxes.reshape(-1, *boxes.shape[-2:])[:, ::-1].copy()),
        torch.from_numpy(scores.reshape(-1, shape[-1])[:, ::-1].copy()),
        iou_threshold=iou_threshold,
        top_k=shape[-1],
    )
    found = indices.numpy().reshape(shape)
    return np.where(found >= 0, shape[-1] - 1 - found, -1)


def _best(scores: np.ndarray, rule: FilterRule) -> tuple[np.ndarray, np.ndarray]:
    """Indices and rows of the best entries of each row above the threshold, best first."""
    rows, columns = np.nonzero(scores > rule.score_threshold)
    order = np.lexsort((columns, -scores[rows, columns], rows))
    rows, columns = rows[order], columns[order]
    best = _rank(rows) < rule.candidates
    return columns[best], rows[best]


def _rank(rows: np.ndarray) -> np.ndarray:
    """Position of each entry among those of its row; rows are sorted."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def gather(
    boxes: np.ndarray, scores: np.ndarray, all_scores: np.ndarray, kept: np.ndarray
) -> Candidates:
    """The boxes at kept [F, A, m], indices into n that are filled up with -1."""
    present = kept >= 0
    return Candidates(
        np.take_along_axis(boxes, kept[..., None], axis=2),
        np.where(present, np.take_along_axis(scores, kept, axis=2), 0.0),
        np.take_along_axis(all_scores, kept[..., None], axis=2),
        present.sum(axis=-1),
    )
