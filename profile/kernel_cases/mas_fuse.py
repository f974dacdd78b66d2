"""mas_fuse at the ranks of MAS-Net: one bottleneck channel for every 64."""

import functools
from collections.abc import Iterator

import torch.nn.functional as F
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels


def original_chain(
    x: Tensor, m: Tensor, b: Tensor, d: Tensor, w: Tensor, num_segments: int
) -> Tensor:
    """The computation as the published model runs it, in NCHW.

    Motion as a 1x1 convolution; both to [N, C, T, H, W] for the weighted sum and back; to
    [N*H*W, C, T] for a depthwise convolution along time and back.
    """
    motion = F.conv2d(m, b.to(x.dtype)[..., None, None])
    batch, channels, size = x.shape[0] // num_segments, x.shape[1], x.shape[2:]

    def clips(frames: Tensor) -> Tensor:
        return frames.view(batch, num_segments, channels, *size).transpose(1, 2).contiguous()

    s0, s1 = d.view(batch, 2, channels, 1, *size).softmax(dim=1).unbind(1)
    q = clips(motion) * s0 + clips(x) * s1  # [N, C, T, H, W]
    q = q.transpose(1, 2).contiguous()
    rows = q.permute(0, 3, 4, 2, 1).reshape(-1, channels, num_segments)
    rows = F.conv1d(rows, w.to(x.dtype)[:, None], padding=1, groups=channels)
    rows = rows.view(batch, *size, channels, num_segments)
    return rows.permute(0, 4, 3, 1, 2).reshape(x.shape)


def cases(setting: Setting) -> Iterator[Case]:
    """All sites."""
    num_segments = setting.num_segments
    for channels, size in setting.sites:
        rank = max(channels // 64, 1)
        x = setting.activation(channels, size)
        m = setting.activation(rank, size)
        d = setting.activation(2 * channels, size)[: setting.batch]
        b, w = setting.coefficient(channels, rank), setting.coefficient(channels, 3)
        fuse = functools.partial(kernels.mas_fuse, num_segments=num_segments)
        bytes_per_pass = x.numel() * x.element_size()
        small = (m.numel() + d.numel()) * x.element_size()
        yield Case(
            "mas_fuse",
            "mas",
            channels,
            size,
            {"forward": 2 * bytes_per_pass + small, "backward": 3 * bytes_per_pass + 2 * small},
            {
                setting.backend: Code(
                    functools.partial(fuse, backend=setting.backend), (x, m, b, d, w)
                ),
                "reference": Code(functools.partial(fuse, backend="reference"), (x, m, b, d, w)),
                "original": Code(
                    functools.partial(original_chain, num_segments=num_segments),
                    (x.contiguous(), m.contiguous(), b, d.contiguous(), w),
                ),
            },
        )
