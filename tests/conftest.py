"""Markers and the one skip rule, tolerances by dtype, and tiny synthetic media."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def _extension_available() -> bool:
    from kernels import _library

    return bool(_library.AVAILABLE)


def _dali_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the namespace package nvidia
        return False


def _dali_decodes_video() -> bool:
    if not _dali_installed():
        return False
    from pipelines.dali_video import video_operator

    return video_operator() is not None


# marker -> (name in ACCEL_REQUIRE, check, reason for the skip)
_NEEDS = {
    "needs_cuda": ("cuda", torch.cuda.is_available, "no CUDA device"),
    "needs_dali": (
        "dali",
        _dali_installed,
        "NVIDIA DALI is not installed",
    ),
    "needs_dali_video": (
        "dali",
        _dali_decodes_video,
        "no NVIDIA DALI that decodes video by frame index",
    ),
    "needs_nvcc": ("nvcc", lambda: shutil.which("nvcc") is not None, "nvcc is not on PATH"),
    "needs_cuda_torch": (
        "cuda_torch",
        lambda: (Path(__file__).parents[1] / "build/cuda-torch/.unpacked").exists(),
        "no CUDA build of torch (make cuda-torch)",
    ),
    "needs_extension": ("extension", _extension_available, "kernels._C is not built"),
}


@pytest.fixture(autouse=True)
def _logging_ends_with_the_test() -> Iterator[None]:
    """A command that a test runs in this process logs to the stderr of that test alone."""
    loggers = [logging.getLogger(name) for name in (None, "accel", "pipelines", "kernels")]
    levels = [logger.level for logger in loggers]
    yield
    root = loggers[0]
    root.handlers[:] = [h for h in root.handlers if type(h) is not logging.StreamHandler]
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run; ACCEL_REQUIRE=cuda,dali,... makes that a failure."""
    required = set(filter(None, os.environ.get("ACCEL_REQUIRE", "").split(",")))
    for marker, (name, check, reason) in _NEEDS.items():
        if item.get_closest_marker(marker) and not check():
            if name in required:
                pytest.fail(f"{reason}, but ACCEL_REQUIRE names {name}")
            pytest.skip(reason)
