"""Recipes: strict files, typed overrides, errors that name the key and the nearest one."""

import pytest

from accel.engine import config
from accel.errors import ConfigError


def _write(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", config.shipped_recipes())
def test_every_shipped_recipe_is_a_fixed_point_of_load_and_dump(name, tmp_path):
    recipe = config.load_recipe(name)
    again = config.load_recipe(_write(tmp_path, config.dump(recipe), f"{name}.yaml"))
    assert again == recipe
    assert config.dump(again) == config.dump(recipe)
    assert config.fingerprint(again) == config.fingerprint(recipe)


def test_the_default_recipe_is_shipped():
    assert config.DEFAULT_RECIPE in config.shipped_recipes()


def test_overrides_win_over_the_file_and_are_typed():
    recipe = config.load_recipe(
        "demo_motion8", {"optim.lr": "1e-2", "model.temporal": "none", "model.pretrained": "012"}
    )
    assert recipe.optim.lr == 0.01
    assert recipe.model.temporal == "none"
    assert recipe.model.pretrained == "012"
    assert config.load_recipe("demo_motion8").model.temporal == "auto"


def test_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    recipe = config.load_recipe(_write(tmp_path, "optim: {lr: 1e-2}"))
    assert recipe.optim.lr == 0.01


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {learning_rate: 0.1}", "optim.learning_rate: unknown key. Did you mean optim.lr?"),
        ("optim: {momentun: 0.9}", "Did you mean optim.momentum?"),
        ("model: {lr: 0.9}", "Did you mean optim.lr?"),
        ("optimizer: {lr: 0.1}", "optimizer: unknown section. Did you mean optim?"),
        ("on: {lr: 1}", "expected a name, got 'on' as a key"),
        ("1: {lr: 1}", ":1: not a recipe"),
        ("[a]: 1", "as a key"),
        ("optim: 3", "optim: expected keys below it, got 3"),
        ("optim: {lr: fast}", "optim.lr: expected a finite number, got fast"),
        ("optim: {lr: .nan}", "optim.lr"),
        ("optim: {lr: .inf}", "optim.lr: expected a finite number"),
        ("optim: {lr: -1}", "optim.lr: must be > 0"),
        ("optim: {lr: true}", "optim.lr"),
        ("precision: {mode: off}", "precision.mode"),
        ("train: {micro_batch: 0}", "train.micro_batch: must be >= 1"),
        ("train: {global_batch: 10, micro_batch: 4}", "train.global_batch: must be a multiple"),
        ("optim: {lr: 1, lr: 2}", "key 'lr' appears twice"),
        ("a: &x {lr: 1}\noptim: *x", "aliases are not allowed"),
        ("optim: !!python/object/apply:os.system ['true']", "not a recipe"),
        ("optim: {class_path: subprocess.Popen}", "optim.class_path: unknown key"),
        ("- 1\n- 2", "expected sections with keys, got list"),
        ("optim: {lr: [}", ":1: not a recipe"),
        ("[" * 3000, "nested deeper"),
        ("extends: nowhere", "unknown recipe"),
        ("extends: 3", "extends: expected the name of a recipe"),
        ("schedule: {milestones: [30, 20]}", "schedule.milestones"),
        ("schedule: {kind: cosine, milestones: [3]}", "schedule.milestones"),
    ],
)
def test_bad_files_give_one_sentence_with_file_and_key(tmp_path, text, expected):
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load_recipe(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "r.yaml" in str(caught.value) or "train." in str(caught.value)


def test_large_binary_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at most"):
        config.load_recipe(_write(tmp_path, "#" * (config.MAX_RECIPE_BYTES + 1)))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load_recipe(str(tmp_path / "b.yaml"))
    with pytest.raises(ConfigError, match="no such recipe"):
        config.load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.lrr", "1", "Did you mean optim.lr?"),
        ("optim.lr", "abc", "optim.lr: expected a finite number, got abc"),
        ("optim.lr", "nan", "optim.lr"),
        ("model.depth", "19", "model.depth"),
        ("train.global_batch", "1.5", "train.global_batch: expected a whole number, got 1.5"),
        ("sampling.num_segments", "0", "sampling.num_segments"),
    ],
)
def test_bad_overrides_name_the_option(key, value, expected):
    with pytest.raises(ConfigError) as caught:
        config.load_recipe("demo_motion8", {key: value})
    assert expected in str(caught.value)


def test_sampling_follows_the_model():
    recipe = config.load_recipe("demo_motion8")
    assert (recipe.sampling.kind, recipe.sampling.frames_per_segment) == ("auto", 0)
    resolved = config.resolved_sampling(recipe)
    assert (resolved.kind, resolved.frames_per_segment) == ("segments", 1)
    with pytest.raises(ConfigError, match=r"sampling\.kind: expected 'segments', .* is tanet"):
        config.load_recipe("demo_motion8", {"sampling.kind": "neighbors"})


def test_extends_merges_one_level(tmp_path):
    _write(tmp_path, "optim: {lr: 0.5, momentum: 0.8}", "base.yaml")
    child = _write(tmp_path, "extends: ./base.yaml\noptim: {lr: 0.25}", "child.yaml")
    recipe = config.load_recipe(child)
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.name) == (0.25, 0.8, "child")
    grandchild = _write(tmp_path, "extends: ./child.yaml", "grandchild.yaml")
    with pytest.raises(ConfigError, match="one level only"):
        config.load_recipe(grandchild)


def test_diff_lists_changed_keys_and_knows_harmless_ones():
    old = config.load_recipe("demo_motion8")
    new = config.load_recipe("demo_motion8", {"optim.lr": "0.2", "log.progress_s": "1"})
    changes = config.diff(config.to_dict(old), config.to_dict(new))
    assert changes == {"optim.lr": (0.4, 0.2), "log.progress_s": (10.0, 1.0)}
    assert [key for key in changes if config.is_harmless(key)] == ["log.progress_s"]
    assert all(key in config.KEYS for key in config.HARMLESS_KEYS)
    assert all(section in config.SECTIONS for section in config.HARMLESS_SECTIONS)


def test_split_overrides_and_run_names():
    rest, overrides = config.split_overrides(
        ["--recipe", "x", "--optim.lr", "1", "--model.temporal=none", "--optim.lr", "2", "--json"]
    )
    assert rest == ["--recipe", "x", "--json"]
    assert overrides == {"model.temporal": "none", "optim.lr": "2"}
    assert config.override_name("demo", overrides) == "demo-temporal=none-lr=2"
    assert config.override_name("demo", {"data.root": "/x", "loader.threads": "3"}) == "demo"
    assert "/" not in config.override_name("demo", {"data.train_list": "a/b c.txt"})
    assert len(config.override_name("demo", {"data.train_list": "a" * 500})) < 130
    with pytest.raises(ConfigError, match="expected a value"):
        config.split_overrides(["--optim.lr"])
