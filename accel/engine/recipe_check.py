"""Every published row resolves to a recipe and a protocol, and their values are the published."""

import dataclasses
from collections.abc import Iterator
from functools import lru_cache

from accel.engine.config import (
    Recipe,
    load_recipe,
    resolved_sampling,
    shipped_recipes,
    to_dict,
)
from accel.engine.evaluate import protocol_views
from accel.engine.published import (
    Row,
    disagreements,
    facts,
    protocol_disagreements,
    published_rows,
)
from accel.engine.published_detection import detection_disagreements, detection_rows
from accel.errors import ConfigError

_shipped = lru_cache(maxsize=None)(load_recipe)


@lru_cache(maxsize=1)
def recipes_of_runs() -> dict[str, str]:
    """Published run -> name of the shipped recipe that stands for it.

    Raises:
        ConfigError: two recipes stand for one run, or a recipe for none that is known.
    """
    found: dict[str, str] = {}
    for name in shipped_recipes():
        run = _shipped(name).published.run
        if not run or run in facts()["detection_runs"]:
            continue
        if run not in facts()["runs"]:
            raise ConfigError(f"{name}: published.run: no published run is called {run!r}.")
        if run in found:
            raise ConfigError(f"{name}: published.run: {found[run]} stands for {run!r} already.")
        found[run] = name
    return found


@lru_cache(maxsize=1)
def recipes_of_detection_runs() -> dict[str, str]:
    """Published run of a detector -> name of the shipped recipe that stands for it."""
    shipped = {name: _shipped(name).published.run for name in shipped_recipes()}
    return {run: name for name, run in shipped.items() if run in facts()["detection_runs"]}


def resolve_row(row: Row) -> list[Recipe]:
    """The recipes behind a row, with its overrides: one, or the members of an ensemble.

    Raises:
        ConfigError: a run of the row has no recipe.
    """
    recipes = []
    for run in row.runs:
        if run not in recipes_of_runs():
            raise ConfigError(f"row {row.name}: no shipped recipe stands for the run {run!r}.")
        overrides = {key: _text(value) for key, value in row.overrides.items()}
        name = recipes_of_runs()[run]
        recipes.append(load_recipe(name, overrides) if overrides else _shipped(name))
    return recipes


def check_recipes() -> Iterator[str]:
    """One sentence for every value that differs from the facts, and for what is missing."""
    for run in facts()["runs"]:
        if run not in recipes_of_runs():
            yield f"run {run}: no recipe stands for it"
    for run, name in recipes_of_runs().items():
        for problem in disagreements(_resolved(_shipped(name)), run):
            yield f"{name}: {problem}"
    for run in facts()["detection_runs"]:
        if run not in recipes_of_detection_runs():
            yield f"run {run}: no recipe stands for it"
    for run, name in recipes_of_detection_runs().items():
        for problem in detection_disagreements(to_dict(_shipped(name)), run):
            yield f"{name}: {problem}"
    for detection_row in detection_rows():
        for run in detection_row.runs:
            if run not in recipes_of_detection_runs():
                yield f"row {detection_row.name}: no recipe stands for the run {run}"
    for row in published_rows():
        members = resolve_row(row)
        for recipe in members:
            size = protocol_views(row.protocol, recipe.test, recipe.augment).size
            for problem in protocol_disagreements(_resolved(recipe), row.name, size):
                yield f"{recipe.name}, row {row.name}: {problem}"
        if len(members) > 1:
            others = {recipe.name for recipe in members} - {members[-1].name}
            if {members[-1].test.ensemble_with} != others:
                yield f"{members[-1].name}, row {row.name}: test.ensemble_with is not {others}"


def _resolved(recipe: Recipe) -> dict[str, dict[str, object]]:
    return to_dict(dataclasses.replace(recipe, sampling=resolved_sampling(recipe)))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
