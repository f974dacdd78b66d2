"""Temporal labelling: which part of a path shows its action."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from accel.detection.linking import Path, mean_of_best


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How paths become tubes."""

    change_cost: float = 5.0
    """Cost of a change of label between two frames (alpha), >= 0; published results: 5."""

    offset: float = 20.0
    """Added to every score; the labels do not depend on it."""

    min_frames: int = 10
    """Shortest tube that is kept."""

    best_scores: int = 40
    """A tube's score is the mean of so many largest scores of its frames."""

    score_threshold: float = 0.0
    """Scores of tubes must be larger."""


@dataclass(frozen=True)
class Tube:
    """A detected action: boxes in successive frames with one label."""

    label: int
    """Class, 0-based."""

    start: int
    """First frame, 0-based."""

    boxes: np.ndarray
    """[n, 4] left, top, right, bottom, pixels."""

    scores: np.ndarray
    """[n]"""

    score: float
    """Of the tube."""

    path_start: int
    """First frame of its path."""

    path_score: float
    """Mean score of the whole path."""

    labelling_score: float
    """Value of the best labelling of the path, per frame."""


class Labelling(NamedTuple):
    """The best labels of B sequences."""

    labels: np.ndarray
    """[B, L] int64, -1 behind the end."""

    totals: np.ndarray
    """[B, A]: value of the best labelling that ends with each label."""


def label_sequences(scores: np.ndarray, lengths: np.ndarray, change_cost: float) -> Labelling:
    """Labels with the largest sum of scores minus `change_cost` for every change (Viterbi).

    Equal values: the smaller label.

    Args:
        scores: [B, L, A], padded behind each sequence's end.
        lengths: [B], frames of each sequence, >= 1.
        change_cost: >= 0.
    """
    batch, longest, num_labels = scores.shape
    order = np.argsort(-lengths, kind="stable")  # so that those still running are in front
    running = (lengths[order][:, None] > np.arange(longest)).sum(axis=0)  # [L]
    by_frame = scores[order].transpose(1, 0, 2).astype(np.float64, order="C")  # [L, B, A]
    every, rows = np.arange(num_labels), np.arange(batch)
    total = by_frame[0].copy()
    source = np.zeros((longest, batch, num_labels), dtype=np.int32)
    for frame in range(1, longest):
        n = running[frame]
        current = total[:n]
        changed = current - change_cost
        other = changed.argmax(axis=1)  # [n]
        value, other = changed[rows[:n], other, None], other[:, None]
        stays = (current > value) | ((current == value) & (every < other))
        source[frame, :n] = np.where(stays, every, other)
        total[:n] = by_frame[frame, :n] + np.maximum(current, value)
    ordered = np.full((batch, longest), -1)
    label = total.argmax(axis=1)
    for frame in range(longest - 1, -1, -1):
        n = running[frame]
        ordered[:n, frame] = label[:n]
        label[:n] = source[frame, rows[:n], label[:n]]
    labels, totals = np.empty_like(ordered), np.empty_like(total)
    labels[order], totals[order] = ordered, total
    return Labelling(labels, totals)


def trim(paths: Sequence[Path], rule: LabelRule, num_classes: int) -> list[Tube]:
    """The parts of the paths that are labelled with the path's own class, in the paths' order.

    Every part is returned; `is_kept` tells which count.

    Args:
        paths: of any classes.
        rule: how to label.
        num_classes: A, the first columns of all_scores, which compete for each frame.
    """
    if not paths:
        return []
    lengths = np.array([len(path.scores) for path in paths])
    scores = np.zeros((len(paths), lengths.max(), num_classes))
    for row, path in zip(scores, paths, strict=True):
        row[: len(path.scores)] = path.all_scores[:, :num_classes] + rule.offset
    labels, totals = label_sequences(scores, lengths, rule.change_cost)
    tubes = []
    for path, row, total, length in zip(paths, labels, totals, lengths, strict=True):
        own = np.concatenate([[False], row[:length] == path.label, [False]])
        edges = np.nonzero(own[1:] != own[:-1])[0]
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            part = path.scores[begin:end]
            tubes.append(
                Tube(
                    path.label,
                    path.start + int(begin),
                    path.boxes[begin:end],
                    part,
                    mean_of_best(part, rule.best_scores),
                    path.start,
                    float(path.scores.mean()),
                    float(total.max() / length),
                )
            )
    return tubes


def is_kept(tube: Tube, rule: LabelRule) -> bool:
    """Whether a tube is long enough and scored high enough to be evaluated."""
    return len(tube.boxes) >= rule.min_frames and tube.score > rule.score_threshold
