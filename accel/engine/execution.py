"""How the operators of a step reach the device: one by one, or as one CUDA graph."""

import logging

import torch

from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.graphs import DeviceGraphs, Graphs

logger = logging.getLogger(__name__)


def graph_obstacle(
    recipe: Recipe, device: torch.device, world: World, accumulation: int
) -> str | None:
    """Why the steps of a run cannot be replayed as CUDA graphs; None: nothing known."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, this run is on {device.type}"
    if recipe.detection.network != "none":
        return "the steps of a detector are not recorded"
    if recipe.log.profile != "none":
        return "log.profile marks the parts of a step, which a graph has not"
    if world.size > 1 and accumulation > 1:
        return "several processes exchange gradients in the last of several micro-batches only"
    return None


def open_graphs(
    recipe: Recipe, device: torch.device, world: World, accumulation: int
) -> Graphs | None:
    """What records the steps of a run, if it is to replay them and can; says so if it cannot."""
    if recipe.train.execution != "graph":
        return None
    if obstacle := graph_obstacle(recipe, device, world, accumulation):
        logger.warning("train.execution graph: steps run eagerly, because %s.", obstacle)
        return None
    return DeviceGraphs(device)
