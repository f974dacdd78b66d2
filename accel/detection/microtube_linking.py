"""Linking whole micro-tubes: ours, not published.

The released AMTNet has no tube building, and ROAD's takes one box per frame. Here micro-tubes that
follow each other are linked by ROAD's rules: a path's last box against the first box of a
micro-tube. One step (and one pass of the network) serves T frames, and all T boxes count.
"""

from dataclasses import dataclass

import numpy as np

from accel.detection.candidates import FilterRule, filter_boxes
from accel.detection.linking import LinkRule, Path, link


@dataclass(frozen=True)
class MicrotubeFrames:
    """Which micro-tube shows each frame of a video, and where in it."""

    owner: np.ndarray
    """[F] int64: index of the micro-tube, not decreasing."""

    position: np.ndarray
    """[F]: between two of its T frames where frames are skipped; 0 to T - 1."""


def microtube_frames(starts: list[int], num_frames: int, step: int) -> MicrotubeFrames:
    """The frames of a video of micro-tubes that begin at `starts`; the later of two shows a frame.

    Args:
        starts: ascending from 0.
        num_frames: F of the video.
        step: frames from one frame of a micro-tube to the next, >= 1.
    """
    frames = np.arange(num_frames)
    owner = np.searchsorted(starts, frames, side="right") - 1
    return MicrotubeFrames(owner, (frames - np.array(starts)[owner]) / step)


def boxes_of_frames(boxes: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Boxes [F, ..., 4] at the positions [F] of micro-tubes [F, ..., T, 4], linear in between."""
    rows, last = np.arange(len(boxes)), boxes.shape[-2] - 1
    low = np.minimum(position.astype(np.int64), last)
    high = np.minimum(low + 1, last)
    by_frame = np.moveaxis(boxes, -2, 1)  # [F, T, ..., 4]
    share = (position - low).reshape(-1, *(1,) * (boxes.ndim - 2))
    between: np.ndarray = (1 - share) * by_frame[rows, low] + share * by_frame[rows, high]
    return between


def link_microtubes(
    boxes: np.ndarray,
    all_scores: np.ndarray,
    frames: MicrotubeFrames,
    rule: FilterRule,
    num_classes: int,
    link_rule: LinkRule | None = None,
) -> list[Path]:
    """The paths of a video, frame by frame, from its micro-tubes; suppression sees first boxes.

    Args:
        boxes: [S, M, T, 4] in 1-based pixels.
        all_scores: [S, M, K], actions first.
        frames: of the video.
        rule: which micro-tubes are linked.
        num_classes: A, the first columns of all_scores.
        link_rule: in micro-tubes where the published one is in frames; cost "score".

    Raises:
        ValueError: another cost.
    """
    if link_rule is not None and link_rule.cost != "score":
        # It would compare the boxes too, which travel with the scores.
        raise ValueError(f'link_microtubes: cost must be "score", got "{link_rule.cost}".')
    num_scores = all_scores.shape[-1]
    # The further boxes travel as further columns of the scores.
    further = boxes[:, :, 1:].reshape(*boxes.shape[:2], -1)
    columns = np.concatenate([all_scores, further], axis=-1)
    candidates = filter_boxes(boxes[:, :, 0], columns, rule, num_classes)
    last = candidates.all_scores[..., -4:] if boxes.shape[2] > 1 else candidates.boxes
    paths = []
    for path in (path for own in link(candidates, link_rule, last_boxes=last) for path in own):
        count = len(path.scores)
        tubes = np.concatenate([path.boxes, path.all_scores[:, num_scores:]], axis=1)
        row = frames.owner - path.start
        shown = np.nonzero((row >= 0) & (row < count))[0]
        row = row[shown]
        paths.append(
            Path(
                path.label,
                shown[np.isin(frames.owner[shown], path.frames)],
                boxes_of_frames(tubes.reshape(count, -1, 4)[row], frames.position[shown]),
                path.scores[row],
                path.all_scores[row, :num_scores],
                path.total,
                path.misses,
            )
        )
    return paths
