"""Late fusion of two streams (RGB and flow): their boxes per frame and class become one set."""

from typing import Literal

import numpy as np

from accel.detection.candidates import (
    Candidates,
    FilterRule,
    filter_boxes,
    gather,
    suppress,
)
from accel.detection.linking import pixel_area

Fusion = Literal["none", "boost", "union", "mean"]


def fused_candidates(
    streams: list[tuple[np.ndarray, np.ndarray]],
    fusion: Fusion,
    rule: FilterRule,
    num_classes: int,
    *,
    boost_iou: float = 0.25,
    frame_detection: bool = False,
) -> Candidates:
    """Candidates of one or two streams.

    * "none": those of the only stream;
    * "mean": the boxes of the first stream with the mean of both scores (same priors);
    * "union": the candidates of both, suppressed together;
    * "boost": as union, but a box of the first stream that overlaps one of the second takes over
      that one's scores.

    Args:
        streams: (boxes [F, M, 4] in pixels, all_scores [F, M, K]), the base stream first.
        fusion: how.
        rule: of each stream's filter and of the last suppression.
        num_classes: A.
        boost_iou: least overlap for a boost.
        frame_detection: the variant of the frame-AP: boosted scores are sums, not shares, and the
            result is not cut to `rule.keep`.

    Raises:
        ValueError: a number of streams that the fusion does not take, or of unequal lengths.
    """
    if len(streams) != (1 if fusion == "none" else 2):
        raise ValueError(f'fusion "{fusion}": got {len(streams)} streams.')
    if len({len(boxes) for boxes, _ in streams}) != 1:
        lengths = [len(boxes) for boxes, _ in streams]
        raise ValueError(f"fusion: the streams must have equally many frames, got {lengths}.")
    if fusion == "none":
        return filter_boxes(*streams[0], rule, num_classes)
    if fusion == "mean":
        (boxes, first), (_, second) = streams
        return filter_boxes(boxes, (first + second) / 2, rule, num_classes)
    base, top = (filter_boxes(*stream, rule, num_classes) for stream in streams)
    top_present = top.present()
    if fusion == "boost":
        base, top_present = _boost(base, top, boost_iou, as_sum=frame_detection)
    boxes = np.concatenate([base.boxes, top.boxes], axis=2)
    present = np.concatenate([base.present(), top_present], axis=2)
    scores = np.where(present, np.concatenate([base.scores, top.scores], axis=2), -np.inf)
    all_scores = np.concatenate([base.all_scores, top.all_scores], axis=2)
    kept = suppress(boxes, scores, rule.iou_threshold)
    return gather(boxes, scores, all_scores, kept if frame_detection else kept[..., : rule.keep])


def _boost(
    base: Candidates, top: Candidates, boost_iou: float, *, as_sum: bool
) -> tuple[Candidates, np.ndarray]:
    """The base with boosted scores, and which boxes of the top are added, [F, A, n]."""
    iou = _boost_iou(base.boxes, top.boxes)  # [F, A, n, n]
    iou[~(base.present()[..., :, None] & top.present()[..., None, :])] = -1
    largest = iou.max(axis=-1, initial=-1)  # [F, A, n]
    overlapping = largest >= boost_iou
    # Parity: ROAD: only the first base box of a frame and class is boosted, and boxes of the top
    # are added only where one was, because membership in an empty list is an empty answer there.
    frame, label = np.nonzero(overlapping.any(axis=-1))
    box = overlapping[frame, label].argmax(axis=-1)
    covered = iou[frame, label, box].argmax(axis=-1)
    overlap = largest[frame, label, box]
    scores, all_scores = base.scores.copy(), base.all_scores.copy()
    if as_sum:
        scores[frame, label, box] += top.scores[frame, label, covered] * overlap
    else:
        share = (
            all_scores[frame, label, box] + overlap[:, None] * top.all_scores[frame, label, covered]
        )
        share /= share.sum(axis=-1, keepdims=True)
        all_scores[frame, label, box] = share
        scores[frame, label, box] = share[np.arange(len(label)), label]
    added = np.zeros(top.scores.shape, dtype=bool)
    added[frame, label] = top.present()[frame, label]
    added[frame, label, covered] = False
    return Candidates(base.boxes, scores, all_scores, base.counts), added


def _boost_iou(base_ltrb: np.ndarray, top_ltrb: np.ndarray) -> np.ndarray:
    """Overlap of every base box with every top box, the union enlarged by 0.001."""
    first, second = base_ltrb[..., :, None, :], top_ltrb[..., None, :, :]
    side = np.minimum(first[..., 2:], second[..., 2:]) + 1
    side = np.maximum(side - np.maximum(first[..., :2], second[..., :2]), 0)
    shared = side[..., 0] * side[..., 1]
    overlap: np.ndarray = shared / (pixel_area(first) + pixel_area(second) - shared + 0.001)
    return overlap
