"""profile/loader.py on tiny sets, one pass: who was measured, and what is asked of whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.multi_process
def test_a_small_comparison(tmp_path: Path) -> None:
    options = "--sets jpeg h264_gop12 --videos 2 --frames 24 --turns 1 --threads 1 --json"
    command = [sys.executable, ROOT / "profile" / "loader.py", *options.split()]
    command += ["--peers", "pillow", "pyav_sequential"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCEL_CACHE": str(tmp_path)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout.splitlines()[-1])
    assert [row["name"] for row in report["sets"]] == ["jpeg", "h264_gop12"]
    for row, peer in zip(report["sets"], ("pillow", "pyav_sequential"), strict=True):
        assert list(row["peers"]) == [peer] and row["peers_missing"] == {}
        assert row["clips_per_s"] > 0 and row["cpu_ms_per_clip"] > 0
        assert row["ratio_to_best_peer"] == pytest.approx(row["clips_per_s"] / row["peers"][peer])
        ratios = {
            "best": row["ratio_to_best_peer"],
            "sequential": row["ratio_to_best_sequential_peer"],
            "pillow": row["ratio_to_pillow"],
        }
        assert row["ask"] and row["met"] == all(ratios[k] >= ask for k, ask in row["ask"].items())
    assert report["settings"]["frames"] == 24 and report["cores"] >= 1
