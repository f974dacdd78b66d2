"""MAS-Net: a ResNet that accumulates motion, selects it against appearance, and mixes in time.

Source: the authors' released code ("MAS-Net", Something-Something and Kinetics models).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from accel.models.config import ModelConfig
from accel.models.heads import ConsensusHead
from accel.models.network import ClipNetwork
from accel.models.norm import BatchNormAct2d
from accel.models.resnet import ResNet
from accel.models.tsm import Shift


class MotionAccumulation(nn.Module):
    """MAM: reduced features averaged with the next frame's: [N*T, C, H, W] -> [N*T, r, H, W].

    With b = norm(conv1(x)), frame t of the result is (b[t] + alpha * b[t+1]) / (1 + alpha) (the
    published module's weighted average), the last frame b[T-1]. The motion m = conv3(result) is
    not formed here: it is full-size, and its users need only its mean over t and a product.

    Args:
        channels: C.
        num_segments: T.
        reduction: r = C // reduction, at least 1.
        alpha: weight of the next frame.
    """

    def __init__(
        self, channels: int, num_segments: int, *, reduction: int = 64, alpha: float = 0.5
    ) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.next_weight = alpha / (1 + alpha)
        reduced = max(channels // reduction, 1)
        self.conv1 = nn.Conv2d(channels, reduced, 1, bias=False)
        self.bn1 = BatchNormAct2d(reduced, relu=False)
        self.conv3 = nn.Conv2d(reduced, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixed reduced features [N*T, r, H, W] of x [N*T, C, H, W]."""
        # conv1 as a matrix product, which is faster where there are few outputs.
        b = F.linear(x.permute(0, 2, 3, 1), self.conv1.weight.flatten(1)).permute(0, 3, 1, 2)
        b = _clips(self.bn1(b), self.num_segments)  # [N, T, H, W, r]
        # Parity: MAS-Net: the last frame has no next one and passes unchanged.
        following = torch.cat([b[:, 1:], b[:, -1:]], dim=1)
        mixed = torch.lerp(b, following, self.next_weight)
        return mixed.flatten(0, 1).permute(0, 3, 1, 2)  # [N*T, r, H, W]


class MotionSelection(nn.Module):
    """MSM: per position and channel of a clip, the logits of motion and of appearance.

    Args:
        channels: C.
        faithful: skip norm and ReLU for a single clip, as the released code does.
        reduction: C // reduction channels between the convolutions.
        groups: of both convolutions; fewer where the channels do not allow it.
    """

    def __init__(
        self, channels: int, *, faithful: bool = True, reduction: int = 4, groups: int = 4
    ) -> None:
        super().__init__()
        self.faithful = faithful
        squeezed = channels // reduction
        self.groups = math.gcd(groups, squeezed)
        # 3-D kernels of one frame, as published; used as 2-D convolutions of the temporal mean.
        self.conv_fc1 = nn.Conv3d(
            channels, squeezed, (1, 3, 3), padding=(0, 1, 1), groups=self.groups, bias=False
        )
        self.bn_fc1 = BatchNormAct2d(squeezed)
        self.conv_fc2 = nn.Conv3d(
            squeezed, 2 * channels, (1, 3, 3), padding=(0, 1, 1), groups=self.groups, bias=False
        )

    def forward(self, mean: Tensor) -> Tensor:
        """Logits [N, 2C, H, W], motion first, of the summed temporal means [N, C, H, W]."""
        z = F.conv2d(mean, self.conv_fc1.weight.squeeze(2), padding=1, groups=self.groups)
        # Parity: MAS-Net: the released code skips norm and ReLU when the call has exactly one clip
        # (per device), in training and evaluation; its one-clip scores are made that way.
        if not self.faithful or mean.shape[0] != 1:
            z = self.bn_fc1(z)
        return F.conv2d(z, self.conv_fc2.weight.squeeze(2), padding=1, groups=self.groups)


class MotionAppearance(nn.Module):
    """The three modules of a MAS-Net block: [N*T, C, H, W] -> the same.

    With m the accumulated motion (MAM), s the share of motion (MSM; the same for all frames of a
    clip) and k the taps of TIM, a learned shift:

        y[n,t] = sum_j k[j] * f[n,t+j-1],   f[n,t] = s[n] * m[n,t] + (1 - s[n]) * x[n,t]

    with zero outside 0..T-1.

    Args:
        channels: C.
        num_segments: T, >= 1.
        faithful: see `MotionSelection`.
    """

    def __init__(self, channels: int, num_segments: int, *, faithful: bool = True) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.mam = MotionAccumulation(channels, num_segments)
        self.msm = MotionSelection(channels, faithful=faithful)
        self.tim = Shift(channels, num_segments)

    def forward(self, x: Tensor) -> Tensor:
        """Filter the clips.

        Args:
            x: [N*T, C, H, W], time fastest; copied once unless channels_last.

        Returns:
            [N*T, C, H, W] in the dtype of x, channels_last.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        mixed = self.mam(x)  # [NT, r, H, W]
        # conv3 is linear: the mean of the motion is conv3 of the mean.
        mean = _mean(x, self.num_segments) + self.mam.conv3(_mean(mixed, self.num_segments))
        logits = self.msm(mean)  # [N, 2C, H, W]
        motion = self.mam.conv3.weight.flatten(1)  # [C, r]
        return kernels.mas_fuse(
            x, mixed, motion, logits, self.tim.taps, num_segments=self.num_segments
        )


def _clips(x: Tensor, num_segments: int) -> Tensor:
    """[N*T, C, H, W], channels_last -> [N, T, H, W, C], contiguous, the same memory."""
    return torch.unflatten(x.permute(0, 2, 3, 1), 0, (-1, num_segments))


def _mean(x: Tensor, num_segments: int) -> Tensor:
    """Mean over time: [N*T, C, H, W] -> [N, C, H, W], both channels_last."""
    # Not mean(): its gradient would be written out for every frame, that of a sum is a view.
    return (_clips(x, num_segments).sum(dim=1) / num_segments).permute(0, 3, 1, 2)


def masnet(config: ModelConfig, num_classes: int, num_segments: int) -> ClipNetwork:
    """MAS-Net; without its modules when the config asks for plain frames."""

    def module(channels: int, _stage: int) -> MotionAppearance:
        return MotionAppearance(channels, num_segments, faithful=config.faithful)

    trunk = ResNet(
        config.depth,
        width=config.width,
        stages=config.stages,
        stem=config.stem,
        # Parity: MAS-Net: every convolution of the trunk has a bias. Batch norms cancel it in
        # training, but published running means were taken with it.
        bias=True,
        temporal=module if config.has_temporal else None,
    )
    head = ConsensusHead(
        trunk.out_channels, num_classes, num_segments=num_segments, dropout=config.dropout
    )
    return ClipNetwork(
        trunk, head, system=config.name, num_segments=num_segments, partial_bn=config.partial_bn
    )
