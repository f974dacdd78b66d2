"""Candidates, linking, labelling, fusion, frame-AP and video-mAP against plain definitions."""

import itertools

import numpy as np
import pytest

from accel.detection.average_precision import FrameBoxes, average_precision, frame_ap
from accel.detection.candidates import (
    Candidates,
    FilterRule,
    filter_boxes,
    pixel_boxes,
    suppress,
)
from accel.detection.fusion import fused_candidates
from accel.detection.labelling import LabelRule, Tube, is_kept, label_sequences, trim
from accel.detection.linking import Linker, LinkRule, Path, link, mean_of_best, pixel_iou
from accel.detection.video_ap import TruthTube, tube_iou, video_map

CLASSES = 3


def _video(rng: np.random.Generator, frames: int = 12, boxes: int = 30):
    """Boxes in pixels and scores of 3 classes and background, some equal, of drifting objects."""
    center = rng.uniform(60, 180, (boxes, 2)) + rng.normal(0, 3, (frames, boxes, 2)).cumsum(0)
    size = rng.uniform(20, 60, (boxes, 2))
    ltrb = np.concatenate([center - size / 2, center + size / 2], axis=-1)
    scores = rng.dirichlet(np.ones(CLASSES + 1), (frames, boxes)).round(2)
    scores[frames // 2] = 0  # a frame without candidates
    return ltrb, scores


def _plain_nms(boxes, scores, threshold, order):
    kept: list[int] = []
    for i in order:
        for j in kept:
            side = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
            if (side > 0).all():
                areas = [(boxes[k, 2:] - boxes[k, :2]).prod() for k in (i, j)]
                if side.prod() / (sum(areas) - side.prod()) > threshold:
                    break
        else:
            kept.append(i)
    return kept


def test_suppression_is_the_definition_with_ties_and_degenerate_boxes() -> None:
    rng = np.random.default_rng(0)
    ltrb, scores = _video(rng, 1, 40)
    boxes, values = ltrb[0], scores[0, :, 0]
    boxes[5] = boxes[6]
    values[5] = values[6]  # the later one wins
    boxes[7, 2:] = boxes[7, :2]  # no area
    boxes[8] = boxes[8, [2, 1, 0, 3]]  # inverted
    order = sorted(range(40), key=lambda i: (-values[i], -i))
    kept = suppress(boxes, values, 0.3)
    assert kept[kept >= 0].tolist() == _plain_nms(boxes, values, 0.3, order)
    assert {7, 8} <= set(kept.tolist()) and 5 not in kept


def test_filter_is_threshold_then_best_then_suppression() -> None:
    ltrb, scores = _video(np.random.default_rng(1))
    rule = FilterRule(score_threshold=0.1, candidates=9, iou_threshold=0.3, keep=4)
    found = filter_boxes(ltrb, scores, rule, CLASSES)
    for frame, a in itertools.product(range(len(ltrb)), range(CLASSES)):
        values = scores[frame, :, a]
        best = sorted(np.nonzero(values > 0.1)[0].tolist(), key=lambda i: (-values[i], i))[:9]
        order = sorted(best, key=lambda i: (-values[i], -best.index(i)))
        kept = _plain_nms(ltrb[frame], values, 0.3, order)[:4]
        n = found.counts[frame, a]
        np.testing.assert_array_equal(found.boxes[frame, a, :n], ltrb[frame, kept])
        np.testing.assert_array_equal(found.all_scores[frame, a, :n], scores[frame, kept])
    assert not found.counts[len(ltrb) // 2].any()


def _plain_link(boxes, scores, rule):
    """Paths of one class as lists of (frame, box, edge), by the words of the specification."""
    live: list[dict] = []
    dead: list[dict] = []
    for frame, (rows, values) in enumerate(zip(boxes, scores, strict=True)):
        free = list(range(len(rows)))
        for path in live:
            last = path["found"][-1]
            edges = {
                i: values[i]
                for i in free
                if pixel_iou(boxes[last[0]][last[1]], rows[i]) >= rule.iou_threshold
            }
            if sum(edges.values()) > 0:
                i = min(edges, key=lambda i: (-edges[i], i))
                path["found"].append((frame, i))
                path["misses"] = 0
                free.remove(i)
            else:
                path["misses"] += 1
        for path in live:
            own = np.array([scores[f][i] for f, i in path["found"]])
            path["rank"] = mean_of_best(own, rule.jump_gap + 1)
        live.sort(key=lambda path: -path["rank"])
        dead += [path for path in live if path["misses"] >= rule.jump_gap]
        live = [path for path in live if path["misses"] < rule.jump_gap]
        live += [{"found": [(frame, i)], "misses": 0} for i in free]
    return [path["found"] for path in live + dead]


@pytest.mark.parametrize("seed", range(4))
def test_linking_is_the_plain_definition(seed: int) -> None:
    ltrb, scores = _video(np.random.default_rng(seed), frames=25, boxes=14)
    rule = LinkRule(iou_threshold=0.3, jump_gap=2, min_found=3)
    candidates = filter_boxes(ltrb, scores, FilterRule(score_threshold=0.3, keep=8), CLASSES)
    found = link(candidates, rule)
    for a in range(CLASSES):
        counts = candidates.counts[:, a]
        boxes = [candidates.boxes[f, a, :n] for f, n in enumerate(counts)]
        values = [candidates.scores[f, a, :n] for f, n in enumerate(counts)]
        plain = [path for path in _plain_link(boxes, values, rule) if len(path) >= rule.min_found]
        expected = {
            (tuple(f for f, _ in path), tuple(boxes[f][i][0] for f, i in path)): path
            for path in plain
        }
        assert len(found[a]) == len(plain) == len(expected) > 0
        for path in found[a]:
            lefts = path.boxes[path.frames - path.start, 0]
            own = expected[tuple(path.frames.tolist()), tuple(lefts)]
            assert path.total == pytest.approx(sum(values[f][i] for f, i in own))
        best = [mean_of_best(path.scores, 20) for path in found[a]]
        assert best == sorted(best, reverse=True)


def test_a_gap_is_filled_with_what_follows_and_a_cost_needs_its_scores() -> None:
    box = np.array([10.0, 10, 40, 40])
    boxes = np.stack([box, box + 1, box + 2, box + 3, box + 4, box + 5])[:, None, None]
    scores = np.linspace(0.5, 1, 6)[:, None, None]
    counts = np.array([1, 1, 0, 1, 1, 0])[:, None]
    candidates = Candidates(boxes, scores, scores[..., None], counts)
    (path,) = link(candidates)[0]
    assert path.frames.tolist() == [0, 1, 3, 4]
    np.testing.assert_array_equal(path.boxes, boxes[[0, 1, 3, 3, 4], 0, 0])
    assert path.misses == 1
    with pytest.raises(ValueError, match="needs all_scores"):
        Linker(1, LinkRule(cost="similarity")).step(boxes[0], scores[0], counts[0])


def test_no_frame_and_no_candidate_give_no_path() -> None:
    ltrb, scores = _video(np.random.default_rng(0))
    none = FilterRule(score_threshold=2.0)
    assert link(filter_boxes(ltrb, scores, none, CLASSES)) == [[], [], []]
    assert link(filter_boxes(ltrb[:0], scores[:0], none, CLASSES)) == [[], [], []]
    assert trim([], LabelRule(), CLASSES) == []


def test_labels_maximize_the_sum_minus_changes() -> None:
    rng = np.random.default_rng(3)
    lengths = np.array([5, 1, 4])
    scores = rng.integers(0, 4, (3, 5, 3)).astype(float)  # with ties
    found = label_sequences(scores, lengths, 1.5)
    for row, length, labels, totals in zip(scores, lengths, *found, strict=True):

        def value(path, row=row):
            changes = sum(a != b for a, b in itertools.pairwise(path))
            return sum(row[i, a] for i, a in enumerate(path)) - 1.5 * changes

        best = max(map(value, itertools.product(range(3), repeat=int(length))))
        assert value(labels[:length]) == best == totals.max()
        assert (labels[length:] == -1).all()


def _tube(label, start, frames, score=0.5, box=(10.0, 10, 50, 60)):
    scores = np.full(frames, score)
    return Tube(label, start, np.tile(box, (frames, 1)), scores, score, start, score, 0.0)


def test_trimming_cuts_a_path_where_another_class_is_better() -> None:
    own = np.array([0.9] * 12 + [0.05] * 12 + [0.9] * 12)
    all_scores = np.stack([own, 1 - own], axis=1)
    path = Path(0, np.arange(5, 41), np.zeros((36, 4)), own, all_scores, 0.0, 0)
    first, second = trim([path], LabelRule(change_cost=3.0), 2)
    assert (first.start, len(first.scores)) == (5, 12)
    assert (second.start, len(second.scores)) == (29, 12)
    assert is_kept(first, LabelRule()) and not is_kept(_tube(0, 0, 9), LabelRule())
    (whole,) = trim([path], LabelRule(change_cost=20.0), 2)
    assert len(whole.scores) == 36


def test_average_precision_by_hand() -> None:
    scores, hits = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert average_precision(scores, hits, 2) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert average_precision(scores, hits, 0) == average_precision(scores[:0], hits[:0], 3) == 0
    assert average_precision(scores[::-1], hits[::-1], 4) == pytest.approx(0.25 + 0.25 * 2 / 3)


def test_frame_ap_counts_each_box_once() -> None:
    box = np.array([[0.0, 0, 10, 10]])
    truth = FrameBoxes(np.array([4]), np.array([1]), box, np.ones(1))
    found = FrameBoxes(
        np.array([4, 4, 5]), np.array([1, 1, 1]), box.repeat(3, 0), np.array([0.5, 0.9, 0.1])
    )
    result = frame_ap(found, truth, num_classes=2, iou_threshold=0.5)
    assert result.ap.tolist() == [0.0, 1.0]
    assert result.mean == 0.5
    assert result.num_found.tolist() == [0, 3] and result.num_truth.tolist() == [0, 1]


def test_tube_overlap_and_its_one_frame_quirk() -> None:
    truth = TruthTube(0, 3, np.tile([10.0, 10, 41, 51], (10, 1)))
    same = np.tile([9.0, 9, 40, 50], (10, 1))
    assert tube_iou(truth, 3, same) == pytest.approx(1.0)
    assert tube_iou(truth, 8, same) == pytest.approx(5 / 15)
    assert tube_iou(truth, 12, same) == tube_iou(truth, 40, same) == 0.0


def test_video_map_claims_a_tube_once_and_scores_accuracy() -> None:
    truth = [[TruthTube(1, 0, np.tile([11.0, 11, 41, 51], (20, 1)))], []]
    right, again, other = _tube(1, 0, 20, 0.6), _tube(1, 0, 20, 0.9), _tube(0, 0, 20, 0.7)
    scores = video_map([[right, again, other], [other]], truth, num_classes=2)
    assert scores.class_ap[0].tolist() == [0.0, 1.0]
    assert scores.at(0.5) == scores.averaged == 0.5
    assert scores.accuracy == 0.5
    assert scores.mean_iou[0] == pytest.approx((0.1 + 1.0) / 2, abs=1e-4)
    with pytest.raises(ValueError, match="of 1 and annotations of 2 videos"):
        video_map([[right]], truth, num_classes=2)
    assert not video_map([[], []], truth, num_classes=2).class_ap.any()


def test_boost_touches_the_first_overlapping_box_only() -> None:
    boxes = np.array([[10.0, 10, 50, 50], [100, 100, 150, 150], [200, 20, 230, 90]])[None]
    scores = np.array([[0.6, 0.1, 0.3], [0.5, 0.1, 0.4], [0.4, 0.2, 0.4]])[None]
    rule = FilterRule(score_threshold=0.3)
    result = fused_candidates([(boxes, scores), (boxes, scores)], "boost", rule, 1)
    # The first base box is boosted to (0.6 + 0.6) / 2 of the normalized sum; the top's others join.
    assert result.counts.tolist() == [[3]]
    assert result.scores[0, 0, :3].max() == pytest.approx(0.6, abs=1e-4)
    apart = boxes + 400
    alone = fused_candidates([(boxes, scores), (apart, scores)], "boost", rule, 1)
    assert alone.counts.tolist() == [[3]]
    union = fused_candidates([(boxes, scores), (apart, scores)], "union", rule, 1)
    assert union.counts.tolist() == [[6]]
    with pytest.raises(ValueError, match="equally many frames"):
        fused_candidates([(boxes, scores), (boxes[:0], scores[:0])], "mean", rule, 1)
    with pytest.raises(ValueError, match="got 1 streams"):
        fused_candidates([(boxes, scores)], "mean", rule, 1)


def test_pixel_boxes_are_clipped_as_published() -> None:
    boxes = pixel_boxes(np.array([[-0.1, 0.5, 1.2, 0.6], [1.1, 0.0, 1.3, -0.2]]))
    np.testing.assert_allclose(boxes, [[1, 121, 320, 145], [353, 1, 320, -47]])
