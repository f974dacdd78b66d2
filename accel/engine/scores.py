"""Stored scores: one file per model and set of views; merged, combined and counted exactly."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.engine.checkpoint import write_atomically
from accel.engine.metrics import ClassificationMeter, combine_scores, mean_class_accuracy
from accel.errors import ConfigError

FORMAT = "accel-scores-1"


@dataclass(frozen=True)
class ScoreFacts:
    """What scores are of."""

    recipe: str
    """Name of the recipe; of several, joined by " + "."""
    weights: str
    """sha256 of the network's tensors; of several, joined by " + "."""
    videos: str
    """Fingerprint of the list of videos and labels."""
    average: str
    """What was averaged over the views: "probs", "logits" or "positive_logits"."""
    protocols: tuple[str, ...]
    """Views behind every score, e.g. ("2x3",)."""
    num_views: int


@dataclass(frozen=True)
class StoredScores:
    """Scores of all videos of a list."""

    values: Tensor
    """[N, K] float64, averaged over the views; not-a-number: the video could not be read."""
    labels: Tensor
    """[N] int64."""
    facts: ScoreFacts

    def save(self, path: Path) -> None:
        """Write the file; the same scores give the same bytes.

        Raises:
            ConfigError: it cannot be written.
        """
        buffer = io.BytesIO()
        facts = json.dumps({"format": FORMAT, **asdict(self.facts)}, sort_keys=True)
        np.savez(
            buffer,
            facts=np.array(facts),
            labels=self.labels.numpy(),
            values=self.values.numpy(),
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise ConfigError(f"{path}: scores cannot be written: {error.strerror}.") from error

    def metrics(self) -> dict[str, Any]:
        """`top1`, `top5`, `mean_class` (0..1; a class that is predicted but never true counts 0),
        `mean_class_strict` (such a class makes it None: the test scripts of TAM and MAS-Net),
        `num_videos`, and how many of these have no scores and count as wrong (`num_missing`).
        """
        meter = ClassificationMeter(self.values.shape[1], torch.device("cpu"))
        read = ~self.values.isnan().any(dim=1)
        meter.update(self.values[read], self.labels[read])
        meter.miss(self.labels[~read].tolist())
        counted = meter.compute()
        strict = mean_class_accuracy(meter.confusion, meter.missing, absent="nan")
        return {
            "top1": counted.top1,
            "top5": counted.top5,
            "mean_class": counted.mean_class,
            "mean_class_strict": None if math.isnan(strict) else strict,
            "num_videos": counted.num_clips,
            "num_missing": counted.num_missing,
        }


def load_scores(path: Path) -> StoredScores:
    """Scores of a file.

    Raises:
        ConfigError: not a file of ours, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            values = torch.from_numpy(stored["values"])
            labels = torch.from_numpy(stored["labels"])
        if facts.pop("format") != FORMAT or values.ndim != 2 or len(values) != len(labels):
            raise ValueError("another format")
        facts["protocols"] = tuple(facts["protocols"])
        return StoredScores(values, labels, ScoreFacts(**facts))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of scores; accel evaluate writes them.") from None
    except Exception as error:  # zipfile, json, numpy: all mean the same here
        raise ConfigError(
            f"{path}: not a file of scores, or damaged ({type(error).__name__}: {error})."
        ) from error


def merge_views(parts: Sequence[StoredScores]) -> StoredScores:
    """One model's scores over the union of view sets: the mean over all their views.

    Raises:
        ConfigError: the parts are of different weights, videos or averages, or share a view set.
    """
    first = parts[0].facts
    _require_equal(parts, "videos", "the same list of videos")
    _require_equal(parts, "weights", "the same weights")
    _require_equal(parts, "average", "the same average over views")
    protocols = [name for part in parts for name in part.facts.protocols]
    if len(set(protocols)) != len(protocols):
        raise ConfigError(f"scores to merge: a view set occurs twice: {', '.join(protocols)}.")
    views = sum(part.facts.num_views for part in parts)
    shares = [part.facts.num_views / views for part in parts]
    values = combine_scores([part.values for part in parts], shares)
    facts = replace(first, protocols=tuple(protocols), num_views=views)
    return StoredScores(values, parts[0].labels, facts)


def ensemble(members: Sequence[StoredScores], weights: Sequence[float]) -> StoredScores:
    """Weighted sum of several models' scores (published ensembles: weights of 1).

    Raises:
        ConfigError: the members are of different videos or averages.
    """
    _require_equal(members, "videos", "the same list of videos")
    _require_equal(members, "average", "the same average over views")
    facts = [member.facts for member in members]
    joined = ScoreFacts(
        recipe=" + ".join(fact.recipe for fact in facts),
        weights=" + ".join(fact.weights for fact in facts),
        videos=facts[0].videos,
        average=facts[0].average,
        protocols=tuple(dict.fromkeys(name for fact in facts for name in fact.protocols)),
        num_views=sum(fact.num_views for fact in facts),
    )
    values = combine_scores([member.values for member in members], weights)
    return StoredScores(values, members[0].labels, joined)


def _require_equal(parts: Sequence[StoredScores], key: str, what: str) -> None:
    values = [getattr(part.facts, key) for part in parts]
    if len(set(values)) > 1 or len({part.values.shape for part in parts}) > 1:
        found = ", ".join(
            f"{value[:16]} ({part.facts.recipe})" for part, value in zip(parts, values, strict=True)
        )
        raise ConfigError(f"scores: expected {what} and classes in every file, got {found}.")
