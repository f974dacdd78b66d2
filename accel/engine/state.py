"""What a checkpoint of a run must agree with before the run continues from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from accel.engine import config as configs
from accel.engine.checkpoint import CheckpointStore
from accel.engine.config import Recipe
from accel.engine.run import RunFolder
from accel.errors import CheckpointError, ConfigError


@dataclass
class Counters:
    """Where a run stands; together with the recipe it determines everything that follows."""

    iteration: int = 0
    """Optimizer steps done."""
    evaluated: int = -1
    """`iteration` at the last completed evaluation, -1 if none."""
    wall_s: float = 0.0
    """Seconds spent so far, over all processes that worked on the run one after another."""


def decoders_of(state: Mapping[str, Any] | None) -> tuple[str, str]:
    """Who decoded and scaled the training and the validation videos of a checkpoint's run
    (`pipelines.loader.Loader.backend`); "" where nothing says so."""
    train, val = state.get("decoders", ("", "")) if state is not None else ("", "")
    return train, val


def find_checkpoint(
    resume: str, folder: RunFolder, store: CheckpointStore, recipe: Recipe
) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint to continue from, or None for a fresh start.

    Args:
        resume: "auto", "none" or a path, as the Trainer takes it.
        folder: of the run.
        store: its checkpoints.
        recipe: of the run that is about to start.

    Raises:
        ConfigError: the folder holds something that a fresh start would overwrite.
        CheckpointError: the checkpoint cannot be used.
    """
    holds_run = folder.journal.exists() or bool(store.entries())
    if resume == "auto":
        found = store.load_latest()
        if found is None:
            _check_fresh_start(folder, recipe)
        return found
    if resume == "none":
        if holds_run:
            raise ConfigError(
                f"--out {folder.path}: already holds a run; continue it with --resume auto, or "
                "choose another folder."
            )
        _check_fresh_start(folder, recipe)
        return None
    path = Path(resume).resolve()
    if not path.is_file():
        raise ConfigError(
            f"--resume {resume}: no such checkpoint; give auto, none or a checkpoint's path."
        )
    if path.parent == store.folder.resolve():
        return path, store.load(store.folder / path.name)
    if holds_run:
        raise ConfigError(
            f"--out {folder.path}: already holds a run, and --resume {resume} belongs to another "
            "one; choose a fresh folder."
        )
    return path, CheckpointStore(path.parent).load(path)


def _check_fresh_start(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse to overwrite what a folder without checkpoints still holds.

    A run that was killed before its first checkpoint starts again under the same recipe.
    """
    stored = folder.path / "recipe.yaml"
    if folder.summary.exists():
        raise ConfigError(
            f"--out {folder.path}: holds the results of a run without its checkpoints; choose "
            "another folder."
        )
    if stored.exists():
        changed = configs.diff(configs.read_yaml(stored), configs.to_dict(recipe))
        if any(not configs.is_harmless(key) for key in changed):
            raise ConfigError(
                f"--out {folder.path}: its recipe.yaml belongs to another run; choose another "
                "folder."
            )


def check_unchanged(
    path: Path, stored: Mapping[str, Any], current: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Compare everything of two states that results depend on, besides the tensors.

    Args:
        path: of the checkpoint, for the message.
        stored: the checkpoint's state.
        current: the state of the run that would continue it; has at least the same keys.
        allow: keys that may differ.

    Raises:
        ConfigError: with every difference and what to do.
    """
    changes = {
        key: pair
        for key, pair in configs.diff(stored["recipe"], current["recipe"]).items()
        if not configs.is_harmless(key)
    }
    if stored["data"] != current["data"]:
        changes["data"] = ("the checkpoint's videos and labels", "others")
    for key in ("decoders", "world_size"):
        if stored[key] != current[key]:
            changes[key] = (stored[key], current[key])
    changes = {key: pair for key, pair in changes.items() if key not in allow}
    if changes:
        listed = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
        raise ConfigError(
            f"resume from {path}: this run differs from the checkpoint in {listed}. Undo the "
            f"change, choose another --out, or pass --resume-allow {','.join(changes)}."
        )


def check_tensors(path: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes of weights and momentum.

    Raises:
        CheckpointError: with every difference.
    """
    problems = []
    for part in ("model", "momentum"):
        for name in sorted(current[part].keys() | stored[part].keys()):
            mine, other = (_kind(state[part].get(name)) for state in (current, stored))
            if mine != other:
                problems.append(f"{part}.{name}: expected {mine}, got {other}")
    if problems:
        raise CheckpointError(path, f"does not fit this run: {'; '.join(problems)}.")


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
