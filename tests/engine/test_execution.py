"""Which way a step is launched, and why not another one."""

import pytest
import torch

from accel.engine.config import load_recipe
from accel.engine.distributed import World
from accel.engine.execution import graph_obstacle, open_graphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("recipe", "overrides", "device", "size", "accumulation", "reason"),
    [
        ("demo_motion8", {}, CUDA, 1, 4, None),
        ("demo_motion8", {}, CUDA, 2, 1, None),
        ("demo_motion8", {}, CPU, 1, 1, "CUDA graphs need a GPU, this run is on cpu"),
        ("demo_motion8", {"log.profile": "nsys"}, CUDA, 1, 1, "marks the parts of a step"),
        ("demo_motion8", {}, CUDA, 2, 2, "several processes exchange gradients"),
        ("demo_tubes", {}, CUDA, 1, 1, "detector"),
    ],
)
def test_what_keeps_a_run_from_replaying(recipe, overrides, device, size, accumulation, reason):
    found = graph_obstacle(load_recipe(recipe, overrides), device, World(size=size), accumulation)
    assert found is None if reason is None else reason in found


def test_the_reason_is_one_line(caplog):
    recipe = load_recipe("demo_motion8", {"train.execution": "graph"})
    assert open_graphs(recipe, CPU, World(), 1) is None
    assert [record.getMessage() for record in caplog.records] == [
        "train.execution graph: steps run eagerly, because CUDA graphs need a GPU, this run is on "
        "cpu."
    ]
    caplog.clear()
    assert open_graphs(load_recipe("demo_motion8"), CPU, World(), 1) is None and not caplog.records
