"""Every operator in plain PyTorch: the specification that kernels and C++ twins are tested against.

Any device, any floating dtype, any strides, differentiable any number of times. Arguments are those
of the public functions, which check them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def temporal_taps(x: Tensor, w: Tensor, a: Tensor | None = None, *, num_segments: int) -> Tensor:
    """See `kernels.temporal_taps`. Computes in w's dtype, rounds once to x's."""
    batch = x.shape[0] // num_segments
    z = x.reshape(batch, num_segments, *x.shape[1:]).to(w.dtype)  # [N, T, C, H, W]
    if a is not None:
        z = z * a[..., None, None]
    first, middle, last = (
        w[..., k][..., None, :, None, None] for k in range(3)
    )  # [N?, 1, C, 1, 1]
    y: Tensor = z * middle
    y[:, 1:] += z[:, :-1] * first
    y[:, :-1] += z[:, 1:] * last
    return y.to(x.dtype).flatten(0, 1)  # [N*T, C, H, W]


def mas_fuse(x: Tensor, m: Tensor, b: Tensor, d: Tensor, w: Tensor, *, num_segments: int) -> Tensor:
    """See `kernels.mas_fuse`. Computes in w's dtype, rounds once to x's."""
    wide = w.dtype
    motion = torch.einsum("njhw,cj->nchw", m.to(wide), b)  # [N*T, C, H, W]
    weight, other = (
        torch.unflatten(d.to(wide), 1, (2, -1)).softmax(dim=1).unbind(1)
    )  # [N, C, H, W] each
    weight = weight.repeat_interleave(num_segments, 0)  # [N*T, C, H, W]
    other = other.repeat_interleave(num_segments, 0)
    q = weight * motion + other * x.to(wide)
    return temporal_taps(q, w, num_segments=num_segments).to(x.dtype)


def diff_gate_shift(
    x: Tensor, z: Tensor, v: Tensor, m: Tensor, c: Tensor, w: Tensor, *, num_segments: int
) -> Tensor:
    """See `kernels.diff_gate_shift`. Computes in w's dtype, rounds once to x's."""
    wide = w.dtype
    gates = [
        torch.sigmoid(torch.einsum("nrhw,cr->nchw", s.to(wide), m[i]) + c[i][:, None, None])
        for i, s in enumerate((z, v))
    ]
    gated = x.to(wide) * (0.5 + 0.5 * (gates[0] + gates[1]))  # [N*T, C, H, W]
    return temporal_taps(gated, w, num_segments=num_segments).to(x.dtype)


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor | None = None,
    *,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
    pool: bool = False,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `kernels.bn_act`. The norm rounds to x's dtype before the shortcut is added."""
    if training and all_reduce is not None:
        y = _synchronized_norm(
            x, weight, bias, running_mean, running_var, momentum, eps, all_reduce
        )
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if shortcut is not None:
        y = y + shortcut
    if relu:
        y = F.relu(y)
    return (y, y.mean(dim=(-2, -1), dtype=weight.dtype)) if pool else y


def _synchronized_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    all_reduce: Callable[[Tensor], object],
) -> Tensor:
    """Batch norm with the statistics of all processes."""
    z = x.to(weight.dtype)
    rows = x.numel() // x.shape[1]
    mean = z.sum(dim=(0, 2, 3)) / max(rows, 1)
    var = (z - mean[:, None, None]).square().sum(dim=(0, 2, 3)) / max(rows, 1)
    mean, var, count = exchange_statistics(mean, var, rows, running_mean, all_reduce)
    update_running(running_mean, running_var, mean, var, count, momentum)
    scale = weight * (var + eps).rsqrt()
    return ((z - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]).to(x.dtype)


def exchange_statistics(
    mean: Tensor, var: Tensor, rows: int, shift: Tensor, all_reduce: Callable[[Tensor], object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of rows of all processes, from those of each.

    Args:
        mean, var: [C], of this process; the variance divided by its rows.
        rows: of this process, 0 is allowed.
        shift: [C], equal on all processes: they exchange sums and sums of squares about it.
        all_reduce: see `kernels.bn_act`; called once.

    Returns:
        mean [C], var [C], rows [1].
    """
    distance = mean - shift
    count = mean.new_full((1,), rows)  # filled on the device: nothing is copied there
    own = torch.cat([rows * distance, rows * (var + distance.square()), count])
    total: Tensor = _AllReduce.apply(own, all_reduce)  # type: ignore[no-untyped-call]
    distance, squares = (total[:-1] / total[-1]).chunk(2)
    return shift + distance, (squares - distance.square()).clamp_min(0), total[-1:]


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float,
) -> None:
    """One step of the running statistics towards those of `count` rows, in place."""
    unbiased = var * (count / (count - 1).clamp_min(1))
    running_mean.lerp_(mean.detach(), momentum)
    running_var.lerp_(unbiased.detach(), momentum)


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, all_reduce: Callable[[Tensor], object]) -> Tensor:
        ctx.all_reduce = all_reduce
        total = value.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        ctx.all_reduce(total)
        return total, None


def deform_conv(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `kernels.deform_conv`. Samples in fp32 (fp64)."""
    batch, channels, height, width = x.shape
    k = weight.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = offset.to(wide).reshape(batch, k * k, 2, height, width)
    taps = torch.arange(k, device=x.device, dtype=wide) - k // 2
    rows = torch.arange(height, device=x.device, dtype=wide)[:, None]  # [H, 1]
    columns = torch.arange(width, device=x.device, dtype=wide)  # [W]
    y = shift[:, :, 0] + taps.repeat_interleave(k)[:, None, None] + rows  # [B, k*k, H, W]
    z = shift[:, :, 1] + taps.repeat(k)[:, None, None] + columns
    inside = (y > -1) & (y < height) & (z > -1) & (z < width)
    y, z = torch.where(inside, y, 0), torch.where(inside, z, 0)  # not infinite: 0 times it is NaN
    top, left = y.floor(), z.floor()
    down, right = y - top, z - left  # within the cell; the derivative of floor is 0
    corners, shares = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        i, j = top + dy, left + dx
        exists = inside & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        corners.append(torch.where(exists, i * width + j, 0).long())
        share = (down if dy else 1 - down) * (right if dx else 1 - right)
        shares.append(torch.where(exists, share, 0))
    index = torch.stack(corners, 1).flatten(1)  # [B, 4*k*k*H*W]
    # One gather: the gradient of four that are added up comes out as 0 from Inductor's C++
    # (torch 2.13) where a convolution made x and the offsets have a gradient too.
    found = x.to(wide).flatten(2).gather(2, index[:, None].expand(-1, channels, -1))
    found = found.view(batch, channels, 4, k * k, height, width)
    samples = (found * torch.stack(shares, 1)[:, None]).sum(2)  # [B, C, k*k, H, W]
    out = torch.einsum("bcqhw,ocq->bohw", samples, weight.to(wide).flatten(2))
    if bias is not None:
        out = out + bias.to(wide)[:, None, None]
    return out.to(x.dtype)


def branch_fuse(f1: Tensor, f2: Tensor, f3: Tensor, s: Tensor, *, num_segments: int) -> Tensor:
    """See `kernels.branch_fuse`. Computes in s's dtype, rounds once to the branches'."""
    shares = s.repeat_interleave(num_segments, 0)[..., None, None]  # [N*T, 3, C, 1, 1]
    terms = [f.to(s.dtype) * shares[:, i] for i, f in enumerate((f1, f2, f3))]
    return (terms[0] + terms[1] + terms[2]).to(f1.dtype)


def ingest(
    frames: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype,
    frames_per_segment: int,
    channels: int,
) -> Tensor:
    """See `kernels.ingest`. One multiply-add in mean's dtype, one rounding to `dtype`."""
    scale = (1.0 / (std * 255.0)).repeat(frames_per_segment)
    offset = (-mean / std).repeat(frames_per_segment)
    stacked = _stack_frames(frames, frames_per_segment).to(mean.dtype)
    y = torch.addcmul(offset, stacked, scale)  # [B, H, W, 3*L]
    y = F.pad(y, (0, channels - y.shape[-1])).to(dtype)
    return y.permute(0, 3, 1, 2)  # [B, channels, H, W], channels_last


def ingest_differences(
    frames: Tensor, std: Tensor, *, dtype: torch.dtype, frames_per_segment: int
) -> Tensor:
    """See `kernels.ingest_differences`. The mean cancels: exact differences of the stored bytes."""
    scale = (1.0 / (std * 255.0)).repeat(frames_per_segment - 1)
    wide = _stack_frames(frames, frames_per_segment).to(std.dtype)
    y = (wide[..., 3:] - wide[..., :-3]) * scale  # [B, H, W, 3*(L-1)]
    return y.to(dtype).permute(0, 3, 1, 2)  # channels_last


def _stack_frames(frames: Tensor, frames_per_segment: int) -> Tensor:
    """[B*L, H, W, 3] -> [B, H, W, 3*L], frame-major channels."""
    segments = torch.unflatten(frames, 0, (-1, frames_per_segment))  # [B, L, H, W, 3]
    return segments.permute(0, 2, 3, 1, 4).flatten(3)


def nms(boxes: Tensor, candidates: Tensor, *, iou_threshold: float) -> Tensor:
    """Which boxes [S, K, 4], best first, stay; only the first candidates[s] of set s take part."""
    first, second = boxes[:, :, None], boxes[:, None]
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(
        first[..., :2], second[..., :2]
    )
    shared = sides.clamp(min=0).prod(dim=-1)  # [S, K, K]
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)  # [S, K]
    spares = shared / (area[:, :, None] + area[:, None] - shared) <= iou_threshold
    keep = torch.arange(boxes.shape[1], device=boxes.device) < candidates[:, None]  # [S, K]
    for i in range(boxes.shape[1] - 1):
        keep[:, i + 1 :] &= ~keep[:, i, None] | spares[:, i, i + 1 :]
    return keep
