"""motion8: complete, deterministic, and told apart by motion only."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import synthetic
from pipelines.config import DataConfig
from pipelines.datasets import open_dataset
from pipelines.media import probe
from pipelines.synthetic import CLASSES, generate_motion8, render_clip


def test_motion_goes_the_way_the_class_says() -> None:
    """Shift between the first two frames by the class: brute-force match of the frame's middle."""

    def shift(clip: np.ndarray) -> tuple[int, int]:
        first, last = clip[0].astype(int), clip[6].astype(int)
        inner = first[28:52, 28:52]
        candidates = [(dy, dx) for dy in range(-14, 15) for dx in range(-14, 15)]
        errors = [
            np.abs(last[28 + dy : 52 + dy, 28 + dx : 52 + dx] - inner).sum()
            for dy, dx in candidates
        ]
        return candidates[int(np.argmin(errors))]

    expected = {"pan_down": (-1, 0), "pan_left": (0, 1), "pan_right": (0, -1), "pan_up": (1, 0)}
    for name, direction in expected.items():
        moved = shift(render_clip(name, np.random.default_rng(1)))
        assert tuple(np.sign(moved)) == direction, (name, moved)


def test_middle_frames_do_not_know_the_class() -> None:
    """With the same generator, all classes show the same picture at mid-clip."""
    middles = []
    for name in CLASSES:
        clip = render_clip(name, np.random.default_rng(4))
        assert clip.shape[1:] == (80, 80, 3) and 18 <= len(clip) <= 24
        middle = (len(clip) - 1) / 2
        middles.append(clip[int(np.floor(middle))] / 2.0 + clip[int(np.ceil(middle))] / 2.0)
    spread = np.abs(np.stack(middles) - middles[0]).mean(axis=(1, 2, 3))
    assert spread.max() < 12  # of 255; half a frame interval of motion


def test_no_border_is_ever_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def white(side_px: int, rng: np.random.Generator) -> np.ndarray:
        return np.ones((side_px, side_px, 3), np.float32)

    monkeypatch.setattr(synthetic, "dead_leaves", white)
    for name in CLASSES:
        for seed in range(3):
            assert render_clip(name, np.random.default_rng(seed)).min() == 255


def test_set_is_complete_cached_and_deterministic(tmp_path: Path) -> None:
    root = generate_motion8(tmp_path / "a", num_train=16, num_val=8, progress=False)
    (tmp_path / "b" / f"{root.name}.tmp-dead").mkdir(parents=True)  # of a killed process
    again = generate_motion8(tmp_path / "b", num_train=16, num_val=8, progress=False)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert len(files) == 16 + 8 + 3
    assert all((root / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        root.name,
        f"{root.name}.lock",
    ]
    stamp = root.stat().st_mtime_ns
    assert generate_motion8(tmp_path / "a", num_train=16, num_val=8) == root
    assert root.stat().st_mtime_ns == stamp

    lists = DataConfig(
        root=str(root), train_list="train.txt", val_list="val.txt", classes_file="classes.txt"
    )
    dataset = open_dataset(lists)
    assert dataset.class_names == CLASSES
    assert [record.label for record in dataset.train] == [k % 8 for k in range(16)]
    by_folder = open_dataset(DataConfig(root=str(root)))
    assert by_folder.class_names == CLASSES
    labels = {record.name: record.label for record in by_folder.val}
    assert labels == {record.name: record.label for record in dataset.val}
    assert all(probe(record.path).kind.dali_cpu_problem is None for record in dataset.val)


@pytest.mark.slow
@pytest.mark.multi_process
def test_processes_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = generate_motion8(tmp_path / "a", num_train=56, num_val=8, progress=False)
    monkeypatch.setattr(synthetic, "_MIN_CLIPS_FOR_PROCESSES", 1000)
    serial = generate_motion8(tmp_path / "b", num_train=56, num_val=8, progress=False)
    files = [path.relative_to(serial) for path in serial.rglob("*") if path.is_file()]
    assert len(files) == 64 + 3
    assert all((parallel / name).read_bytes() == (serial / name).read_bytes() for name in files)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from pipelines.synthetic import generate_motion8\n"
        "import sys; print(generate_motion8(Path(sys.argv[1]), num_train=8, num_val=8))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    cwd = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd) for _ in range(2)
    ]
    roots = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(roots) == 1
    assert len(list(Path(roots.pop()).rglob("*.webm"))) == 16
