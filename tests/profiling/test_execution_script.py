"""profile/execution.py on a CPU: recomputed activations give the same losses."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = "--size 32 --batch 2 --depth 18 --width 8 --stages 1 --steps 3 --models tsn".split()


def _run(*arguments):
    command = [sys.executable, str(ROOT / "profile" / "execution.py"), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_eager_steps_with_and_without_recomputation():
    answer = _run("--json")
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout.splitlines()[-1])["ways"]
    kinds = [(row["way"], row["checkpoint_activations"]) for row in rows]
    assert kinds == [("eager", "none"), ("eager", "block"), ("eager", "stage")]
    assert all(row["loss_difference"] < 1e-6 and row["ratio_to_eager"] > 0 for row in rows)
    assert len(set(rows[0]["losses"])) == 3


def test_what_cannot_be_asked_for_is_said():
    answer = _run("--ways", "eager,faster")
    assert answer.returncode == 2 and "--ways: unknown faster" in answer.stderr
