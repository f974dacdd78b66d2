"""Loads the optional compiled extension kernels._C and says whether, and why not, it can be used.

The extension registers its operators with PyTorch's dispatcher (namespace `accel_kernels`); it is a
plain shared library, so it is loaded, not imported.
"""

from pathlib import Path

import torch

_REBUILD = "run `python setup.py build_ext --inplace` or install the package again"


def _minor(version: str) -> list[str]:
    """["2", "13"] of "2.13.0+cu130": torch keeps its C++ interface within one minor release."""
    return version.split("+")[0].split(".")[:2]


def _load(path: Path) -> str:
    """Load the extension at `path`; an empty string, or why it cannot be used."""
    if not path.exists():
        return f"kernels._C is not built ({_REBUILD})"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        return (
            f"{path} cannot be loaded with torch {torch.__version__}, probably because it was "
            f"built for another torch ({_REBUILD}): {error}"
        )
    built_for = torch.ops.accel_kernels.built_for()
    if _minor(built_for) != _minor(torch.__version__):
        return f"{path} is built for torch {built_for}, this is {torch.__version__} ({_REBUILD})"
    return ""


REASON = _load(Path(__file__).with_name("_C.so"))
AVAILABLE = not REASON
HAS_CUDA = AVAILABLE and bool(torch.ops.accel_kernels.has_cuda())


def can_run_on(device_type: str) -> tuple[bool, str]:
    """Whether the compiled operators run on tensors of this device type, and if not, why."""
    if not AVAILABLE:
        return False, REASON
    if device_type == "cuda" and not HAS_CUDA:
        return False, f"kernels._C was built without CUDA kernels ({_REBUILD} where nvcc is found)"
    if device_type not in ("cpu", "cuda"):
        return False, f"there is no kernel for device type {device_type!r}"
    return True, ""
