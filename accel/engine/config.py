"""The recipe: typed sections, strict YAML files, command-line overrides, dump and diff.

A recipe is data: `Recipe.<section>.<key>`, two levels, values only. Each section's dataclass stands
with its owner; this module composes them, reads YAML strictly and lets jsonargparse check types and
apply overrides. It is the only module that imports jsonargparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from accel.engine.checkpoint import CheckpointConfig
from accel.engine.detection_config import DetectionConfig
from accel.engine.evaluate import TestConfig
from accel.engine.journal import LogConfig
from accel.engine.optim import OptimConfig
from accel.engine.precision import PrecisionConfig
from accel.engine.published import PublishedConfig
from accel.engine.run import RunConfig
from accel.engine.schedule import ScheduleConfig
from accel.engine.step import TrainConfig
from accel.errors import ConfigError
from accel.models.config import ModelConfig
from pipelines.config import (
    AugmentConfig,
    DataConfig,
    LoaderConfig,
    SamplingConfig,
    SamplingKind,
)

MAX_RECIPE_BYTES = 1_000_000
MAX_RECIPE_DEPTH = 32
DEFAULT_RECIPE = "demo_motion8"

# Keys that may differ between a checkpoint and the run that resumes it: where things are, how they
# are shown, when the run stops. Everything else is part of the mathematics.
HARMLESS_KEYS = frozenset(
    {
        "data.root",
        "data.cache_dir",
        "data.max_bad_fraction",
        "train.skip_nonfinite",
        "train.max_steps",
        "train.checkpoint_activations",
        "run.device",
        "run.fit_memory",
        "run.timeout_s",
        "run.threads",
        "test.protocols",
        "test.average",
        "test.full_resolution",
        "test.ensemble_with",
        "sampling.two_clips",
    }
)
HARMLESS_SECTIONS = frozenset({"loader", "checkpoint", "log", "published"})
WITHOUT_VALUE = {"run.fit_memory": "card"}  # what an option without a value means
_HELP = "accel train --help"
HARMFUL_KEYS = frozenset({"loader.decoder"})  # decoders differ by a few grey levels


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of one training run."""

    name: str = "unnamed"
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
    published: PublishedConfig = field(default_factory=PublishedConfig)


SECTIONS: dict[str, type] = {
    item.name: item.default_factory  # type: ignore[misc]  # the factories are the section classes
    for item in dataclasses.fields(Recipe)
    if item.name != "name"
}
KEYS = tuple(
    f"{section}.{item.name}"
    for section, cls in SECTIONS.items()
    for item in dataclasses.fields(cls)
)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, sorted."""
    folder = resources.files("accel") / "recipes"
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add `--<section>.<key>` for every key of the recipe to a jsonargparse parser."""
    for section, cls in SECTIONS.items():
        parser.add_class_arguments(cls, section)  # type: ignore[attr-defined]


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that raises instead of exiting and takes no abbreviations.

    Raises:
        ConfigError: jsonargparse is not installed. What needs no recipe file works without it.
    """
    try:
        import jsonargparse
    except ModuleNotFoundError as error:
        raise ConfigError(
            "recipes are read with jsonargparse, which is not installed; pip install jsonargparse."
        ) from error
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser: argparse.ArgumentParser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    return parser


@lru_cache(maxsize=1)
def _recipe_parser() -> argparse.ArgumentParser:
    """The parser of a recipe's values; building it takes longer than using it."""
    parser = make_parser("recipe", "")
    add_recipe_options(parser)
    return parser


def load_recipe(name_or_path: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe called `name_or_path` with overrides applied.

    Args:
        name_or_path: a name of `shipped_recipes()` or a path ending in .yaml or .yml.
        overrides: dotted key -> text as given on the command line; applied over the file.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest one), wrong type, impossible
            value.
    """
    origin, values = _read_with_base(name_or_path)
    return recipe_of(values, origin, name=Path(name_or_path).stem, overrides=overrides)


def recipe_of(
    values: Mapping[str, Any],
    origin: str,
    *,
    name: str,
    overrides: Mapping[str, str] | None = None,
) -> Recipe:
    """The recipe of plain data, e.g. of a checkpoint, with overrides applied.

    Args:
        values: section -> key -> value; what is missing has its default.
        origin: where they come from, for messages.
        name: of the recipe.
        overrides: as for `load_recipe`.

    Raises:
        ConfigError: unknown key, wrong type, impossible value.
    """
    for key in overrides or {}:
        if key not in KEYS:
            raise ConfigError(f"--{key}: unknown option. {_nearest_key(key)}")
    parser = _recipe_parser()
    try:
        config = parser.parse_object(dict(values))  # type: ignore[attr-defined]
    except (argparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{origin}: {_one_line(error)}") from error
    if overrides:
        argv = [f"--{key}={value}" for key, value in overrides.items()]
        try:
            config = parser.parse_args(argv, namespace=config)
        except (argparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"command line: {_one_line(error)}") from error
    sections: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        settings = dict(vars(config[section]))
        _reject_non_finite(origin, section, settings)
        try:
            sections[section] = cls(**settings)
        except (ValueError, TypeError) as error:
            text = _one_line(error)
            where = "command line" if text.split(":", 1)[0] in (overrides or {}) else origin
            raise ConfigError(f"{where}: {text}") from error
    recipe = Recipe(name=name, **sections)
    _check_across_sections(recipe)
    return recipe


def resolved_sampling(recipe: Recipe) -> SamplingConfig:
    """`recipe.sampling` with "auto" and 0 replaced by what `recipe.model` needs.

    Raises:
        ConfigError: the recipe names something else than its model needs.
    """
    length = recipe.model.frames_per_segment
    kind: SamplingKind = "segments"
    if length > 1:
        kind = "snippets" if recipe.model.variant == "snippet" else "neighbors"
    try:
        return recipe.sampling.resolved(kind, length)
    except ValueError as error:
        raise ConfigError(f"{error} model.name is {recipe.model.name}.") from error


def to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """All sections with all defaults filled, as plain data (tuples become lists)."""
    return {
        section: {
            item.name: _plain(getattr(getattr(recipe, section), item.name))
            for item in dataclasses.fields(cls)
        }
        for section, cls in SECTIONS.items()
    }


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML text; `load_recipe` of it gives the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, width=100)


def dump_marked(recipe: Recipe) -> str:
    """`dump`, with a comment behind every value that no source of a published run states."""
    lines, section = [], ""
    for line in dump(recipe).splitlines():
        key = line.partition(":")[0]
        if not line.startswith(" "):
            section = key
        inferred = f"{section}.{key.strip()}" in recipe.published.inferred
        lines.append(f"{line}  # inferred, not published" if inferred else line)
    return "\n".join(lines) + "\n"


def fingerprint(recipe: Recipe) -> str:
    """sha256 (hex) of the resolved recipe text."""
    return hashlib.sha256(dump(recipe).encode()).hexdigest()


def diff(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two recipe dictionaries: key -> (old, new)."""
    keys = {f"{s}.{k}" for tree in (old, new) for s, values in tree.items() for k in values}
    changed = {}
    for key in sorted(keys):
        section, name = key.split(".", 1)
        pair = (old.get(section, {}).get(name), new.get(section, {}).get(name))
        if pair[0] != pair[1]:
            changed[key] = pair
    return changed


def is_harmless(key: str) -> bool:
    """Whether a change of `key` leaves the mathematics of a run as it was."""
    if key in HARMFUL_KEYS:
        return False
    return key in HARMLESS_KEYS or key.split(".", 1)[0] in HARMLESS_SECTIONS


def read_yaml(path: Path, text: str | None = None) -> dict[str, Any]:
    """A YAML mapping read strictly: bounded size and depth, no duplicate keys, anchors or aliases.

    Raises:
        ConfigError: with file, and line where YAML gives one.
    """
    if text is None:
        try:
            size = path.stat().st_size
            if size > MAX_RECIPE_BYTES:
                raise ConfigError(
                    f"{path}: a recipe has at most {MAX_RECIPE_BYTES} bytes, got {size}."
                )
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such recipe. A shipped one is given by its name; accel recipes lists "
                "them."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}.") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not a recipe: {_one_line(problem)}") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not a recipe: {_one_line(error)}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, got {type(values).__name__}.")
    return values


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses what makes a recipe mean something else than it says."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed in a recipe", problem_mark=event.start_mark
            )
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_RECIPE_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_RECIPE_DEPTH} levels",
                problem_mark=event.start_mark,
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"expected a name, got {str(key_node.value)[:40]!r} as a key",
                    problem_mark=key_node.start_mark,
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} appears twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_with_base(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """File shown in messages, and the values of a recipe merged over those of its `extends`."""
    path = _find(name_or_path)
    values = read_yaml(path)
    base = values.pop("extends", None)
    _check_keys(path, values)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends: expected the name of a recipe, got {base!r}.")
        base_path = _find(base, beside=path)
        base_values = read_yaml(base_path)
        if "extends" in base_values:
            raise ConfigError(
                f"{path}: extends: {base} itself extends {base_values['extends']}; one level only."
            )
        _check_keys(base_path, base_values)
        values = {
            section: {**base_values.get(section, {}), **values.get(section, {})}
            for section in (*base_values, *(s for s in values if s not in base_values))
        }
    return str(path), values


def _find(name_or_path: str, beside: Path | None = None) -> Path:
    """Path of a shipped recipe or a YAML file; relative ones also beside the extending file."""
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
        if beside is not None and not path.is_absolute() and (beside.parent / path).exists():
            return beside.parent / path
        return path
    names = shipped_recipes()
    if name_or_path not in names:
        where = f"{beside}: extends" if beside is not None else "--recipe"
        raise ConfigError(
            f"{where}: unknown recipe {name_or_path!r}. "
            f"{nearest(name_or_path, names, 'accel recipes')} A path ends in .yaml."
        )
    return Path(str(resources.files("accel") / "recipes" / f"{name_or_path}.yaml"))


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    for section, settings in values.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"{path}: {section}: unknown section. {nearest(section, SECTIONS, _HELP)}"
            )
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: {section}: expected keys below it, got {settings!r}.")
        for key in settings:
            if f"{section}.{key}" not in KEYS:
                name = f"{section}.{key}"
                raise ConfigError(f"{path}: {name}: unknown key. {_nearest_key(name)}")


def nearest(name: str, known: Iterable[str], listed_by: str) -> str:
    """A sentence with the three of `known` that are most like `name`, and what lists them all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        *others, last = close
        listed = f"{', '.join(others)} or {last}" if others else last
        return f"Did you mean {listed}? {listed_by} lists all."
    with_it = [item for item in known if name in item]
    like = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    listed = ", ".join(list(dict.fromkeys([*with_it, *like]))[:3])
    return f"The closest are {listed}; {listed_by} lists all."


def _nearest_key(name: str) -> str:
    section, _, leaf = name.partition(".")
    initials = "".join(word[:1] for word in leaf.split("_"))  # learning_rate -> lr
    likely = [key for key in KEYS if key.endswith(f".{leaf}")]  # in another section
    likely += difflib.get_close_matches(name, KEYS, n=1, cutoff=0.6)
    likely += [key for key in KEYS if key == f"{section}.{initials}"]
    if likely:
        return f"Did you mean {likely[0]}?"
    own = [key for key in KEYS if key.startswith(f"{section}.")]
    return nearest(name, own or KEYS, _HELP)


def _reject_non_finite(origin: str, section: str, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(
                    f"{origin}: {section}.{key}: expected a finite number, got {number}."
                )


def _check_across_sections(recipe: Recipe) -> None:
    """Rules that need more than one section; all of them before any file or device is touched."""
    resolved_sampling(recipe)
    for key in recipe.published.inferred:
        if key not in KEYS:
            raise ConfigError(f"published.inferred: unknown key {key}. {_nearest_key(key)}")
    if recipe.detection.network != "none" and recipe.run.fit_memory:
        raise ConfigError("run.fit_memory: detectors are not measured; set train.micro_batch.")
    if recipe.detection.network != "none" and recipe.train.checkpoint_activations != "none":
        raise ConfigError(
            "train.checkpoint_activations: expected none with detection.network "
            f"{recipe.detection.network}, which has no residual blocks, got "
            f"{recipe.train.checkpoint_activations}."
        )
    if recipe.train.global_batch % recipe.train.micro_batch:
        raise ConfigError(
            f"train.global_batch: must be a multiple of train.micro_batch = "
            f"{recipe.train.micro_batch}, got {recipe.train.global_batch}."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _one_line(error: object) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r'^Parser key "([^"]+)": ', r"\1: ", text)
    text = text.replace("Expected a <class 'float'>", "expected a finite number")
    text = text.replace("Expected a <class 'int'>", "expected a whole number")
    text = text.replace("Expected a <class 'str'>", "expected text (put quotes around it in YAML)")
    text = text.replace("Expected a typing.Literal", "expected one of ")
    text = re.sub(r"\. Got value: (.*)$", r", got \1.", text)
    return text


def override_name(recipe_name: str, overrides: Mapping[str, str]) -> str:
    """Default folder name of a run: the recipe, then every override that changes the mathematics.

    `demo_motion8` with model.temporal none gives `demo_motion8-temporal=none`.
    """
    parts = [
        f"{key.split('.', 1)[1]}={re.sub(r'[^A-Za-z0-9.+-]+', '_', value)}"
        for key, value in overrides.items()
        if not is_harmless(key)
    ]
    name = "-".join([recipe_name, *parts])
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate `--section.key value` (or `=value`) from the other arguments.

    Returns:
        The remaining arguments, and dotted key -> text in the order given (later wins).

    Raises:
        ConfigError: an override without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        match = re.fullmatch(r"--([A-Za-z_]+\.[A-Za-z0-9_.-]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            rest.append(argument)
            continue
        key, value = match.group(1).replace("-", "_"), match.group(2)
        if value is None:
            last = position == len(argv)
            if key in WITHOUT_VALUE and (last or argv[position].startswith("--")):
                value = WITHOUT_VALUE[key]
            elif last:
                raise ConfigError(f"--{key}: expected a value after it.")
            else:
                value = argv[position]
                position += 1
        overrides.pop(key, None)
        overrides[key] = value
    return rest, overrides
