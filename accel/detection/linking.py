"""Online linking: boxes of successive frames become paths, class by class.

Each frame is seen once, in order, so that a live stream and a stored video take the same way.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from accel.detection.candidates import Candidates

Cost = Literal["score", "similarity", "score_and_similarity"]

_RANKED_BY = 20  # best scores of a finished path whose mean orders the paths


@dataclass(frozen=True, kw_only=True)
class LinkRule:
    """How boxes join paths."""

    cost: Cost = "score"
    """What a path looks for: the best-scored box, the box with the nearest scores of all classes,
    or the sum of both."""

    iou_threshold: float = 0.1
    """Least overlap with the path's last box."""

    jump_gap: int = 3
    """A path ends at its so-manieth missed frame in a row, >= 1."""

    min_found: int = 4
    """Least number of found boxes of a path that counts."""


@dataclass(frozen=True)
class Path:
    """One object of one class over time; frames between found ones are filled."""

    label: int
    """Class, 0-based."""

    frames: np.ndarray
    """[f] int64: frames in which it was found, 0-based, increasing."""

    boxes: np.ndarray
    """[L, 4], one per frame from the first to the last found one."""

    scores: np.ndarray
    """[L]"""

    all_scores: np.ndarray
    """[L, K]"""

    total: float
    """Sum of the edge scores."""

    misses: int
    """Frames since it was found last, when it ended."""

    @property
    def start(self) -> int:
        """First frame."""
        return int(self.frames[0])


class Links(NamedTuple):
    """What became of the boxes of one frame."""

    path: np.ndarray
    """[A, n] int64: number of the path (unique over all classes), -1 for padding."""

    edge: np.ndarray
    """[A, n]: what the box added to its path."""


class Linker:
    """The live paths of A independent classes.

    Args:
        num_classes: A.
        rule: how boxes join.
    """

    def __init__(self, num_classes: int, rule: LinkRule | None = None) -> None:
        self.rule = rule or LinkRule()
        self._rows = np.arange(num_classes)[:, None]
        best = self.rule.jump_gap + 1
        # Live paths, [A, P, ...], in their order; the first `_live` of each class exist.
        self._live = np.zeros(num_classes, dtype=np.int64)
        self._path = np.zeros((num_classes, 0), dtype=np.int64)
        self._misses = np.zeros((num_classes, 0), dtype=np.int64)
        self._box = np.zeros((num_classes, 0, 4))
        self._best = np.zeros((num_classes, 0, best))
        self._last = np.zeros((num_classes, 0, 0))  # [A, P, K] for a cost that compares
        self._dead: list[list[tuple[int, int]]] = [[] for _ in range(num_classes)]
        self._paths = 0

    def step(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        counts: np.ndarray,
        all_scores: np.ndarray | None = None,
        last_boxes: np.ndarray | None = None,
    ) -> Links:
        """Take the next frame.

        Args:
            boxes: [A, n, 4] in 1-based pixels.
            scores: [A, n].
            counts: [A], boxes of each class that are no padding.
            all_scores: [A, n, K], for a cost that compares them.
            last_boxes: [A, n, 4], by which the next frame finds what is taken now; None: `boxes`.
        """
        if self._compares:
            if all_scores is None:
                raise ValueError(f'Linker: the cost "{self.rule.cost}" needs all_scores.')
            if not self._last.size:
                self._last = np.zeros((*self._path.shape, all_scores.shape[-1]))
        last_boxes = boxes if last_boxes is None else last_boxes
        present = np.arange(scores.shape[1]) < counts[:, None]
        edges = self._edges(boxes, scores, all_scores, present)  # [A, P, n]
        chosen = np.full(self._path.shape, -1)  # [A, P]
        free = present.copy()
        for rank in np.nonzero((edges > 0).any(axis=(0, 2)))[0].tolist():
            row = np.where(free, edges[:, rank], 0)
            taking = np.nonzero(row.sum(axis=1) > 0)[0]
            best = row[taking].argmax(axis=1)
            chosen[taking, rank] = best
            free[taking, best] = False
        path = np.full(scores.shape, -1)
        edge = np.where(present, scores, 0.0)
        label, p = np.nonzero(chosen >= 0)
        box = chosen[label, p]
        path[label, box] = self._path[label, p]
        edge[label, box] = edges[label, p, box]
        self._misses += 1
        self._misses[label, p] = 0
        self._box[label, p] = last_boxes[label, box]
        self._best[label, p] = _with(self._best[label, p], scores[label, box])
        if self._compares and all_scores is not None:
            self._last[label, p] = all_scores[label, box]
        self._sort(path, free, last_boxes, scores, all_scores)
        return Links(path, edge)

    def ended(self) -> list[list[tuple[int, int]]]:
        """(number, misses) of all paths of each class: live ones, then those that died."""
        live = [
            list(zip(path[:n].tolist(), misses[:n].tolist(), strict=True))
            for path, misses, n in zip(self._path, self._misses, self._live, strict=True)
        ]
        return [a + b for a, b in zip(live, self._dead, strict=True)]

    @property
    def _compares(self) -> bool:
        return self.rule.cost != "score"

    def _edges(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        all_scores: np.ndarray | None,
        present: np.ndarray,
    ) -> np.ndarray:
        alive = np.arange(self._path.shape[1]) < self._live[:, None]
        value = scores[:, None]  # [A, 1, n]
        if self._compares and all_scores is not None:
            distance = np.linalg.norm(self._last[:, :, None] - all_scores[:, None], axis=-1)
            value = 1 - distance + (value if self.rule.cost == "score_and_similarity" else 0)
        near = pixel_iou(self._box[:, :, None], boxes[:, None]) >= self.rule.iou_threshold
        return np.where(near & alive[..., None] & present[:, None], value, 0.0)

    def _sort(
        self,
        path: np.ndarray,
        free: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        all_scores: np.ndarray | None,
    ) -> None:
        """Order the paths by their best scores, end the missing, start new ones behind."""
        known = np.isfinite(self._best)
        order_score = np.where(known, self._best, 0).sum(-1) / np.maximum(known.sum(-1), 1)
        alive = np.arange(self._path.shape[1]) < self._live[:, None]
        order = np.argsort(np.where(alive, -order_score, np.inf), axis=1, kind="stable")
        misses = self._misses[self._rows, order]
        ending = (misses >= self.rule.jump_gap) & alive  # the first `_live` stay in front
        for label, p in zip(*np.nonzero(ending), strict=True):
            self._dead[label].append((int(self._path[label, order[label, p]]), misses[label, p]))

        fresh = int(free.sum())
        path[free] = np.arange(self._paths, self._paths + fresh)
        self._paths += fresh
        best = np.full((*scores.shape, self._best.shape[2]), -np.inf)
        best[..., 0] = scores
        stays = np.concatenate([alive & ~ending, free], axis=1)  # [A, P + n]
        self._live = stays.sum(axis=1)
        most = int(self._live.max(initial=0))
        place = np.argsort(~stays, axis=1, kind="stable")[:, :most]

        def joined(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            both = np.concatenate([old[self._rows, order], new], axis=1)
            result: np.ndarray = both[self._rows, place]
            return result

        if self._compares and all_scores is not None:
            self._last = joined(self._last, all_scores)
        self._path = joined(self._path, path)
        self._misses = joined(self._misses, np.zeros_like(path))
        self._box = joined(self._box, boxes)
        self._best = joined(self._best, best)


def link(
    candidates: Candidates, rule: LinkRule | None = None, *, last_boxes: np.ndarray | None = None
) -> list[list[Path]]:
    """The paths of a video, per class, best first.

    Paths with fewer than `rule.min_found` boxes are left out. The order is that of the mean of the
    20 best scores.

    Args:
        candidates: of the video.
        rule: how boxes join.
        last_boxes: [F, A, n, 4], see `Linker.step`.
    """
    rule = rule or LinkRule()
    num_classes = candidates.counts.shape[1]
    linker = Linker(num_classes, rule)
    links = [
        linker.step(*frame)
        for frame in zip(
            candidates.boxes,
            candidates.scores,
            candidates.counts,
            candidates.all_scores,
            candidates.boxes if last_boxes is None else last_boxes,
            strict=True,
        )
    ]
    if not links:
        return [[] for _ in range(num_classes)]
    number = np.stack([frame.path for frame in links])  # [F, A, n]
    edge = np.stack([frame.edge for frame in links])
    entry = np.nonzero(number >= 0)  # by frame
    sorted_by_path = np.argsort(number[entry], kind="stable")
    frame, _, box = (index[sorted_by_path] for index in entry)
    length = np.bincount(number[entry])
    first = np.concatenate([[0], length.cumsum()])
    paths = []
    for a, ended in enumerate(linker.ended()):
        found = []
        for name, misses in ended:
            if length[name] < rule.min_found:
                continue
            own = slice(first[name], first[name + 1])
            frames = frame[own]
            # Parity: ROAD: a gap holds copies of the box, score and scores found after it.
            after = np.searchsorted(frames, np.arange(frames[0], frames[-1] + 1))
            at = (frames[after], a, box[own][after])
            found.append(
                Path(
                    a,
                    frames,
                    candidates.boxes[at],
                    candidates.scores[at],
                    candidates.all_scores[at],
                    float(edge[frames, a, box[own]].sum()),
                    int(misses),
                )
            )
        rank = np.array([-mean_of_best(path.scores, _RANKED_BY) for path in found])
        paths.append([found[i] for i in np.argsort(rank, kind="stable")])
    return paths


def pixel_iou(first_ltrb: np.ndarray, second_ltrb: np.ndarray) -> np.ndarray:
    """Overlap of boxes [..., 4] whose last pixels count: sides are right - left + 1.

    Intersection over union, with the machine epsilon added to the union.
    """
    lower = np.maximum(first_ltrb[..., :2], second_ltrb[..., :2])
    upper = np.minimum(first_ltrb[..., 2:], second_ltrb[..., 2:]) + 1
    side = np.maximum(upper - lower, 0)
    shared = side[..., 0] * side[..., 1]
    union = pixel_area(first_ltrb) + pixel_area(second_ltrb) - shared
    overlap: np.ndarray = shared / (union + np.finfo(np.float64).eps)
    return overlap


def pixel_area(boxes_ltrb: np.ndarray) -> np.ndarray:
    """Area of boxes [..., 4] whose last pixels count."""
    side = boxes_ltrb[..., 2:] - boxes_ltrb[..., :2] + 1
    area: np.ndarray = side[..., 0] * side[..., 1]
    return area


def mean_of_best(scores: np.ndarray, count: int) -> float:
    """Mean of the `count` largest of the scores [n], or of all when there are fewer."""
    return float(np.sort(scores)[::-1][:count].mean())


def _with(best: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The largest scores [x, g], descending, after one more [x]."""
    both = np.concatenate([best, scores[:, None]], axis=1)
    largest: np.ndarray = np.sort(both, axis=1)[:, :0:-1]
    return largest
