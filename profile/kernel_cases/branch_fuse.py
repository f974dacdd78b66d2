"""branch_fuse: AMS-Net's weighted sum of three branches (64 channels at 56x56, 256 at 14x14)."""

import functools
from collections.abc import Iterator

import torch
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels


def original_chain(f1: Tensor, f2: Tensor, f3: Tensor, s: Tensor, num_segments: int) -> Tensor:
    """The computation as the published model runs it: branches concatenated, in [N, C, T, H, W].

    Its branches grow by concatenation: f1, then f1 and f2, then all three.
    """
    batch, channels, size = f1.shape[0] // num_segments, f1.shape[1], f1.shape[2:]
    branches = [
        f.view(batch, 1, num_segments, channels, *size).transpose(2, 3) for f in (f1, f2, f3)
    ]
    grown = torch.cat([torch.cat(branches[:2], dim=1), branches[2]], dim=1)
    shares = s.to(f1.dtype)[..., None, None, None]  # [N, 3, C, 1, 1, 1]
    fused = (grown * shares).sum(dim=1)  # [N, C, T, H, W]
    return fused.transpose(1, 2).reshape(f1.shape)


def cases(setting: Setting) -> Iterator[Case]:
    """All sites."""
    num_segments = setting.num_segments
    for channels, size in setting.sites:
        branches = tuple(setting.activation(channels, size) for _ in range(3))
        s = setting.coefficient(setting.batch, 3, channels)
        fuse = functools.partial(kernels.branch_fuse, num_segments=num_segments)
        bytes_per_pass = branches[0].numel() * branches[0].element_size()
        yield Case(
            "branch_fuse",
            "ams",
            channels,
            size,
            {"forward": 4 * bytes_per_pass, "backward": 7 * bytes_per_pass},
            {
                setting.backend: Code(
                    functools.partial(fuse, backend=setting.backend), (*branches, s)
                ),
                "reference": Code(functools.partial(fuse, backend="reference"), (*branches, s)),
                "original": Code(
                    functools.partial(original_chain, num_segments=num_segments),
                    (*(f.contiguous() for f in branches), s),
                ),
            },
        )
