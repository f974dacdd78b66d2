"""What `accel reproduce` would run and what it needs, known before any data is there."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.engine import config as configs
from accel.engine.config import Recipe
from accel.engine.published import Init, Row, dataset_of, facts, import_command
from accel.engine.recipe_check import recipes_of_runs
from accel.engine.reproduce import as_text, resolve
from pipelines.adapters import DATASETS

_WEIGHTS: dict[Init, str] = {
    "none": "none: starts from random ones",
    "imagenet": "torchvision's ResNet-50, resnet50-19c8e357.pth from download.pytorch.org/models",
    "kinetics400": "the same network trained on Kinetics-400 (by its recipe, or published)",
}


def outline(
    name: str, out: Path, *, overrides: Mapping[str, str] | None = None, scale: float = 1.0
) -> list[dict[str, Any]]:
    """The steps of a reproduction; opens no data.

    Args:
        name: a row, or a recipe that stands for a published run.
        out: folder of the reproduction.
        overrides: dotted key -> text, for every recipe.
        scale: share of the videos and of the epochs, in (0, 1].

    Returns:
        Per recipe: its name, the data, where that comes from, the commands that make the lists,
        train and test, and the weights to start from; those of a row also the ensemble.

    Raises:
        ConfigError: an unknown name, or settings that cannot be.
    """
    runs, rows = resolve(name)
    recipes = [configs.load_recipe(recipes_of_runs()[run], overrides) for run in runs]
    folders = [out / recipe.name for recipe in recipes]
    steps = []
    for run, recipe, folder in zip(runs, recipes, folders, strict=True):
        step: dict[str, Any] = {
            "recipe": recipe.name,
            **_data(run, recipe),
            "weights": _weights(recipe),
        }
        if scale < 1:
            step["scale"] = f"{scale:g}: as below, but with this share of the lists and epochs"
        options = [part for pair in (overrides or {}).items() for part in _option(*pair)]
        train = ["accel", "train", "--recipe", recipe.name, *options, "--out", str(folder)]
        step["train"] = shlex.join(train)
        step["test"] = [shlex.join(_test(row, folder)) for row in rows]
        if len(runs) > 1:
            members = [str(member) for member in folders]
            command = ["accel", "ensemble", *members, "--protocol", rows[0].protocol]
            step["ensemble"] = shlex.join(command)
        steps.append(step)
    return steps


def _data(run: str, recipe: Recipe) -> dict[str, str]:
    fact = facts()["datasets"][facts()["runs"][run]["dataset"]]
    known = DATASETS[dataset_of(fact["id"])[0]]
    counts = [
        f"{fact[f'{split}_videos'] or 'an unstated number of'} {title} videos"
        for split, title in (("train", "training"), ("val", "validation"))
    ]
    lists = import_command(fact["id"], recipe.data.root or "ROOT")
    return {
        "data": f"{known.title}: {known.classes} classes, {' and '.join(counts)}",
        "data_from": known.page,
        "data_root": recipe.data.root or "not given: --data.root ROOT",
        "lists": f"{lists} (FOLDER has {', '.join(known.files)})",
    }


def _weights(recipe: Recipe) -> str:
    if file := recipe.model.pretrained:
        return file if Path(file).is_file() else f"{file}, which is missing"
    init = recipe.published.init
    return _WEIGHTS[init] + ("" if init == "none" else "; not given: --model.pretrained FILE")


def _test(row: Row, folder: Path) -> Sequence[str]:
    options = [
        part for key, value in row.overrides.items() for part in _option(key, as_text(value))
    ]
    kept = ["--out", str(folder / row.name)] if options else []
    return ["accel", "evaluate", str(folder), "--protocol", row.protocol, *options, *kept]


def _option(key: str, value: str) -> tuple[str, str]:
    return f"--{key}", value


def outline_lines(steps: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """The outline for reading: a name and a value in each line."""
    return [
        f"{name:24}{value}"
        for step in steps
        for name, values in step.items()
        for value in (values if isinstance(values, list) else [values])
    ]
