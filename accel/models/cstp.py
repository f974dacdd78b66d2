"""CSTP, the collaborative spatio-temporal pyramid of AMS-Net, and its auxiliary head.

Source: the AMS-Net authors' published code; derived from the temporal pyramid network (TPN).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.cptm import BranchAttention, ConvNorm, clip_view, frame_view
from accel.models.heads import ConsensusHead


class TemporalModulation(nn.Module):
    """Grouped temporal convolution and a maximum over time: [N, C, T, P] -> [N, C', ceil(T/q), P].

    Args:
        in_channels: C.
        out_channels: C'.
        scale: q, frames per maximum.
        groups: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, scale: int, groups: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(
            in_channels, out_channels, (3, 1), padding=(1, 0), groups=groups, bias=False
        )

    def forward(self, clips: Tensor) -> Tensor:
        # Parity: amsnet: neither norm nor ReLU after this convolution and after `downsample`.
        return F.max_pool2d(self.conv(clips), (self.scale, 1), ceil_mode=True)


def compete(attention: BranchAttention, branches: Sequence[Tensor]) -> Tensor:
    """Shares [N, K, C] of K branches [N, C, T, P]."""
    # Parity: amsnet: the neck pools the plain sum of the branches, CPTM their mean.
    dtype = torch.promote_types(branches[0].dtype, torch.float32)
    means = torch.stack([x.mean(dim=(-2, -1), dtype=dtype) for x in branches])  # [K, N, C]
    shares: Tensor = attention(means.sum(dim=0))
    return shares


def concat_weighted(branches: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The branches side by side, each times its share.

    Args:
        branches: K tensors [N, C, T, P].
        shares: [N, K, C].

    Returns:
        [N, K*C, T, P] in the dtype of the branches.
    """
    side_by_side = torch.cat(list(branches), dim=1)  # [N, K*C, T, P]
    return side_by_side * shares.flatten(1)[:, :, None, None].to(side_by_side.dtype)


class CSTP(nn.Module):
    """Neck over two stages: [N*T, C4, 2h, 2w], [N*T, C5, h, w] -> [N*T', C5, h, w].

    Both levels are brought to C5 // 2 channels and T' = ceil(T / q) frames; a top-down and a
    bottom-up flow mix them; the four results, then the two fused flows, compete channel by channel
    (`BranchAttention`).

    Args:
        middle_channels: C4, of the last stage but one.
        channels: C5, of the last stage; even.
        num_segments: T.
        scales: q of both levels, 1..T; none: T, as published.
        gamma: inverse temperature of both competitions; 1 in every published recipe.
    """

    def __init__(
        self,
        middle_channels: int,
        channels: int,
        num_segments: int,
        *,
        scales: tuple[int, int] | None = None,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        width = channels // 2
        groups = math.gcd(32, width)  # 32 in the published width
        self.num_segments = num_segments
        self.spatial_modulation = ConvNorm(middle_channels, channels, (3, 3), stride=2)
        self.temporal_modulation = nn.ModuleList(
            TemporalModulation(channels, width, scale=scale, groups=groups)
            for scale in scales or (num_segments, num_segments)
        )
        self.downsample = nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False)
        self.top_down_levels, self.bottom_up_levels = (
            nn.ModuleList(ConvNorm(width, width, groups=groups) for _ in range(2)) for _ in range(2)
        )
        self.level_attention = BranchAttention(width, 4, rate=8, gamma=gamma)
        self.top_down = ConvNorm(channels, channels)
        self.bottom_up = ConvNorm(channels, channels)
        self.flow_attention = BranchAttention(channels, 2, rate=8, gamma=gamma)
        self.fusion = ConvNorm(2 * channels, channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, middle: Tensor, last: Tensor) -> Tensor:
        """Fused features.

        Args:
            middle: [N*T, C4, 2h, 2w], of the last stage but one.
            last: [N*T, C5, h, w], of the last stage.

        Returns:
            [N*T', C5, h, w], channels_last.
        """
        height, width = last.shape[-2:]
        maps = [
            modulate(clip_view(level, self.num_segments))  # [N, C5/2, T', h*w]
            for modulate, level in zip(
                self.temporal_modulation, (self.spatial_modulation(middle), last), strict=True
            )
        ]
        down = (maps[0] + maps[1], maps[1])
        up = (maps[0], maps[1] + self.downsample(maps[0]))
        pyramids = [fuse(x) for fuse, x in zip(self.top_down_levels, down, strict=True)]
        pyramids += [fuse(x) for fuse, x in zip(self.bottom_up_levels, up, strict=True)]
        shares = compete(self.level_attention, pyramids)  # [N, 4, C5/2]
        flows = [
            self.top_down(concat_weighted(pyramids[:2], shares[:, :2])),  # [N, C5, T', P]
            self.bottom_up(concat_weighted(pyramids[2:], shares[:, 2:])),
        ]
        shares = compete(self.flow_attention, flows)  # [N, 2, C5]
        fused = self.fusion(concat_weighted(flows, shares))  # [N, C5, T', h*w]
        return frame_view(fused, height, width)


class AuxiliaryHead(ConsensusHead):
    """Classifier on the last stage but one, for training: [N*T, C4, 2h, 2w] -> [N, K].

    3x3 convolution of stride 2 with norm and ReLU, mean over time and space, dropout, linear.

    Args:
        middle_channels: C4.
        channels: of the convolution.
        num_classes: K.
        clip_len: T.
        dropout: probability in [0, 1) of dropping a pooled feature.
        init_std: the linear layer starts at N(0, init_std) with zero bias.
    """

    def __init__(
        self,
        middle_channels: int,
        channels: int,
        num_classes: int,
        *,
        clip_len: int,
        dropout: float,
        init_std: float,
    ) -> None:
        # The head sees a clip as one map of T x H*W pixels, so it pools over time too.
        super().__init__(channels, num_classes, num_segments=1, dropout=dropout, init_std=init_std)
        self.clip_len = clip_len
        self.conv = ConvNorm(middle_channels, channels, (3, 3), stride=2)
        nn.init.xavier_uniform_(self.conv.conv.weight)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(clip_view(self.conv(features), self.clip_len))
