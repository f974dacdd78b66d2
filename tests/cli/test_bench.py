"""`accel bench` on a tiny generated set: three modes, one table, facts to repeat it by."""

import json

import pytest

from accel.cli.main import main
from accel.engine.config import fingerprint, load_recipe
from pipelines.synthetic import generate_motion8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    root = generate_motion8(folder / "set", num_train=16, num_val=8, progress=False)
    path = folder / "tiny.yaml"
    path.write_text(
        f"data: {{root: {root}, train_list: train.txt, val_list: val.txt,"
        f" classes_file: classes.txt, cache_dir: {folder / 'cache'}}}\n"
        "sampling: {num_segments: 2}\n"
        "augment: {size: 32, resize: 32, flip: false}\n"
        "loader: {threads: 1}\n"
        "model: {depth: 18, width: 8, stages: 2}\n"
        "train: {global_batch: 8, micro_batch: 4}\n"
        "run: {threads: 1, device: cpu}\n"
    )
    return str(path)


def test_the_table_and_its_facts(recipe, capsys):
    assert main(["bench", "--recipe", recipe, "--warmups", "1", "--steps", "5", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [row["mode"] for row in report["rows"]] == ["compute", "loader", "train"]
    for row in report["rows"]:
        assert 0 < row["p10_ms"] <= row["step_ms"] <= row["p90_ms"]
        assert row["clips_per_s"] == pytest.approx(8e3 / row["step_ms"], rel=1e-2)
    assert 0 <= report["rows"][2]["data_wait"] <= 1
    assert report["recipe_sha256"] == fingerprint(load_recipe(recipe))
    assert any(f"sha256 {report['recipe_sha256'][:16]}" in line for line in lines)
    assert any("torch 2." in line for line in lines)


def test_overrides_and_refusals(recipe, capsys):
    assert main(["bench", "--recipe", recipe, "--steps", "0"]) == 2
    assert "--steps: expected a number >= 1, got 0" in capsys.readouterr().err
    assert main(["bench", "--recipe", recipe, "--model.name", "tanett"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
