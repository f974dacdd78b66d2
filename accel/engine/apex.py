"""The optional adapter for `FusedSGD` of NVIDIA apex."""

import importlib
from collections.abc import Sequence
from importlib import util
from typing import Any

import torch

from accel.errors import ConfigError

_DEVICE_TYPES = ("cuda",)


def find_fused_sgd() -> tuple[Any, str]:
    """The class `apex.optimizers.FusedSGD` or None, and one sentence about what is installed.

    PyPI's package of the same name is a web toolkit.
    """
    if util.find_spec("apex") is None:
        return None, "not installed (optional)"
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except Exception:  # nothing is known about what other packages do when they are imported
        return None, "the installed package apex is not NVIDIA's (PyPI's is a web toolkit)"
    fused_sgd = getattr(optimizers, "FusedSGD", None)
    if fused_sgd is None:
        return None, "the installed package apex has no optimizers.FusedSGD"
    return fused_sgd, "NVIDIA apex; --optim.implementation apex uses its FusedSGD"


def apex_sgd(
    groups: Sequence[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    device: torch.device,
) -> Any:
    """apex's FusedSGD, which skips a step by a flag on the device as torch's fused SGD does.

    Weight decay goes into the gradient before momentum and nothing is dampened: torch's rule. The
    caller makes the momentum buffers, of zeros, so that apex has no first run of its own.

    Raises:
        ConfigError: NVIDIA apex or a GPU is missing.
    """
    fused_sgd, found = find_fused_sgd()
    if fused_sgd is None:
        raise ConfigError(
            f"optim.implementation: apex cannot be used, {found}; build NVIDIA apex with its CUDA "
            "extensions, or use torch."
        )
    if device.type not in _DEVICE_TYPES:
        raise ConfigError(
            f"optim.implementation: apex needs a GPU, this run is on {device.type}; use torch."
        )

    class SkippingSGD(fused_sgd):  # type: ignore[misc, valid-type]
        # The loss scaler then hands over its flag instead of reading it on the host.
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> Any:
            # apex's kernels return at once where this is not zero.
            self._dummy_overflow_buf.copy_(self.found_inf)
            return super().step(closure)

    try:
        sgd = SkippingSGD(
            groups, lr=lr, momentum=momentum, dampening=0.0, weight_decay=0.0, nesterov=nesterov
        )
    except RuntimeError as error:  # apex was built without its extensions
        raise ConfigError(f"optim.implementation: apex: {error}; use torch.") from error
    if not hasattr(sgd, "_dummy_overflow_buf"):
        raise ConfigError(
            "optim.implementation: this version of apex has no flag that skips a step; use torch."
        )
    return sgd
