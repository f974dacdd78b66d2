"""Tests of a trained network with several views: from a checkpoint to stored scores."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.engine import config as configs
from accel.engine.checkpoint import CheckpointStore, load_verified, write_atomically
from accel.engine.config import Recipe
from accel.engine.data import open_loader, open_shared_dataset
from accel.engine.distributed import World
from accel.engine.evaluate import evaluate_views, protocol_views
from accel.engine.precision import Precision
from accel.engine.run import RunFolder, resolve_device
from accel.engine.scores import ScoreFacts, StoredScores
from accel.engine.seeding import set_deterministic
from accel.engine.state import decoders_of
from accel.engine.timing import Ranges
from accel.errors import CheckpointError, ConfigError, DivergedError
from accel.models import build_model
from accel.models.network import ClipNetwork
from accel.models.weights import import_weights, load_foreign
from pipelines.config import TestViews
from pipelines.datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What is tested."""

    weights: Path
    recipe: Recipe
    state: dict[str, Any] | None
    """The checkpoint of a run; None for published weights."""
    out: Path
    """Folder that gets `scores/`."""

    @property
    def decoder(self) -> str:
        """Who decoded and scaled the validation videos of the run; "" where nothing says so."""
        return decoders_of(self.state)[1]


def find_target(
    target: str, *, recipe: str = "", out: str = "", overrides: Mapping[str, str] | None = None
) -> Target:
    """The weights and settings that a command line names.

    Args:
        target: a run folder (its best checkpoint), a checkpoint of a run, or a file of published
            weights.
        recipe: name or path; "" = the one stored with the run. Needed for published weights.
        out: folder for the scores; "" = the run's, else runs/<file>-evaluation.
        overrides: dotted key -> text.

    Raises:
        ConfigError, CheckpointError: nothing usable there.
    """
    path = Path(target)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint of a run, or a "
            "file of published weights."
        )
    if path.is_dir():
        folder = RunFolder(path)
        store = CheckpointStore(folder.checkpoints)
        entries = store.entries()
        if not entries:
            raise ConfigError(f"{path}: holds no checkpoint; expected a run folder with some.")
        path = store.best() or store.folder / entries[-1].name
        state: dict[str, Any] | None = store.load(path)
    else:
        found = load_foreign(path)
        own = isinstance(found, dict) and found.get("format") == "accel-run-1"
        entry = None
        if own:
            entries = CheckpointStore(path.parent).entries()
            entry = next((e for e in entries if e.name == path.name), None)
        state = load_verified(path, entry) if own else None
    if recipe:
        settings = configs.load_recipe(recipe, overrides)
    elif state is not None:
        settings = configs.recipe_of(
            state["recipe"], str(path), name=state["recipe_name"], overrides=overrides
        )
    else:
        raise ConfigError(f"{path}: published weights need --recipe NAME, which says how to test.")
    if settings.detection.network != "none":
        raise ConfigError(f"{path}: is a detector; use: accel tubes {path} --root FOLDER")
    in_run = path.parent.name == "checkpoints"
    folder_out = path.parent.parent if in_run else Path("runs") / f"{path.stem}-evaluation"
    return Target(path, settings, state, Path(out) if out else folder_out)


def evaluate_protocols(
    target: Target, protocols: Sequence[str], *, world: World | None = None
) -> list[dict[str, Any]]:
    """Test under each protocol; writes `scores/<protocol>.npz` and `.json` (on rank 0).

    Args:
        target: of `find_target`.
        protocols: clips x crops, e.g. ["1x1", "2x3"]; empty = those of the recipe.
        world: this process among all.

    Returns:
        One report per protocol: metrics, definitions, views, seconds; the same on all processes.

    Raises:
        ConfigError: a protocol that this sampling does not have, or other classes than trained.
        CheckpointError: weights that do not fit.
        DivergedError: scores that are not finite; none are written.
        pipelines.errors.DataError: unusable videos.
    """
    world = world or World()
    recipe = target.recipe
    device = resolve_device(recipe.run.device, world.local_rank)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    set_deterministic(recipe.run.deterministic)
    try:
        views = {
            name: protocol_views(name, recipe.test, recipe.augment)
            for name in protocols or recipe.test.protocols
        }
    except ValueError as error:
        raise ConfigError(str(error)) from error
    dataset = open_shared_dataset(recipe, world)
    model = _load_model(target, dataset).to(device).eval()
    digest = _fingerprint(model.state_dict())
    reports = []
    for name, wanted in views.items():
        start = time.perf_counter()
        try:
            values, facts_of_loader = _score(model, target, dataset, wanted, device, world)
        except RuntimeError as error:
            if lost := world.explain(error):
                raise lost from error
            raise
        facts = ScoreFacts(
            recipe=recipe.name,
            weights=digest,
            videos=dataset.fingerprints["val"],
            average=recipe.test.average,
            protocols=(name,),
            num_views=wanted.num_clips * wanted.num_crops,
        )
        labels = torch.from_numpy(dataset.val.labels).long()
        scores = StoredScores(values, labels, facts)
        report = {
            "protocol": name,
            **scores.metrics(),
            **asdict(facts),
            "crop_size": wanted.size,
            "checkpoint": str(target.weights),
            **facts_of_loader,
            "wall_s": round(time.perf_counter() - start, 3),
        }
        if world.is_main:
            folder = target.out / "scores"
            scores.save(folder / f"{name}.npz")
            write_atomically(folder / f"{name}.json", json.dumps(report, indent=1).encode())
        reports.append(report)
    if world.is_main:
        _compare_decoders(target, [report["decoder"] for report in reports])
    return reports


def _score(
    model: ClipNetwork,
    target: Target,
    dataset: Dataset,
    views: TestViews,
    device: torch.device,
    world: World,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores of all validation videos, [N, K], who decoded them, and which could not be read."""
    recipe = target.recipe
    precision = Precision(
        recipe.precision,
        device,
        mean=recipe.data.mean,
        std=recipe.data.std,
        frames_per_segment=recipe.model.frames_per_segment,
    )
    chunk = recipe.test.batch or recipe.train.micro_batch
    ranges = Ranges()
    loader = open_loader(
        recipe,
        dataset,
        "val",
        micro_batch=max(1, chunk // (views.num_clips * views.num_crops)),
        world=world,
        device=device,
        ranges=ranges,
        views=views,
        trained_with=target.decoder,
    )
    if world.is_main:
        logger.info("val: %s", loader.description)
    try:
        values, read = evaluate_views(
            model,
            loader,
            num_videos=len(dataset.val),
            num_classes=dataset.num_classes,
            average=recipe.test.average,
            chunk=chunk,
            precision=precision,
            world=world,
            ranges=ranges,
        )
    finally:
        loader.close()
    quarantine = loader.quarantine
    missing = (~read).nonzero().flatten().tolist()
    quarantine.add_all((k, "could not be read by another process") for k in missing)
    odd = (read & ~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if odd:
        raise DivergedError(
            f"{target.weights}: the network gives scores that are not finite for {len(odd)} of "
            f"{len(values)} videos, the first is {dataset.val[odd[0]].path}: it diverged, "
            f"or {recipe.precision.mode} overflows (--precision.mode fp32 tells)."
        )
    return values, {
        "loader": loader.description,
        "decoder": loader.backend,
        "unusable": quarantine.summary(),
    }


def _compare_decoders(target: Target, used: Sequence[str]) -> None:
    """Warn of scores that another decoder than that of the run may have changed, unless asked."""
    trained = target.decoder
    other = next((decoder for decoder in used if decoder != trained), trained)
    asked = target.recipe.loader.decoder not in ("auto", trained.split(",")[0])
    if trained and other != trained and not asked:
        logger.warning(
            "%s: in training, %r decoded the validation videos; that is not possible here, "
            "where %r does: scores may differ a little.",
            *(target.weights, trained, other),
        )


def _load_model(target: Target, dataset: Dataset) -> ClipNetwork:
    recipe, state = target.recipe, target.state
    if state is not None:
        _check_classes(target.weights, list(state["class_names"]), dataset)
        if state["data"].get("val") != dataset.fingerprints["val"]:
            then = state.get("num_videos", {}).get("val")  # older checkpoints do not say
            logger.warning(
                "%s: these are not the validation videos of its training (%d now%s): the results "
                "do not compare with those of the run.",
                *(target.weights, len(dataset.val), f", {then} then" if then is not None else ""),
            )
    model = build_model(
        **asdict(replace(recipe.model, pretrained="")),
        num_classes=dataset.num_classes,
        num_segments=recipe.sampling.num_segments,
    )
    if state is None:
        report = import_weights(model, target.weights)
        if report.kept:
            raise CheckpointError(
                target.weights,
                f"has no classifier ({len(report.kept)} tensors stay random, the first is "
                f"{report.kept[0]}); expected the weights of a trained network.",
            )
        return model
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise CheckpointError(target.weights, f"does not fit the recipe: {problem}") from error
    return model


def _check_classes(path: Path, trained: list[str], dataset: Dataset) -> None:
    names = list(dataset.class_names)
    if len(trained) != len(names):
        raise ConfigError(
            f"{path}: was trained with {len(trained)} classes, the data has {len(names)}; give the "
            "data of the same classes."
        )
    numbered = [str(label) for label in range(len(names))]
    other = next((k for k in range(len(names)) if trained[k] != names[k]), None)
    if other is not None and numbered not in (trained, names):
        raise ConfigError(
            f"{path}: was trained with class {other} = {trained[other]!r}, in the data it is "
            f"{names[other]!r}: another numbering of the labels."
        )


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
