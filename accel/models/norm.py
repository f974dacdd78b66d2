"""Batch normalization with what surrounds it in a residual block.

Behind it: shortcut addition and ReLU. Before it: a convolution whose bias it cancels.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels

Implementation = Literal["auto", "fused", "torch"]
"""Of the batch norms: the operator `kernels.bn_act`, PyTorch's operations one after the other, or
whichever of the two is known to be faster on the device."""

# Device types where whole training steps were measured at least 5 % faster with the operator.
_FUSED_IS_FASTER: frozenset[str] = frozenset()


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm, then an optional shortcut is added, then an optional ReLU.

    Parameters, buffers and state-dict names are those of `nn.BatchNorm2d`. The implementation
    "fused" rounds once, at the end, where "torch" rounds the norm before it adds the shortcut.

    Args:
        num_features: C.
        relu: end with a ReLU.
    """

    def __init__(self, num_features: int, *, relu: bool = True) -> None:
        super().__init__(num_features)
        self.relu = relu
        self.implementation: Implementation = "auto"
        self.all_reduce: Callable[[Tensor], object] | None = None

    def forward(  # type: ignore[override]  # a pair with `pool`
        self, x: Tensor, shortcut: Tensor | None = None, *, pool: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """relu(norm(x) + shortcut).

        Args:
            x: [NT, C, H, W]; "fused" copies other layouts than channels_last.
            shortcut: like x, or None.
            pool: also return the mean over H and W.

        Returns:
            [NT, C, H, W], layout of x; with `pool` this and [NT, C] in the dtype of the weight.
        """
        if self.implementation == "fused" or (
            self.implementation == "auto" and x.device.type in _FUSED_IS_FASTER
        ):
            return self._fused(x, shortcut, pool)
        y = super().forward(x)
        if shortcut is not None:
            y = y + shortcut
        if self.relu:
            y = F.relu(y, inplace=True)
        return (y, y.mean(dim=(-2, -1), dtype=self.weight.dtype)) if pool else y

    def _fused(
        self, x: Tensor, shortcut: Tensor | None, pool: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        # Set by nn.BatchNorm2d for norms that keep running statistics, as all of ours do.
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        return kernels.bn_act(
            x.contiguous(memory_format=torch.channels_last),
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            shortcut,
            relu=self.relu,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            pool=pool,
            all_reduce=self.all_reduce,
        )


class ConvBeforeNorm2d(nn.Conv2d):
    """`nn.Conv2d` that can be told that a norm cancels its bias, if it has one: see `conv_norm`."""

    def forward(self, input: Tensor, *, bias_cancels: bool = False) -> Tensor:
        if self.bias is None or not bias_cancels:
            return super().forward(input)
        y = self._conv_forward(input, self.weight, self.bias.detach())
        without_sum: Tensor = _ZeroGradient.apply(y, self.bias)  # type: ignore[no-untyped-call]
        return without_sum


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
    """norm(conv(x), *args, **options); in training without computing the bias's gradient.

    The statistics of a batch take the bias of a `ConvBeforeNorm2d` out again, so its gradient is 0.
    It is set to that, instead of summing the output's gradient over all pixels to rounding errors.

    Args:
        conv: [B, C, H, W] -> [B, C', h, w].
        norm: batch norm with running statistics.
        x: [B, C, H, W].
        *args, **options: of the norm.
    """
    if isinstance(conv, ConvBeforeNorm2d):
        return norm(conv(x, bias_cancels=norm.training), *args, **options)
    return norm(conv(x), *args, **options)


class _ZeroGradient(torch.autograd.Function):
    """The first argument; the second gets a gradient of zeros, not none: its decay goes on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.zeros_like(ctx.saved_tensors[0])


def set_implementation(model: nn.Module, implementation: Implementation) -> None:
    """Choose what runs the `BatchNormAct2d` layers of a model.

    Raises:
        ValueError: no such implementation.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"set_implementation: got {implementation!r}, expected one of "
            f"{list(get_args(Implementation))}."
        )
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.implementation = implementation


def synchronize(model: nn.Module, all_reduce: Callable[[Tensor], object]) -> None:
    """Give the `BatchNormAct2d` layers of a model the statistics of all processes in training.

    Their implementation becomes "fused". Norms of other kinds keep the statistics of their process.

    Args:
        model: the same on every process.
        all_reduce: sums a tensor over the processes, in place.
    """
    set_implementation(model, "fused")
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.all_reduce = all_reduce
