"""Tables of state-dict names: every map is one to one, and total on the networks it is for."""

import pytest
import torch

from accel.models import build_model, list_models
from accel.models.convert import TABLES, NameTable
from accel.models.convert.names import IMAGENET, OURS

# The networks whose names a table must carry: system, options.
NETWORKS = [(name, {"depth": depth}) for name in list_models() for depth in (18, 50, 101)]
MAPS = [
    pytest.param(system, options, layout, id=f"{system}-{options['depth']}-{layout}")
    for system, options in NETWORKS
    for layout in TABLES[system].all_layouts
    if layout != IMAGENET
]


def _names(system, options):
    with torch.device("meta"):
        return list(build_model(system, num_classes=5, num_segments=8, **options).state_dict())


@pytest.mark.parametrize(("system", "options", "layout"), MAPS)
def test_names_round_trip(system, options, layout):
    table, names = TABLES[system], _names(system, options)
    there = [table.rename(name, OURS, layout) for name in names]
    assert None not in there
    assert len(set(there)) == len(names)
    assert [table.rename_all(name, layout, OURS) for name in there] == [(n,) for n in names]
    assert table.recognize(there) == layout


@pytest.mark.parametrize("system", TABLES)
def test_every_system_has_a_table_for_its_name(system):
    assert TABLES[system].all_layouts[0] == OURS
    assert TABLES.keys() >= set(list_models())


@pytest.mark.parametrize("name", ["", "conv", "xbase_model.conv1.weight", "new_fc.weight.x"])
@pytest.mark.parametrize("system", TABLES)
def test_foreign_names_are_in_no_layout(system, name):
    table = TABLES[system]
    assert all(table.rename(name, layout, OURS) is None for layout in table.all_layouts)
    assert table.recognize([name]) is None


def test_torchvision_has_no_place_for_temporal_modules():
    rename = TABLES["tanet"].rename
    assert rename("trunk.layer1.0.temporal.G.0.weight", OURS, IMAGENET) is None
    assert rename("layer2.0.downsample.1.bias", IMAGENET, OURS) == (
        "trunk.layer2.0.downsample.1.bias"
    )


def test_one_imagenet_tensor_may_fill_several_of_ours():
    table = NameTable(
        ("accel", "torchvision"),
        (
            ("trunk.a.conv{i}.{leaf}", "conv{i}.{leaf}"),
            ("trunk.b.conv{i}.{leaf}", "conv{i}.{leaf}"),
        ),
    )
    places = ("trunk.a.conv1.weight", "trunk.b.conv1.weight")
    assert table.rename_all("conv1.weight", IMAGENET, OURS) == places
    assert [table.rename(name, OURS, IMAGENET) for name in places] == ["conv1.weight"] * 2


def test_ignored_names_belong_to_their_layout_alone():
    table = NameTable(
        ("accel", "original"),
        (("fc.{leaf}", "new_fc.{leaf}"),),
        ignored={"original": ("stale.{leaf}",)},
    )
    assert table.ignores("stale.weight", "original")
    assert not table.ignores("stale.weight", "accel")
    assert not table.ignores("stale.weight.x", "original")
