"""Linking whole micro-tubes: frames in order, boxes between skipped frames, gaps filled."""

import numpy as np
import pytest

from accel.detection.candidates import FilterRule
from accel.detection.linking import LinkRule
from accel.detection.microtube_linking import boxes_of_frames, link_microtubes, microtube_frames
from accel.engine.detection_config import DetectionConfig
from accel.engine.tube_evaluation import microtube_starts


def _moving(num_frames, speed=6.0):
    """Boxes [F, 4] of an object that leaves its own place within a few frames."""
    corner = np.arange(num_frames)[:, None] * np.array([speed, 0.0]) + [20.0, 40.0]
    return np.concatenate([corner, corner + 24.0], axis=1)


def _microtubes(starts, step, truth):
    """[S, 1, 2, 4] and scores [S, 1, 3] of one object of class 1."""
    boxes = np.stack([truth[[start, start + step]] for start in starts])[:, None]
    scores = np.tile([0.1, 0.8, 0.1], (len(starts), 1, 1)).astype(np.float64)
    return boxes, scores


@pytest.mark.parametrize("num_frames", [12, 13])
@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_moving_object_is_one_path_of_all_frames(num_frames, gap) -> None:
    config = DetectionConfig(network="amtnet", gap=gap)
    starts = microtube_starts(num_frames, config)
    assert len(starts) <= -(-num_frames // (gap + 2))
    truth = _moving(num_frames)
    boxes, scores = _microtubes(starts, gap + 1, truth)
    frames = microtube_frames(starts, num_frames, gap + 1)
    rule = LinkRule(min_found=2)
    (path,) = link_microtubes(boxes, scores, frames, FilterRule(score_threshold=0.5), 2, rule)
    assert path.label == 1 and path.start == 0
    assert path.frames.tolist() == list(range(num_frames))
    np.testing.assert_allclose(path.boxes, truth)
    np.testing.assert_array_equal(path.all_scores, np.tile([0.1, 0.8, 0.1], (num_frames, 1)))


def test_the_last_box_is_compared_with_the_first_one() -> None:
    """Boxes of 24 pixels that move by 14: they meet from frame to frame only."""
    truth = _moving(12, speed=14.0)
    starts = list(range(0, 12, 2))
    boxes, scores = _microtubes(starts, 1, truth)
    rule = LinkRule(min_found=2, iou_threshold=0.2)
    frames = microtube_frames(starts, 12, 1)
    threshold = FilterRule(score_threshold=0.5)
    assert len(link_microtubes(boxes, scores, frames, threshold, 2, rule)) == 1
    first_only = np.repeat(boxes[:, :, :1], 2, axis=2)
    assert not link_microtubes(first_only, scores, frames, threshold, 2, rule)


def test_a_missed_microtube_is_filled_with_the_next_one() -> None:
    truth = _moving(12, speed=1.0)
    starts = list(range(0, 12, 2))
    boxes, scores = _microtubes(starts, 1, truth)
    scores[2] = [0.9, 0.05, 0.05]
    frames = microtube_frames(starts, 12, 1)
    rule = LinkRule(min_found=2)
    found = link_microtubes(boxes, scores, frames, FilterRule(score_threshold=0.5), 2, rule)
    path = next(path for path in found if path.label == 1)
    assert path.frames.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    np.testing.assert_allclose(path.boxes[4:6], truth[6:8])
    np.testing.assert_allclose(path.boxes[6:], truth[6:])


def test_boxes_of_three_frames_between_positions() -> None:
    tube = np.arange(12.0).reshape(1, 3, 4).repeat(5, axis=0)
    position = np.array([0, 0.5, 1, 1.5, 2])
    expected = np.arange(4.0) + 4 * position[:, None]
    np.testing.assert_allclose(boxes_of_frames(tube, position), expected)
