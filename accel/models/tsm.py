"""TSM: a ResNet whose residual branches see shifted channels of the neighboring frames.

Source: Lin et al., "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019.
"""

from typing import cast

import torch
from torch import Tensor, nn

import kernels
from accel.models.config import ModelConfig
from accel.models.heads import ConsensusHead
from accel.models.network import ClipNetwork
from accel.models.resnet import ResNet


def shift_taps(channels: int, *, fraction: int = 8) -> Tensor:
    """Taps [C, 3] (previous, same, next frame) that shift 1/fraction of the channels each way.

    The first C // fraction channels take the next frame, as many after them the previous one, the
    rest stays.
    """
    fold = channels // fraction
    taps = torch.zeros(channels, 3)
    taps[:fold, 2] = 1
    taps[fold : 2 * fold, 0] = 1
    taps[2 * fold :, 1] = 1
    return taps


class Shift(nn.Module):
    """Learned three-tap filter of every channel along time that starts as TSM's shift.

    The shift of TDN and MSN, the TIM of MAS-Net.

    Args:
        channels: C.
        num_segments: T.
    """

    def __init__(self, channels: int, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(shift_taps(channels)[:, None])

    @property
    def taps(self) -> Tensor:
        """[C, 3]; tap k multiplies segment t + k - 1."""
        return self.conv.weight[:, 0]

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Filter [N*T, C, H, W] along time, after multiplying it by gate [N, T, C] if there is one.

        Returns:
            [N*T, C, H, W] in the dtype of x, channels_last.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor = kernels.temporal_taps(x, self.taps, gate, num_segments=self.num_segments)
        return y


class ShiftedConv(nn.Module):
    """A convolution that sees C/8 channels of the next and C/8 of the previous frame.

    Args:
        net: the convolution, [N*T, C, H, W] -> [N*T, O, h, w]; the published name.
        num_segments: T, >= 1.
    """

    taps: Tensor

    def __init__(self, net: nn.Conv2d, num_segments: int) -> None:
        super().__init__()
        self.net = net
        self.num_segments = num_segments
        self.register_buffer("taps", shift_taps(net.in_channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N*T, C, H, W], time fastest -> [N*T, O, h, w]; frames outside a clip are zero."""
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor = self.net(kernels.temporal_taps(x, self.taps, num_segments=self.num_segments))
        return y


def tsm(config: ModelConfig, num_classes: int, num_segments: int) -> ClipNetwork:
    """TSM, or TSN: the plain ResNet, when the config names or asks for that."""
    trunk = ResNet(config.depth, width=config.width, stages=config.stages, stem=config.stem)
    if config.has_temporal:
        for name in trunk.stage_names:
            # Parity: TSM: in ResNet-101 only every second block of a stage shifts.
            blocks = [*trunk.get_submodule(name).children()]
            for block in blocks[:: 2 if config.depth == 101 else 1]:
                conv = cast(nn.Conv2d, block.conv1)
                block.conv1 = ShiftedConv(conv, num_segments)
    head = ConsensusHead(
        trunk.out_channels, num_classes, num_segments=num_segments, dropout=config.dropout
    )
    return ClipNetwork(
        trunk, head, system=config.name, num_segments=num_segments, partial_bn=config.partial_bn
    )
