"""Which implementation of an operator runs: argument, environment variable, automatic choice."""

import os
import warnings

import torch

ENVIRONMENT_VARIABLE = "ACCEL_KERNELS"
_DEVICE_OF = {"cuda": "cuda", "cpp": "cpu"}
_CHOICES = ("auto", "reference", *_DEVICE_OF)

# Operators whose fallback has been reported in this process.
_reported: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _from_environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def use_compiled(
    op: str, backend: str | None, device_type: str, supported: tuple[bool, str]
) -> bool:
    """Whether `op` runs compiled (CUDA kernel or C++ twin, by device) rather than its reference.

    Args:
        op: name for messages.
        backend: "auto", "cuda", "cpp" or "reference"; None: the environment variable ACCEL_KERNELS,
            else "auto". A compiled graph keeps the value that was set when it was traced.
        device_type: of the tensors, "cuda" runs the CUDA kernel, "cpu" the C++ twin.
        supported: whether the compiled operator takes these tensors, and if not, why.

    Returns:
        False in "auto" mode also where the compiled operator cannot run; the first time for each
        operator this is a RuntimeWarning (none while compiling).

    Raises:
        ValueError: unknown backend.
        RuntimeError: "cuda" or "cpp" was asked for and cannot run.
    """
    source = "backend"
    if backend is None:
        source, backend = ENVIRONMENT_VARIABLE, _from_environment()
    if backend not in _CHOICES:
        raise ValueError(f"{op}: {source} must be one of {', '.join(_CHOICES)}, got {backend!r}.")
    if backend == "reference":
        return False
    usable, reason = supported
    if backend != "auto":
        if device_type != _DEVICE_OF[backend]:
            usable, reason = False, f"x is on {device_type!r}"
        if not usable:
            raise RuntimeError(f"{op}: {source}={backend} was asked for, but {reason}.")
    if not usable and not torch.compiler.is_compiling() and op not in _reported:
        _reported.add(op)
        warnings.warn(
            f"{op}: using the slower PyTorch reference, because {reason}. Reported once.",
            RuntimeWarning,
            stacklevel=3,
        )
    return usable
