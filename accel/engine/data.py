"""Datasets and loaders of a recipe, opened by all processes of a run."""

import torch

from accel.engine.config import Recipe, resolved_sampling
from accel.engine.distributed import World
from accel.engine.timing import Ranges
from accel.errors import ConfigError
from pipelines.config import TestViews
from pipelines.datasets import Dataset, open_dataset
from pipelines.loader import Loader, build_loader
from pipelines.order import Split


def open_shared_dataset(recipe: Recipe, world: World) -> Dataset:
    """The videos of both splits; rank 0 first, so that a generated set is written once.

    Raises:
        ConfigError: neither a folder nor lists are configured.
        pipelines.errors.DataError: a list, or the folder, that cannot be used.
    """
    if not world.is_main:
        world.barrier()
    try:
        dataset = open_dataset(recipe.data, progress=world.is_main)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if world.is_main:
        world.barrier()
    return dataset


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
) -> Loader:
    """The loader of a split as the recipe says.

    Args:
        micro_batch: videos per batch of this process.
        views: of every video of "val"; None = the one center view.

    Raises:
        ConfigError: settings that do not fit each other.
        pipelines.errors.DataError: unusable videos, all named.
    """
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
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
