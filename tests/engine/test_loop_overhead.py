"""profile/loop_overhead.py on the tiny recipe: its parts add up; the loop's own part is small."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "profile/loop_overhead.py"


@pytest.fixture
def run(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("profile_loop_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["loop_overhead.py", *arguments])
        code = module.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_parts_of_the_step_add_up(run, tiny_recipe):
    code, out, _ = run("--recipe", tiny_recipe, "--json")
    values = json.loads(out.splitlines()[-1])
    assert code == 0 and values["steps"] == 4
    parts = ("data_wait", "ingest", "forward", "loss", "backward", "optimizer", "loop")
    assert all(values[f"{name}_ms"] > 0 for name in parts)
    assert sum(values[f"{name}_ms"] for name in parts) == pytest.approx(values["step_ms"])
    assert values["loop_share"] == pytest.approx(values["loop_ms"] / values["step_ms"])
    # Of 40 ms here; the demo recipe is what the loop is measured on.
    assert 0 < values["loop_cpu_share"] < 0.2


def test_a_wrong_key_is_one_sentence(run):
    code, _, errors = run("--train.speed", "9")
    assert code == 2 and errors.startswith("loop_overhead: --train.speed: unknown option")
