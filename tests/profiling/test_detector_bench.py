"""profile/detector.py: both forms of the heads are the same function, and a tiny run works."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_both_forms_agree(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "profile"))
    from detector import GatheredHead

    from accel.models.amtnet_heads import MicrotubeHead

    torch.manual_seed(0)
    head = MicrotubeHead(5, num_frames=2, boxes_per_cell=4, loc_size=8, num_classes=3).double()
    x = torch.randn(6, 5, 4, 7, dtype=torch.float64)
    for ours, published in zip(head(x), GatheredHead(head)(x), strict=True):
        torch.testing.assert_close(ours, published)


def test_a_small_run() -> None:
    command = "profile/detector.py --batch 1 --width 4 --warmups 0 --steps 1 --threads 1 --json"
    answer = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout.splitlines()[-1])
    assert report["heads"]["ratio"] > 0 and report["training"]["microtubes_per_s"] > 0
