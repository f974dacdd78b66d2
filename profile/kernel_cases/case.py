"""What an operator's file in this folder gives to kernels_bench.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """What all cases of one run share."""

    device: str
    backend: str
    """Of the compiled operator: "cuda" or "cpp"."""

    dtype: torch.dtype
    batch: int
    """Clips."""

    num_segments: int
    sites: list[tuple[int, int]]
    """(channels, H = W) of the temporal modules in ResNet-50."""

    def activation(self, channels: int, size: int) -> Tensor:
        """[N*T, channels, size, size] of normal numbers, channels_last."""
        shape = (self.batch * self.num_segments, channels, size, size)
        x = torch.randn(shape, device=self.device).to(self.dtype)
        return x.to(memory_format=torch.channels_last)

    def coefficient(self, *shape: int) -> Tensor:
        """Normal numbers in the operators' coefficient type."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.randn(shape, device=self.device).to(wide)


@dataclass(frozen=True)
class Code:
    """One implementation and what it is called with."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor | None, ...]
    """Floating-point inputs take part in the backward pass."""


@dataclass(frozen=True)
class Case:
    """One operator at one site."""

    op: str
    form: str
    channels: int
    size: int
    floor_bytes: dict[str, int]
    """For "forward" and, if there is one, "backward": bytes that no implementation can avoid."""

    codes: dict[str, Code]
    """By name: "cuda" or "cpp" (the operator), "reference" (eager, channels_last) and, where the
    original differs from the reference, "original" (its chain of NCHW operations)."""
