"""deform_conv as MSN uses it: a quarter of the channels, all frames but one, frozen weights."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels


def original_chain(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The computation as published models run it: columns of the whole batch, then a GEMM, in NCHW.

    The columns come from grid sampling, which has the same borders.
    """
    batch, channels, height, width = x.shape
    k = weight.shape[-1]
    wide = weight.dtype
    moves = offset.to(wide).unflatten(1, (k, k, 2))  # [B, k, k, 2, H, W]
    taps = torch.arange(k, dtype=wide, device=x.device) - k // 2
    rows = torch.arange(height, dtype=wide, device=x.device)[:, None]  # [H, 1]
    columns = torch.arange(width, dtype=wide, device=x.device)
    y = moves[:, :, :, 0] + taps[:, None, None, None] + rows  # [B, k, k, H, W]
    z = moves[:, :, :, 1] + taps[:, None, None] + columns
    grid = torch.stack([2 * z / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    samples = F.grid_sample(
        x.to(wide), grid.view(batch, -1, width, 2), padding_mode="zeros", align_corners=True
    )
    samples = samples.view(batch, channels * k * k, height * width)
    out = torch.baddbmm(bias[:, None], weight.flatten(1).expand(batch, -1, -1), samples)
    return out.view(batch, -1, height, width).to(x.dtype)


def cases(setting: Setting) -> Iterator[Case]:
    """Both kernel sizes at all sites."""
    batch = setting.batch * (setting.num_segments - 1)
    for (channels, size), k in itertools.product(setting.sites, (3, 5)):
        channels //= 4
        frames = dataclasses.replace(setting, batch=batch, num_segments=1)
        x, offset = frames.activation(channels, size), frames.activation(2 * k * k, size)
        weight = setting.coefficient(channels, channels, k, k) / (k * channels**0.5)
        weight = weight.contiguous(memory_format=torch.channels_last)
        bias = setting.coefficient(channels)

        operator = functools.partial(
            functools.partial, kernels.deform_conv, weight=weight, bias=bias
        )
        map_bytes, offset_bytes = (v.numel() * v.element_size() for v in (x, offset))
        yield Case(
            "deform_conv",
            f"k{k}",
            channels,
            size,
            {
                "forward": 2 * map_bytes + offset_bytes,
                "backward": 3 * map_bytes + 2 * offset_bytes,
            },
            {
                setting.backend: Code(operator(backend=setting.backend), (x, offset)),
                "reference": Code(operator(backend="reference"), (x, offset)),
                "original": Code(
                    functools.partial(original_chain, weight=weight.contiguous(), bias=bias),
                    (x.contiguous(), offset.contiguous()),
                ),
            },
        )
