"""`accel doctor`: what this installation has, lacks, and could confuse."""

import importlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import accel
from accel.engine.apex import find_fused_sgd
from accel.engine.run import DALI_PACKAGES
from accel.errors import ConfigError

PACKAGES = ("numpy", "av", "jsonargparse", "matplotlib", "nvtx", "nvidia-ml-py", "tensorboard")


def main(argv: Sequence[str]) -> int:
    """Print the report; exit code 2 when one of our import names means another package."""
    if any(argument in ("-h", "--help") for argument in argv):
        print(f"usage: accel doctor\n\n{__doc__}")
        return 0
    if argv:
        raise ConfigError(f"accel doctor: takes no options, got {' '.join(argv)}.")
    for name, value in _report():
        print(f"{name:16}{value}")
    clashes = _clashes()
    for clash in clashes:
        print(f"{'problem':16}{clash}")
    return 2 if clashes else 0


def _report() -> list[tuple[str, str]]:
    rows = [
        ("accel", accel.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        ("gpu", _gpus()),
        ("driver", _driver()),
        ("dali", _dali()),
        ("extension", _extension()),
        ("apex", find_fused_sgd()[1]),
    ]
    return rows + [(package, _version(package)) for package in PACKAGES]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return f"none visible (torch is built with {built}); training runs on the CPU"
    return ", ".join(
        f"{torch.cuda.get_device_name(i)} "
        f"(sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    )


def _driver() -> str:
    try:
        import pynvml  # of nvidia-ml-py

        pynvml.nvmlInit()
    except ImportError:
        return "unknown (nvidia-ml-py is not installed)"
    except pynvml.NVMLError as error:
        return f"none ({error})"
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _dali() -> str:
    found = [f"{p} {_version(p)}" for p in DALI_PACKAGES if _version(p) != "not installed"]
    return ", ".join(found) or "not installed; every file is decoded by PyAV"


def _extension() -> str:
    library = importlib.import_module("kernels._library")
    return "loaded" if library.AVAILABLE else f"not used: {library.REASON}"


def _clashes() -> list[str]:
    """Our three package names also exist on PyPI; say so when another one is imported."""
    home = Path(accel.__file__).resolve().parents[1]
    clashes = []
    for name in ("kernels", "pipelines"):
        module = importlib.import_module(name)
        location = Path(os.path.abspath(module.__file__ or "")).resolve()
        if home not in location.parents:
            clashes.append(
                f"import {name} gives {location}, not accel's; uninstall the PyPI package {name}."
            )
    return clashes
