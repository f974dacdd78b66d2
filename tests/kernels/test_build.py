"""setup.py never fails for what a machine lacks: one line says what is not built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def describe(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py far enough to decide what would be built."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_python_only_on_request() -> None:
    result = describe(ACCEL_BUILD="python")
    assert result.returncode == 0 and "accel:" not in result.stderr


def test_without_a_compiler() -> None:
    result = describe(CXX="no-such-compiler")
    assert result.returncode == 0
    assert "accel: kernels._C is not built: no C++ compiler was found (set CXX)." in result.stderr


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    result = describe(PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    assert "accel: kernels._C is not built: torch cannot be imported (not here)." in result.stderr


@pytest.mark.parametrize("package", ["tests", "profile"])
def test_folders_that_are_not_packages(package: str) -> None:
    """A second `profile` or a top-level `tests` must never be installed."""
    assert not (ROOT / package / "__init__.py").exists()
