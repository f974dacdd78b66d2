"""The state of a run: what a checkpoint holds, and what must agree before a run continues."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import accel
from accel.engine import config as configs
from accel.engine.checkpoint import CheckpointStore
from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.metrics import Scores
from accel.engine.run import RunFolder
from accel.engine.task import Task
from accel.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Where a run stands; together with the recipe it determines everything that follows."""

    iteration: int = 0
    """Optimizer steps done."""
    evaluated: int = -1
    """`iteration` at the last completed evaluation, -1 if none."""
    wall_s: float = 0.0
    """Seconds spent so far, over all processes that worked on the run one after another."""


class RunState:
    """Everything of a run that a checkpoint holds.

    Args:
        task: its weights, momentum and loss scale.
        recipe, dataset, world: what they depend on.
    """

    def __init__(self, task: Task, recipe: Recipe, dataset: Any, world: World) -> None:
        self._task = task
        self._circumstances = circumstances(recipe, dataset, world) | {"decoders": task.decoders}
        self.counters = Counters()
        self.scores: Scores | None = None
        """Of the last evaluation."""
        self.best_top1 = -1.0
        """The best rating so far, by the task's `rating_name`."""

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        task = self._task
        return {
            "format": "accel-run-1",
            "accel_version": accel.__version__,
            "model": task.model.state_dict(),
            "momentum": task.optimizer.state_dict(),
            "scaler": task.step.precision.scaler.state_dict(),
            "counters": asdict(self.counters),
            "scores": asdict(self.scores) if self.scores is not None else None,
            **self._circumstances,
            "execution": task.step.execution,
            "best_top1": self.best_top1,
        }

    def restore(self, path: Path, stored: Mapping[str, Any], allow: Sequence[str]) -> None:
        """Continue from a verified checkpoint.

        Args:
            path: of the checkpoint, for messages.
            stored: what it holds.
            allow: keys that may differ.

        Raises:
            ConfigError: recipe, data or number of processes differ in a way that changes results.
            CheckpointError: the contents do not fit the network.
        """
        task, scaler = self._task, self._task.step.precision.scaler
        current = self.to_dict()
        check_unchanged(path, stored, current, allow)
        try:
            check_tensors(path, stored, current)
            task.model.load_state_dict(stored["model"])
            task.optimizer.load_state_dict(stored["momentum"])
            if scaler.is_enabled():
                scaler.load_state_dict(stored["scaler"])
            self.counters = Counters(**stored["counters"])
            scores = stored["scores"]
            self.scores = task.scores_type(**scores) if scores is not None else None
            self.best_top1 = stored["best_top1"]
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(path, f"does not fit this run: {error!r}.") from error
        logger.info("resuming %s at step %d", path, self.counters.iteration)


def circumstances(recipe: Recipe, dataset: Any, world: World) -> dict[str, Any]:
    """What a checkpoint holds of recipe, data and processes; plain data."""
    return {
        "recipe_name": recipe.name,
        "recipe": configs.to_dict(recipe),
        "data": dataset.fingerprints,
        "num_videos": dataset.num_videos,
        "class_names": list(dataset.class_names),
        "world_size": world.size,
    }


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


def check_agreement(
    world: World, recipe: Recipe, dataset: Any, *, checkpoint: str, code: Mapping[str, Any]
) -> None:
    """Refuse ranks that were started with other settings, files or code than rank 0.

    Args:
        world: this process among all.
        recipe, dataset: of this process.
        checkpoint: name of the file that it would continue from; "none".
        code: of `accel.engine.run.environment`.

    Raises:
        ConfigError: on all ranks, naming those that differ, and in what.
    """
    changing = {
        f"{section}.{key}": value
        for section, values in configs.to_dict(recipe).items()
        for key, value in values.items()
        if not configs.is_harmless(f"{section}.{key}")
    }
    videos = {f"the {split} list": digest for split, digest in dataset.fingerprints.items()}
    facts = {
        **changing,
        **videos,
        "the checkpoint to continue": checkpoint,
        "code": code["revision"] or accel.__version__,
        "torch": code["versions"]["torch"],
    }
    if differences := world.differences(facts):
        raise ConfigError(
            f"{differences}; start every process with the same command, files and code."
        )


def check_unchanged(
    path: Path, stored: Mapping[str, Any], current: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Compare everything of two states that results depend on, besides the tensors.

    Args:
        path: of the checkpoint, for the message.
        stored: the checkpoint's state.
        current: that of the run that would continue it, or its `circumstances`.
        allow: keys that may differ.

    Raises:
        ConfigError: with every difference and what to do.
        CheckpointError: something is missing in the checkpoint.
    """
    try:
        changed = configs.diff(stored["recipe"], current["recipe"])
        changes = {
            key: f"{key}: {old!r} -> {new!r}"
            for key, (old, new) in changed.items()
            if not configs.is_harmless(key)
        }
        if stored["data"] != current["data"]:
            changes["data"] = f"data: {_other_data(stored, current)}"
        for key in ("decoders", "world_size"):
            if key in current and stored[key] != current[key]:
                changes[key] = f"{key}: {stored[key]!r} -> {current[key]!r}"
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, f"does not fit this run: {error!r}.") from error
    changes = {key: text for key, text in changes.items() if key not in allow}
    if changes:
        back = " (put videos that are gone back)" if "data" in changes else ""
        raise ConfigError(
            f"resume from {path}: this run differs from the checkpoint in "
            f"{'; '.join(changes.values())}. Undo the change{back}, choose another --out, or pass "
            f"--resume-allow {','.join(changes)}."
        )


def _other_data(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """How the videos differ, as far as a checkpoint tells; older ones have no numbers."""
    counts = [
        f"{count['train']} for training and {count['val']} for validation {when}"
        for when, count in (("then", stored.get("num_videos")), ("now", current["num_videos"]))
        if count is not None
    ]
    text = f"other videos or labels than when the run began ({', '.join(counts)}"
    gone = [name for name in stored["class_names"] if name not in current["class_names"]]
    if gone:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        text += f"; without the classes {', '.join(map(repr, gone[:3]))}{more}"
    return f"{text})"


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
