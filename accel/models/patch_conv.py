"""A strided convolution that reads its weights once per batch on a CPU."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

MIN_WEIGHTS = 2**22
"""16 MB in float32. Below, the weights stay in the cache and the plain convolution is as fast."""

# In float32 products go through the operator that compiled graphs call for linear layers: oneDNN
# uses AVX-512 wherever there is any, MKL (torch.mm) only on processors of its own maker and is half
# as fast on others. It is no public operator, so torch.mm stays as the other way.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _linear_flops(rows: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count = 2 * weight[0] * weight[1]
    for extent in rows[:-1]:
        count *= extent
    return cast(int, count)


if _LINEAR is not None:
    register_flop_formula(_LINEAR)(_linear_flops)


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` with a square kernel and without bias, dilation or groups, and the same numbers.

    On a CPU, a convolution goes image by image: with small maps and many channels it reads weights
    that exceed the cache once for each image, and runs at half the speed of the machine. From
    `MIN_WEIGHTS` weights on, eager code therefore multiplies the patches of all images at once.
    Elsewhere (on a GPU, under autocast, in compiled and exported graphs) it is the convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        if (
            input.device.type != "cpu"
            or self.weight.numel() < MIN_WEIGHTS
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        result: Tensor = _PatchProduct.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.stride[0], cast(tuple[int, int], self.padding)[0]
        )
        return result


class _PatchProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        patches = _patches(x, weight.shape[-1], stride, padding)  # [N, h, w, k*k*C]
        # The patches of a 3x3 kernel of stride 2 are about twice the input, which stays alive too.
        ctx.save_for_backward(patches, weight)
        ctx.size, ctx.stride, ctx.padding = x.shape[-2:], stride, padding
        y = _product(patches.flatten(0, 2), _matrix(weight))
        return y.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        patches, weight = ctx.saved_tensors
        channels, kernel = weight.shape[1], weight.shape[-1]
        rows = dy.permute(0, 2, 3, 1).flatten(0, 2)  # [R, C']
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            product = _product(rows.t(), patches.flatten(0, 2).t())  # [C', k*k*C]
            dweight = product.view(-1, kernel, kernel, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            # A copy of the weights in the order of the product is worth its time.
            dpatches = _product(rows, _matrix(weight).t().contiguous())
            height, width = (extent + 2 * ctx.padding for extent in ctx.size)
            padded = dy.new_zeros(dy.shape[0], height, width, channels)
            parts = dpatches.view(*dy.shape[:1], *dy.shape[2:], kernel * kernel, channels).unbind(3)
            for part, window in zip(
                parts, _windows(padded, kernel, ctx.stride, dy.shape[-2:]), strict=True
            ):
                window.add_(part)
            inner = slice(ctx.padding, -ctx.padding or None)
            dx = padded[:, inner, inner].permute(0, 3, 1, 2)
        return dx, dweight, None, None


def _matrix(weight: Tensor) -> Tensor:
    """[C', C, k, k] -> [C', k*k*C], the same memory in channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _windows(padded: Tensor, kernel: int, stride: int, size: torch.Size) -> list[Tensor]:
    """What each tap of the kernel sees: k*k views [N, h, w, C] of [N, H, W, C]."""
    height, width = ((extent - 1) * stride + 1 for extent in size)
    return [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]


def _patches(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """[N, C, H, W] -> [N, h, w, k*k*C]."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    size = torch.Size((extent - kernel) // stride + 1 for extent in padded.shape[1:3])
    return torch.cat(_windows(padded, kernel, stride, size), dim=-1)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """[R, K], [M, K] -> [R, M]."""
    if _LINEAR is None or rows.dtype != torch.float32:
        return rows @ weight.t()
    result: Tensor = _LINEAR(rows, weight, None, "none", [], "")
    return result
