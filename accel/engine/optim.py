"""The optimizer: published parameter groups, fused SGD, device-side skip of non-finite steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from accel.engine.apex import apex_sgd
from accel.models.detectors import Detector
from accel.models.network import ClipNetwork
from accel.models.param_groups import Policy, detector_groups, parameter_groups


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD and its parameter groups."""

    lr: float = 0.01
    """Learning rate for train.global_batch clips, > 0; schedule and group factors multiply it."""
    momentum: float = 0.9
    """In [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 0.0005
    """L2 penalty, >= 0; group factors multiply it."""
    clip_norm: float = 20.0
    """Largest total L2 norm of the gradients; 0 = no clipping."""
    implementation: Literal["torch", "apex"] = "torch"
    """Of fused SGD: PyTorch's, or FusedSGD of an installed NVIDIA apex (GPU; no CUDA graphs)."""
    groups: Policy = "plain"
    """plain (no decay on norms and biases) | the published groups of a system."""
    fc_lr5: bool = True
    """tanet groups: classifier weight at 5 x, bias at 10 x the rate (published recipes)."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr: must be > 0, got {self.lr}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum: must be in [0, 1), got {self.momentum}.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov: needs optim.momentum > 0, got 0.")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay: must be >= 0, got {self.weight_decay}.")
        if self.clip_norm < 0:
            raise ValueError(f"optim.clip_norm: must be >= 0 (0 = off), got {self.clip_norm}.")


class DenseSGD(torch.optim.SGD):
    """Fused `torch.optim.SGD` of dense tensors, whatever order their strides give.

    The fused kernel pairs the elements of parameter, gradient and momentum as they lie in memory.
    On a CPU it also copies every gradient that is not contiguous, all kernels in channels_last
    among them, and does not use the copy. Flat views of the same memory spare it that.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; there is no closure."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            sgd(
                [_flat(p) for p in parameters],
                [_flat(_laid_out(p.grad, p)) for p in parameters],
                [self._momentum(p) for p in parameters],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )

    def _momentum(self, parameter: Tensor) -> Tensor | None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            return None
        state["momentum_buffer"] = _laid_out(state["momentum_buffer"], parameter)
        return _flat(state["momentum_buffer"])


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, copied if the strides that matter are not those of `like`."""
    strides = zip(tensor.stride(), like.stride(), like.shape, strict=True)
    if all(own == other or length == 1 for own, other, length in strides):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))


class Optimizer:
    """Fused SGD over the published groups, with rates set from outside before every step.

    Args:
        model: on its device.
        config: the settings.
        device_rates: keep the rates in tensors on the device (rounded to fp32), where a CUDA graph
            reads them; None: on CUDA devices.
    """

    def __init__(
        self,
        model: ClipNetwork | Detector,
        config: OptimConfig,
        *,
        device_rates: bool | None = None,
    ) -> None:
        self.groups = [
            group
            for group in (
                parameter_groups(model, config.groups, fc_lr5=config.fc_lr5)
                if isinstance(model, ClipNetwork)
                else detector_groups(model)
            )
            if group.params
        ]
        self._config = config
        device = next(iter(self.parameters())).device
        groups = [{"params": list(group.params.values())} for group in self.groups]
        shared: Any = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov}
        if config.implementation == "apex":
            self.sgd: Any = apex_sgd(groups, device=device, **shared)
            device_rates = False  # apex takes numbers of the host
        else:
            self.sgd = DenseSGD(groups, fused=True, **shared)
        if device.type == "cuda" if device_rates is None else device_rates:
            for settings in self.sgd.param_groups:
                settings["lr"] = torch.full((), config.lr, device=device)
        if config.momentum:
            # A buffer of zeros gives the same first step as no buffer. It must exist: the fused
            # kernel leaves a new one uninitialized when the very first step is skipped.
            for parameter in self.parameters():
                self.sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def parameters(self) -> Iterable[nn.Parameter]:
        """All optimized parameters, group by group."""
        return (parameter for group in self.groups for parameter in group.params.values())

    def set_lr(self, factor: float) -> float:
        """Set every group's rate and decay for the next step; returns the base rate lr * factor."""
        base = self._config.lr * factor
        for group, settings in zip(self.groups, self.sgd.param_groups, strict=True):
            rate = base * group.lr_mult
            if isinstance(settings["lr"], torch.Tensor):
                settings["lr"].fill_(rate)
            else:
                settings["lr"] = rate
            settings["weight_decay"] = self._config.weight_decay * group.decay_mult
        return base

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Momentum by parameter name (empty without momentum)."""
        if not self._config.momentum:  # apex keeps buffers all the same
            return {}
        return {
            name: self.sgd.state[parameter]["momentum_buffer"]
            for group in self.groups
            for name, parameter in group.params.items()
            if "momentum_buffer" in self.sgd.state[parameter]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy stored momentum into the existing buffers.

        Copying keeps each buffer's memory layout equal to its parameter's, which the fused kernel
        assumes.

        The caller has compared names and shapes.
        """
        own = self.state_dict()
        for name, buffer in own.items():
            buffer.copy_(state[name])
