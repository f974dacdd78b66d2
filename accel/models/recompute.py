"""Activation checkpointing: blocks are computed again in the backward instead of being kept."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from accel.models.resnet import BasicBlock, Bottleneck

Recompute = Literal["none", "block", "stage"]
"""What keeps its input alone: every residual block, or every stage of them."""


def recompute_activations(model: nn.Module, what: Recompute) -> None:
    """Let residual blocks or stages of a network keep only their input in training.

    Losses, gradients, running statistics and random draws stay what they are: batch norms see the
    clips a second time in the backward, but move their statistics once.

    Args:
        model: with a ResNet; changed in place. Names of parameters and buffers stay.
        what: to compute again.

    Raises:
        ValueError: the network has no residual blocks.
    """
    if what == "none":
        return
    stages = [
        module
        for module in model.modules()
        if isinstance(module, nn.Sequential)
        and len(module)
        and all(isinstance(child, BasicBlock | Bottleneck) for child in module)
    ]
    if not stages:
        raise ValueError("recompute_activations: the network has no residual blocks.")
    for part in stages if what == "stage" else [block for stage in stages for block in stage]:
        _recompute(part)


def _recompute(part: nn.Module) -> None:
    forward = part.forward
    norms = [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # Reading a generator's state is work for the host, and a CUDA graph cannot record it.
    draws = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in part.modules())

    def recomputed(*args: Any) -> Any:
        if not (part.training and torch.is_grad_enabled()):
            return forward(*args)
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=draws,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(norms)),
        )

    part.forward = recomputed


@contextlib.contextmanager
def _statistics_kept(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Batch norms in training mode write their running statistics elsewhere.

    They are copied, since synchronized norms read them: processes exchange sums about the mean.
    """
    training = [norm for norm in norms if norm.training]
    kept = [dict(norm._buffers) for norm in training]
    for norm, buffers in zip(training, kept, strict=True):
        for name, buffer in buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(training, kept, strict=True):
            norm._buffers.update(buffers)
