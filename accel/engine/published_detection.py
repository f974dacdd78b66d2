"""Published runs and rows of detectors: the facts about them, against the recipes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accel.detection.fusion import Fusion
from accel.engine.published import disagreements_with, facts

METRICS = (
    "video_map_20",
    "video_map_50",
    "video_map_75",
    "video_map_50_95",
    "frame_map_50",
    "accuracy",
)


@dataclass(frozen=True)
class DetectionRow:
    """One row of a published table of detection results."""

    name: str
    runs: tuple[str, ...]
    """One run, or that of the base and that of the second stream."""
    fusion: Fusion
    """Of the detections of two streams."""
    published: dict[str, float]
    """Percent, by `METRICS`."""


def detection_rows() -> list[DetectionRow]:
    """All rows, in the order of the table."""
    return [
        DetectionRow(
            entry["row"],
            tuple(entry["runs"]),
            entry["fusion"],
            {key: entry[key] for key in METRICS},
        )
        for entry in facts()["detection_rows"].values()
    ]


def expected_detection_values(run: str) -> dict[str, Any]:
    """What the facts say about the keys of the recipe that stands for a run.

    Args:
        run: a name in `facts()["detection_runs"]`.

    Returns:
        Dotted key -> value, as `accel.engine.config.to_dict` of a recipe has it.
    """
    fact = facts()["detection_runs"][run]
    (stream, stack), *extra = fact["streams"]
    values = {
        "detection.network": fact["network"],
        "detection.dataset": fact["dataset"],
        "detection.split": fact["split"],
        "detection.num_frames": fact["num_frames"],
        "detection.gap": fact["gap"],
        "detection.stream": stream,
        "detection.stack": stack,
        "detection.fusion": fact["fusion"],
        "detection.size": fact["size"],
        "detection.width": 64,
        "detection.levels": 6,
        "detection.prior_scale": 1.0,
        "detection.batch_norm": False,
        "detection.pixel_scale": 1.0,
        "detection.augmentation": "ssd",
        "detection.score_threshold": 0.001,
        "detection.change_cost": 5.0,
        "detection.linking": "frames",
        "optim.lr": fact["lr"],
        "optim.momentum": 0.9,
        "optim.nesterov": False,
        "optim.weight_decay": fact["weight_decay"],
        "optim.clip_norm": 0.0,
        "schedule.kind": "step",
        "schedule.iterations": fact["iterations"],
        "schedule.milestones": fact["milestones"],
        "schedule.warmup_epochs": 0,
        "train.global_batch": fact["total"],
        "train.max_steps": 0,
        "published.init": fact["init"],
        "published.inferred": fact.get("inferred", []),
    }
    for extra_stream, extra_stack in extra:
        values["detection.extra_stream"] = extra_stream
        values["detection.extra_stack"] = extra_stack
    return values


def detection_disagreements(recipe: Mapping[str, Mapping[str, Any]], run: str) -> Iterator[str]:
    """One sentence for every key of a recipe that differs from the facts about its run.

    Args:
        recipe: of `accel.engine.config.to_dict`.
        run: a name in `facts()["detection_runs"]`.
    """
    factors = facts()["detection_runs"][run]["factors"]
    yield from disagreements_with(recipe, expected_detection_values(run), factors)
