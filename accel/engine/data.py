"""Datasets and loaders of a recipe, opened by all processes of a run."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.engine.config import Recipe, resolved_sampling
from accel.engine.distributed import World
from accel.engine.published import dataset_of, facts, import_command
from accel.engine.timing import Ranges
from accel.errors import ConfigError
from pipelines.adapters import DATASETS
from pipelines.config import TestViews, label_pairs
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import DataError
from pipelines.loader import Loader, build_loader
from pipelines.order import Split
from pipelines.quarantine import Quarantine

logger = logging.getLogger(__name__)


def open_shared_dataset(recipe: Recipe, world: World) -> Dataset:
    """The videos of both splits; rank 0 first, so that a generated set is written once.

    Raises:
        ConfigError: neither a folder nor lists are configured.
        pipelines.errors.DataError: a list, or the folder, that cannot be used.
    """
    _check_published_lists(recipe)
    if not world.is_main:
        world.barrier()
    try:
        dataset = open_dataset(recipe.data, progress=world.is_main)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if world.is_main:
        world.barrier()
    return dataset


def _check_published_lists(recipe: Recipe) -> None:
    """Say where the lists of a published set come from, if they are not there."""
    data, run = recipe.data, facts()["runs"].get(recipe.published.run)
    root = Path(data.root).expanduser()
    if run is None or not root.is_dir():
        return
    lists = (data.train_list, data.val_list, data.classes_file)
    missing = [name for name in lists if name and not (root / name).is_file()]
    if not missing:
        return
    fact = facts()["datasets"][run["dataset"]]["id"]
    title = DATASETS[dataset_of(fact)[0]].title
    if not data.root:
        raise ConfigError(
            f"data.root: expected the folder of {title}, got ''; pass --data.root ROOT (its lists "
            f"are made by: {import_command(fact, 'ROOT')})."
        )
    raise DataError(
        f"{root}: lacks {', '.join(missing)}; the lists of {title} are made by: "
        f"{import_command(fact, str(root))}."
    )


def warn_of_classes(dataset: Any) -> None:
    """Warn of classes that no training video shows: a slip in a list, or another numbering.

    Args:
        dataset: of `Task.open_dataset`; sets of tubes are left alone.
    """
    if not isinstance(dataset, Dataset):
        return
    trained, validated = (
        np.bincount(videos.labels, minlength=dataset.num_classes) > 0
        for videos in (dataset.train, dataset.val)
    )
    if not trained.all():
        logger.warning(
            "%s of %d classes without a training video, %s: is that meant?",
            *(int((~trained).sum()), dataset.num_classes, _classes(~trained, dataset)),
        )
    if (validated & ~trained).any():
        untrained = int((~trained)[dataset.val.labels].sum())
        logger.warning(
            "%d of %d validation videos are of classes that never occur in training, %s: "
            "a network cannot have learned them.",
            *(untrained, len(dataset.val), _classes(validated & ~trained, dataset)),
        )


def _classes(chosen: np.ndarray, dataset: Dataset) -> str:
    """The first three of the chosen classes by name."""
    names = [repr(dataset.class_names[label]) for label in np.flatnonzero(chosen)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_loader(
    recipe: Recipe,
    dataset: Dataset,
    split: Split,
    *,
    micro_batch: int,
    world: World,
    device: torch.device,
    ranges: Ranges,
    views: TestViews | None = None,
    quarantine: Path | None = None,
    trained_with: str = "",
) -> Loader:
    """The loader of a split as the recipe says; in training, flips are checked by class names.

    Args:
        micro_batch: videos per batch of this process.
        views: of every video of "val"; None = the one center view.
        quarantine: file of the run that lists unusable videos; None = no file.
        trained_with: see `build_loader`.

    Raises:
        ConfigError: settings that do not fit each other.
        pipelines.errors.DataError: more unusable videos than are tolerated.
    """
    if split == "train" and recipe.published.run:
        check_flipped_names(dataset.class_names, recipe.augment.flip_label_pairs)
    try:
        return build_loader(
            dataset,
            split=split,
            sampling=resolved_sampling(recipe),
            augment=recipe.augment,
            loader=recipe.loader,
            seed=recipe.run.seed,
            micro_batch=micro_batch,
            global_batch=recipe.train.global_batch,
            rank=world.rank,
            world_size=world.size,
            device=device,
            ranges=ranges,
            views=views,
            quarantine=Quarantine(
                dataset.train if split == "train" else dataset.val,
                split=split,
                max_bad_fraction=recipe.data.max_bad_fraction,
                path=quarantine,
            ),
            trained_with=trained_with,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_flipped_names(names: Sequence[str], pairs: Sequence[str]) -> None:
    """Labels that a flip exchanges must be classes that differ in left and right alone.

    Raises:
        ConfigError: they are not, so the labels are numbered in another way.
    """
    if all(name == str(label) for label, name in enumerate(names)):
        return  # the names are not known
    for one, other in label_pairs(pairs).items():
        if max(one, other) >= len(names) or _mirrored(names[one]) != names[other]:
            shown = [names[k] if k < len(names) else "no class" for k in (one, other)]
            raise ConfigError(
                f"augment.flip_label_pairs: {one}-{other} exchanges {shown[0]!r} and {shown[1]!r}, "
                "which are no mirror images: the labels of these lists are numbered in another way "
                "than those of the recipe (accel data import --numbering)."
            )


def _mirrored(name: str) -> str:
    swapped = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda match: swapped[match[1]], name)
