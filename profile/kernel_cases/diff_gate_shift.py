"""diff_gate_shift at the sites of TDN, whose bottleneck has C/16 channels."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels


def original_chain(
    x: Tensor, z: Tensor, v: Tensor, m: Tensor, c: Tensor, w: Tensor, num_segments: int
) -> Tensor:
    """The computation as published: every C-channel map formed, NCHW copies around the shift.

    The norm stands for the published batch norm: a pass of its own, statistics as constants.
    """
    excitations = []
    for i, side in enumerate((z, v)):
        f = F.conv2d(side, m[i, :, :, None, None].to(x.dtype))
        unit = torch.ones_like(c[i])
        f = F.batch_norm(f, torch.zeros_like(unit), unit, unit, c[i], eps=0)
        excitations.append(torch.sigmoid(f) - 0.5)
    q = x + x * (0.5 * excitations[0] + 0.5 * excitations[1])
    batch, channels, size = x.shape[0] // num_segments, x.shape[1], x.shape[2:]
    rows = q.view(batch, num_segments, channels, *size).permute(0, 3, 4, 2, 1)
    rows = rows.reshape(-1, channels, num_segments)  # [N*H*W, C, T], copied
    rows = F.conv1d(rows, w[:, None].to(x.dtype), padding=1, groups=channels)
    clips = rows.view(batch, *size, channels, num_segments).permute(0, 4, 3, 1, 2)
    return clips.reshape(x.shape)


def cases(setting: Setting) -> Iterator[Case]:
    """All sites, also those of stage 1, where TDN has none."""
    for channels, size in setting.sites:
        rank = max(channels // 16, 1)
        x = setting.activation(channels, size)
        z, v = (setting.activation(rank, size) for _ in range(2))
        m = setting.coefficient(2, channels, rank) / rank**0.5
        inputs = (x, z, v, m, setting.coefficient(2, channels), setting.coefficient(channels, 3))
        operator = functools.partial(kernels.diff_gate_shift, num_segments=setting.num_segments)
        large, small = (value.numel() * value.element_size() for value in (x, z))
        yield Case(
            "diff_gate_shift",
            "tdn",
            channels,
            size,
            {"forward": 2 * large + 2 * small, "backward": 3 * large + 4 * small},
            {
                setting.backend: Code(functools.partial(operator, backend=setting.backend), inputs),
                "reference": Code(functools.partial(operator, backend="reference"), inputs),
                "original": Code(
                    functools.partial(original_chain, num_segments=setting.num_segments),
                    (*(value.contiguous() for value in inputs[:3]), *inputs[3:]),
                ),
            },
        )
