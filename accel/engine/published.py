"""Published rows: what the papers' repositories report, and whether the recipes agree with it."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import yaml

Init = Literal[
    "none",
    "imagenet",
    "kinetics400",
    "vgg16_reducedfc",
    "ssd300_brox",
    "road_ssd300",
    "amtnet_streams",
]


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """Which published run a recipe stands for; changes nothing in a run."""

    run: str = ""
    """Name of the run in `accel/recipes/facts/published.yaml`; "" = the recipe's own."""
    init: Init = "none"
    """Weights that the published run starts from, for `model.pretrained`: "imagenet" (torchvision
    ResNet-50, resnet50-19c8e357) or "kinetics400" (a run of the same system on Kinetics-400). Of a
    detector, for `detection.start_base` (and `start_extra`): "vgg16_reducedfc" (ImageNet, last
    layers as convolutions), "ssd300_brox" (ROAD's network of the brox stream), "road_ssd300"
    (ROAD's of the same stream), "amtnet_streams" (AMTNet's of each stream)."""
    inferred: tuple[str, ...] = ()
    """Keys of the recipe whose value no source states; `--print-config` marks them."""


@dataclass(frozen=True)
class Row:
    """One row of a published table of results."""

    name: str
    runs: tuple[str, ...]
    """One run, or the members of an ensemble."""
    protocol: str
    """Clips x crops, e.g. "2x3"."""
    published: dict[str, float]
    """Percent: `top1`, `top5`, `mean_class` as far as stated; `logged_*` from logs."""
    overrides: dict[str, Any]
    """Recipe keys that this row's test sets differently."""


@lru_cache(maxsize=1)
def facts() -> dict[str, dict[str, dict[str, Any]]]:
    """The facts file: `datasets`, `protocols`, `runs`, `rows`, `extra_rows`, `detection_runs` and
    `detection_rows` by their names."""
    path = resources.files("accel") / "recipes" / "facts" / "published.yaml"
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        kind: {entry.get("id") or entry["row"]: entry for entry in entries}
        for kind, entries in stored.items()
    }


def published_rows() -> list[Row]:
    """All rows: those of the papers' repositories, then those of the authors' model zoos."""
    rows = []
    for entry in (*facts()["rows"].values(), *facts()["extra_rows"].values()):
        test = facts()["protocols"][entry["protocol"]]
        known = {"row", "runs", "protocol", "overrides"}
        rows.append(
            Row(
                name=entry["row"],
                runs=tuple(entry["runs"]),
                protocol=f"{test['clips']}x{test['crops']}",
                published={key: value for key, value in entry.items() if key not in known},
                overrides=entry.get("overrides", {}),
            )
        )
    return rows


# What the facts call it -> what a recipe calls it.
_MODELS = {
    "TANet": "tanet",
    "MSN": "msn",
    "TDN": "tdn",
    "MAS-Net": "masnet",
    "AMS-Net": "amsnet",
}
_GROUPS = {
    "pg_tsm_fc_lr5": "tanet_mmaction2",
    "pg_tam_author": "tanet_original",
    "pg_mas": "masnet_original",
    "pg_msn": "msn_original",
    "pg_tdn": "tdn_original",
    "pg_uniform": "amsnet_original",
    "pg_ams_gym": "amsnet_gym",
}
# Sampling -> (kind, frames per segment, frame interval, short videos, variant of the model).
_SAMPLING = {
    "seg_tsm": ("segments", 1, 1, "first_frame", "2d"),
    "seg_mmaction": ("segments", 1, 1, "spread", "2d"),
    "dense_mmaction": ("dense", 1, 1, "first_frame", "2d"),
    "dense_tam": ("dense", 1, 1, "first_frame", "2d"),
    "seg_tdn": ("neighbors", 5, 1, "first_frame", "2d"),
    "snippet_ams": ("snippets", 3, 1, "spread", "snippet"),
    "clip_8x8": ("clip", 1, 8, "spread", "slowonly"),
    "clip_16x4": ("clip", 1, 4, "spread", "slowonly"),
}
_TSM = {"crop": "multiscale", "train_resize": 0, "convention": "tsm", "antialias": True}
_MMACTION = {**_TSM, "train_resize": 256, "convention": "mmaction", "antialias": False}
_ALPHABETICAL = ["86-87", "93-94", "166-167"]
_AUGMENTATION: dict[str, dict[str, Any]] = {
    "tsm_msc_flip": _TSM,
    "tsm_msc_flip_sth": {**_TSM, "flip_label_pairs": _ALPHABETICAL},
    "tsm_msc_noflip": {**_TSM, "flip": False},
    "mma_msc_flip": _MMACTION,
    "mma_msc_flip_sthv1": {**_MMACTION, "flip_label_pairs": ["2-4", "30-41", "52-66"]},
    "ams_rrc_flip_jitter": {
        "crop": "random_resized",
        "train_resize": 0,
        "crop_area": [0.08, 1.0],
        "crop_aspect": [0.75, 4 / 3],
        "convention": "mmaction",
        "antialias": False,
        "color_jitter": "amsnet",
    },
}
_EVERY_AUGMENTATION = {
    "size": 224,
    "resize": 256,
    "scales": [1.0, 0.875, 0.75, 0.66],
    "flip": True,
    "flip_label_pairs": [],
    "color_jitter": "none",
}
# Rule of the test clips -> kinds of sampling that follow it with these clips.
_RULES = {
    "middles": ("segments", "neighbors"),
    "twice": ("segments",),
    "shifted": ("segments",),
    "dense": ("dense",),
    "clips": ("clip",),
    "snippets": ("snippets",),
    "random": ("neighbors",),
}


def dataset_of(fact: str) -> tuple[str, str]:
    """(name for `accel data import`, numbering of the labels) of a dataset of the facts."""
    if fact == "sthv1_mmaction2":
        return "sthv1", "official"
    return ("k400" if fact.startswith("k400") else fact), "alphabetical"


def import_command(fact: str, media: str) -> str:
    """The command that makes the lists of a dataset of the facts.

    Args:
        fact: name of the dataset.
        media: folder of its videos.
    """
    name, numbering = dataset_of(fact)
    command = ["accel", "data", "import", name, "--annotations", "FOLDER", "--media", media]
    if numbering != "alphabetical":
        command += ["--numbering", numbering]
    return shlex.join(command)


def expected_values(run: str) -> dict[str, Any]:
    """What the facts say about the keys of the recipe that stands for a run.

    Args:
        run: a name in `facts()["runs"]`.

    Returns:
        Dotted key -> value, as `accel.engine.config.to_dict` of a resolved recipe has it.
    """
    fact = facts()["runs"][run]
    kind, length, interval, short_videos, variant = _SAMPLING[fact["sampling"]]
    augment = {**_EVERY_AUGMENTATION, **_AUGMENTATION[fact["augmentation"]]}
    dataset = facts()["datasets"][fact["dataset"]]
    return {
        "data.num_classes": dataset["classes"],
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
        "sampling.num_segments": fact["frames"],
        "sampling.kind": kind,
        "sampling.frames_per_segment": length,
        "sampling.frame_interval": interval,
        "sampling.short_videos": short_videos,
        **{f"augment.{key}": value for key, value in augment.items()},
        "model.name": _MODELS[fact["system"]],
        "model.variant": variant,
        "model.depth": 50,
        "model.width": 64,
        "model.stages": 4,
        "model.faithful": True,
        "model.partial_bn": False,
        "model.dropout": fact["dropout"],
        "train.sync_bn": fact["sync_bn"],
        "optim.lr": fact["lr"],
        "optim.momentum": 0.9,
        "optim.nesterov": fact["nesterov"],
        "optim.weight_decay": fact["weight_decay"],
        "optim.clip_norm": fact["clip_norm"],
        "optim.groups": _GROUPS[fact["param_groups"]],
        "optim.fc_lr5": True,
        "schedule.kind": "step",
        "schedule.epochs": fact["epochs"],
        "schedule.milestones": fact["milestones"],
        "schedule.warmup_epochs": 0,
        "train.global_batch": fact["total"],
        "train.micro_batch": fact["per_gpu"],
        "train.max_steps": 0,
        "test.every_epochs": fact["validate_every"],
        "run.seed": 0,
        "published.init": fact["init"],
        "published.inferred": fact.get("inferred", []),
    }


def disagreements(recipe: Mapping[str, Mapping[str, Any]], run: str) -> Iterator[str]:
    """One sentence for every key of a resolved recipe that differs from the facts about its run.

    Args:
        recipe: of `accel.engine.config.to_dict`, with `sampling` as its model needs it.
        run: a name in `facts()["runs"]`.
    """
    factors = facts()["runs"][run]["factors"]
    yield from disagreements_with(recipe, expected_values(run), factors)


def disagreements_with(
    recipe: Mapping[str, Mapping[str, Any]],
    expected_values: Mapping[str, Any],
    factors: list[float],
) -> Iterator[str]:
    """One sentence for every key of a recipe that differs from these values, or their factors.

    Args:
        recipe: of `accel.engine.config.to_dict`.
        expected_values: dotted key -> value.
        factors: on the rate, from each milestone on.
    """
    for key, expected in expected_values.items():
        section, name = key.split(".")
        value = recipe[section][name]
        if not _equal(value, expected):
            yield f"{key} is {value!r}, published is {expected!r}"
    schedule = recipe["schedule"]
    found = schedule["factors"] or [
        schedule["gamma"] ** (k + 1) for k in range(len(schedule["milestones"]))
    ]
    if not _equal(list(found), factors):
        yield f"schedule.factors come to {found}, published are {factors}"


def protocol_disagreements(
    recipe: Mapping[str, Mapping[str, Any]], row: str, crop_size: int
) -> Iterator[str]:
    """As `disagreements`, for the test protocol behind a row.

    Args:
        recipe: as for `disagreements`, with the row's overrides.
        row: a name in `facts()["rows"]` or `facts()["extra_rows"]`.
        crop_size: side of the squares that the recipe's protocol of that name cuts, px.
    """
    entry = facts()["rows"].get(row) or facts()["extra_rows"][row]
    test = facts()["protocols"][entry["protocol"]]
    name = f"{test['clips']}x{test['crops']}"
    if name not in recipe["test"]["protocols"]:
        yield f"test.protocols lacks {name}"
    clips = "middles" if test["clips"] == 1 else recipe["sampling"]["two_clips"]
    if test["rule"] in ("middles", "twice", "shifted") and test["clips"] <= 2:
        if test["rule"] != clips:
            yield f"sampling.two_clips is {clips!r}, published is {test['rule']!r}"
    pairs = {
        "test.average": (recipe["test"]["average"], test["average"]),
        "augment.antialias": (recipe["augment"]["antialias"], test["filter"] == "pil"),
        "augment.resize": (recipe["augment"]["resize"], test["resize"]),
        "side of the crops": (crop_size, test["size"]),
        "sampling.kind": (recipe["sampling"]["kind"] in _RULES[test["rule"]], True),
    }
    for key, (value, expected) in pairs.items():
        if value != expected:
            yield f"{key} is {value!r}, published is {expected!r}"


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return abs(value - expected) <= 1e-9 * abs(expected)
    return bool(value == expected)
