"""The benchmark of long lists runs, on short ones."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "profile" / "list_scale.py"


@pytest.mark.needs_dali_video
def test_it_reports_costs_and_ratios(monkeypatch, capsys, tmp_path):
    options = ["--lines", "64", "320", "--start", "--batches", "3", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["list_scale.py", *options, "--json"])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ms_per_clip"].keys() == {"64", "320"} and found["ratio"]["64"] == 1
    assert 0.2 < found["ratio"]["320"] < 5
