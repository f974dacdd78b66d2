"""The shipped recipes against the published facts."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from accel.cli.main import main
from accel.engine.config import (
    dump_marked,
    load_recipe,
    resolved_sampling,
    shipped_recipes,
    to_dict,
)
from accel.engine.data import check_flipped_names
from accel.engine.evaluate import TestConfig, parse_protocol, protocol_views
from accel.engine.published import (
    disagreements,
    expected_values,
    facts,
    protocol_disagreements,
    published_rows,
)
from accel.engine.recipe_check import check_recipes, recipes_of_runs, resolve_row
from accel.errors import ConfigError
from pipelines.clips import ClipSampler
from pipelines.config import AugmentConfig

ROOT = Path(__file__).resolve().parents[2]


def _values(name):
    recipe = load_recipe(name)
    return to_dict(dataclasses.replace(recipe, sampling=resolved_sampling(recipe)))


def test_every_value_of_every_recipe_is_the_published_one():
    assert list(check_recipes()) == []


def test_all_published_rows_have_a_recipe_and_a_protocol():
    assert len(facts()["rows"]) == 51
    for row in published_rows():
        for recipe in resolve_row(row):
            assert row.protocol in recipe.test.protocols
            clips, _ = parse_protocol(row.protocol, "row")
            sampler = ClipSampler(resolved_sampling(recipe), num_clips=clips)
            length = recipe.model.frames_per_segment * recipe.sampling.num_segments
            assert sampler.test(40, 0).shape == (clips, length)


def test_a_difference_in_any_key_is_found():
    run = "mas_sthv1_16f"
    values = _values(recipes_of_runs()[run])
    for key in expected_values(run):
        section, name = key.split(".")
        changed = {**values, section: {**values[section], name: "other"}}
        try:
            found = list(disagreements(changed, run))
        except (TypeError, ValueError):  # a value that no recipe can have
            found = [f"{key} is"]
        assert any(problem.startswith(f"{key} is") for problem in found), key
    changed = {**values, "schedule": {**values["schedule"], "factors": [0.1, 0.01, 0.001, 0.0001]}}
    assert any("schedule.factors" in problem for problem in disagreements(changed, run))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("test", "average", "probs"),
        ("test", "protocols", ["1x1"]),
        ("augment", "antialias", False),
        ("augment", "resize", 240),
        ("sampling", "two_clips", "shifted"),
        ("sampling", "kind", "dense"),
    ],
)
def test_a_difference_in_the_protocol_is_found(section, key, value):
    values = _values("masnet_r50_8f_sthv1")
    assert not list(protocol_disagreements(values, "mas_sthv1_8f_2x3", 256))
    changed = {**values, section: {**values[section], key: value}}
    assert list(protocol_disagreements(changed, "mas_sthv1_8f_2x3", 256))
    assert list(protocol_disagreements(values, "mas_sthv1_8f_2x3", 224))


def test_inferred_values_are_marked_and_the_text_is_still_the_recipe():
    recipe = load_recipe("masnet_r50_16f_sthv1")
    text = dump_marked(recipe)
    marked = [line.split(":")[0].strip() for line in text.splitlines() if "# inferred" in line]
    assert sorted(marked) == ["dropout", "global_batch", "lr", "micro_batch"]
    assert yaml.safe_load(text) == to_dict(recipe)


def test_recipes_are_short_and_named_by_the_rule():
    systems = {"tanet", "msn", "tdn", "masnet", "amsnet"}
    for run, name in recipes_of_runs().items():
        system, backbone, frames = name.split("_")[:3]
        assert system in systems and backbone == "r50"
        assert frames == f"{facts()['runs'][run]['frames']}f"
    assert set(recipes_of_runs().values()) < set(shipped_recipes())


def test_three_crops_are_of_the_short_side():
    augment = AugmentConfig()
    sizes = [protocol_views(name, TestConfig(), augment).size for name in ("1x1", "2x3", "1x10")]
    assert sizes == [224, 256, 224]
    assert protocol_views("2x3", TestConfig(full_resolution=False), augment).size == 224


@pytest.mark.parametrize("name", ["", "3", "0x3", "2x5", "2x3x1", "100x1", "x3", "-1x3"])
def test_protocols_that_do_not_exist(name):
    with pytest.raises(ValueError, match="clips x crops"):
        TestConfig(protocols=(name,))


def test_an_unknown_inferred_key_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("published: {inferred: [optim.learning_rate]}")
    with pytest.raises(ConfigError, match=r"published\.inferred.*optim\.lr"):
        load_recipe(str(path))


def test_the_command_lists_and_checks(capsys):
    assert main(["recipes", "--check"]) == 0
    assert "51 published rows" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    output = capsys.readouterr().out
    assert set(shipped_recipes()) <= set(output.replace(",", " ").split())
    lines = output.splitlines()
    assert lines.index("") == 1 + len(published_rows())  # those of detectors follow
    assert any(line.startswith("mas_sthv1_ensemble_2x3") and " + " in line for line in lines)


@pytest.mark.parametrize("name", ["tanet_r50_8f_sthv1", "masnet_r50_8f_sthv1"])
def test_lists_of_the_other_numbering_are_refused(name):
    labels = ROOT / "tests" / "data" / "label_maps" / "something_v1.txt"
    official = labels.read_text(encoding="utf-8").splitlines()
    pairs = load_recipe(name).augment.flip_label_pairs
    right, wrong = sorted(official), official
    if name.startswith("tanet"):
        right, wrong = wrong, right
    check_flipped_names(right, pairs)
    check_flipped_names([str(label) for label in range(174)], pairs)  # names are not known
    with pytest.raises(ConfigError, match="numbered in another way"):
        check_flipped_names(wrong, pairs)
    with pytest.raises(ConfigError, match="no class"):
        check_flipped_names(right[:50], pairs)
