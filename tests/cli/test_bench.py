"""`accel bench`: the recipe on a tiny generated set, and the tables of the other sections."""

import json

import pytest

from accel.cli.main import main
from accel.engine import suite
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


def test_the_table_of_a_recipe_and_its_facts(recipe, capsys):
    command = ["bench", "recipe", "--recipe", recipe, "--warmups", "1", "--steps", "5", "--json"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [row["mode"] for row in report["recipe"]["rows"]] == ["compute", "loader", "train"]
    for row in report["recipe"]["rows"]:
        assert 0 < row["p10_ms"] <= row["step_ms"] <= row["p90_ms"]
        assert row["clips_per_s"] == pytest.approx(8e3 / row["step_ms"], rel=1e-2)
    assert 0 <= report["recipe"]["rows"][2]["data_wait"] <= 1
    assert report["recipe_sha256"] == fingerprint(load_recipe(recipe))
    assert any(f"sha256 {report['recipe_sha256'][:16]}" in line for line in lines)
    assert any("torch 2." in line for line in lines)
    assert "steps" not in report


def test_overrides_and_refusals(recipe, capsys):
    assert main(["bench", "--recipe", recipe, "--steps", "0"]) == 2
    assert "--steps: expected a number >= 1, got 0" in capsys.readouterr().err
    assert main(["bench", "--recipe", recipe, "--model.name", "tanett"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["bench", "kernels"]) == 2
    assert "no section kernels; there are recipe, steps" in capsys.readouterr().err


SCRIPTS = {
    "step.py": """
plain = os.environ.get("ACCEL_KERNELS") == "reference"
row = {"p10_ms": 1, "p90_ms": 3, "clips_per_s": 9, "ratio_to_tsn": 1, "model": "tsn"}
row["step_ms"] = 6.0 if plain else 2.0
settings = {"batch": 2, "frames": 4, "size": 112, "precision": "fp32", "steps": 3}
answer = {"models": [row], "settings": settings}
""",
    "kernels_bench.py": """
def row(code, us, share):
    numbers = {"median_us": us, "gb_s": 10 * share, "copy_gb_s": 10, "of_copy": share}
    return {"op": "taps", "implementation": code, **numbers}
rows = [row("cpp", 10, 0.5), row("cpp", 30, 0.9), row("reference", 80, 0.1)]
settings = {"batch": 1, "num_segments": 8, "dtype": "fp32"}
answer = {"rows": rows, "environment": settings}
""",
    "loop_overhead.py": """
assert "--run.threads=1" in sys.argv, sys.argv
shares = {"loop_share": 0.01, "loop_cpu_share": 0.02}
answer = {"loop_ms": 1.0, "step_ms": 100.0, **shares}
""",
    "loader.py": """
sys.exit("loader: nothing to read")
""",
}


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Stands in for profile/: what the scripts print as their last line."""
    for name, body in SCRIPTS.items():
        end = "print('a table')\nprint(json.dumps(answer))\n"
        (tmp_path / name).write_text(f"import json, os, sys\n{body}{end}")
    monkeypatch.setattr(suite, "PROFILE", tmp_path)
    return tmp_path


def test_tables_are_made_of_what_the_scripts_measure(scripts, recipe, capsys):
    command = ["bench", "steps", "operators", "loop", "--recipe", recipe, "--run.threads", "1"]
    assert main([*command, "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["steps"]["rows"][0]["gain"] == 3.0 and not report["full"]
    (row,) = report["operators"]["rows"]
    assert (row["us"], row["plain_us"], row["gain"]) == (40.0, 80.0, 2.0)
    assert row["of_copy"] == 0.8  # (0.5 * 10 + 0.9 * 30) / 40
    assert "2 clips of 4 x 112 x 112" in out and "1.00 of the 100.0 ms" in out


def test_a_section_that_fails_is_one_sentence(scripts, recipe, tmp_path, capsys):
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    assert main(["bench", "readers", "--recipe", recipe, *cache]) == 1
    assert "no set is there yet; --full writes them" in capsys.readouterr().err
    (tmp_path / "cache/loader-bench-12/jpeg").mkdir(parents=True)
    (tmp_path / "cache/loader-bench-12/jpeg/list.txt").write_text("")
    assert main(["bench", "readers", "--recipe", recipe, *cache]) == 1
    assert "profile/loader.py failed (1): loader: nothing to read" in capsys.readouterr().err
    (scripts / "step.py").unlink()
    assert main(["bench", "steps", "--recipe", recipe]) == 1
    assert "no such file; the scripts are in a checkout" in capsys.readouterr().err


def test_the_scripts_take_these_options():
    """Parsers of profile/ know what the suite passes to them."""
    for name, options in (
        ("step.py", suite._SMALL_STEPS),
        ("kernels_bench.py", suite._SMALL_KERNELS),
        ("loader.py", suite._SMALL_INPUT),
    ):
        text = (suite.PROFILE / name).read_text(encoding="utf-8")
        for option in options:
            assert not option.startswith("--") or f'"{option}"' in text, (name, option)
