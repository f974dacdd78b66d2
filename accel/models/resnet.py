"""ResNet-18/34/50/101 over single frames, with one slot for a temporal module in every block.

Source: He et al. 2016, in the variant of torchvision (the stride of a bottleneck is in its 3x3
convolution). Parameter names are torchvision's, so its ImageNet weights need no renaming.
Everything runs in channels_last; frames of all clips are folded into the batch: [N*T, C, H, W].
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from accel.models.norm import BatchNormAct2d, ConvBeforeNorm2d, conv_norm

TemporalFactory = Callable[[int, int], nn.Module | None]
"""Makes the temporal module of one block (None: none), given the channels at the slot and the
stage, 1..4."""

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}


class _Shortcut(nn.Sequential):
    """1x1 convolution and norm, without ReLU."""

    def __init__(self, inplanes: int, outplanes: int, stride: int, bias: bool) -> None:
        super().__init__(
            ConvBeforeNorm2d(inplanes, outplanes, 1, stride=stride, bias=bias),
            BatchNormAct2d(outplanes, relu=False),
        )

    def forward(self, input: Tensor) -> Tensor:
        conv, norm = self
        y: Tensor = conv_norm(conv, norm, input)
        return y


def to_channels_last(module: nn.Module) -> None:
    """Lay out the 2-D kernels of a module; `Module.to` would refuse if it held 3-D ones too."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            weight = parameter.data.contiguous(memory_format=torch.channels_last)
            _, channels, height, width = weight.shape
            # The memory of a 1x1 kernel can be described in two ways. Gradients have this one, and
            # DistributedDataParallel warns of (and copies for) parameters that differ from it.
            strides = (channels * height * width, 1, width * channels, channels)
            parameter.data = weight.as_strided(weight.shape, strides)


def _conv_norm_temporal(
    conv: nn.Module, norm: BatchNormAct2d, temporal: nn.Module, x: Tensor
) -> Tensor:
    """A convolution, its norm, and what fills the slot; with `takes_pooled` that gets the means."""
    y: Tensor
    if getattr(temporal, "takes_pooled", False):
        y, pooled = conv_norm(conv, norm, x, pool=True)
        y = temporal(y, pooled)
    else:
        y = temporal(conv_norm(conv, norm, x))
    return y


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [NT, inplanes, H, W] -> [NT, planes, H/s, W/s].

    Args:
        inplanes: channels of the input.
        planes: channels of both convolutions and of the output.
        stride: s, of the first convolution and of the shortcut.
        downsample: put a 1x1 convolution and a batch norm on the shortcut.
        bias: give the convolutions biases.
        temporal: module for the slot, keeps the shape [NT, planes, H/s, W/s]; none: identity.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        downsample: bool = False,
        bias: bool = False,
        temporal: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ConvBeforeNorm2d(inplanes, planes, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = BatchNormAct2d(planes)
        self.conv2 = ConvBeforeNorm2d(planes, planes, 3, padding=1, bias=bias)
        self.bn2 = BatchNormAct2d(planes)
        self.downsample = _Shortcut(inplanes, planes, stride, bias) if downsample else nn.Identity()
        self.temporal = temporal or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Our extension: the published temporal modules exist for bottlenecks only. The slot is at
        # the same place, after the first convolution, which here already has the stride.
        y = _conv_norm_temporal(self.conv1, self.bn1, self.temporal, x)  # [NT, planes, H/s, W/s]
        out: Tensor = conv_norm(self.conv2, self.bn2, y, self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: [NT, inplanes, H, W] -> [NT, 4*planes, H/s, W/s].

    Args:
        inplanes: channels of the input.
        planes: channels of the first two convolutions and of the slot.
        stride: s, of the 3x3 convolution and of the shortcut.
        downsample: put a 1x1 convolution and a batch norm on the shortcut.
        bias: give the convolutions biases.
        temporal: module for the slot between the first two convolutions, keeps the shape
            [NT, planes, H, W] (before the stride); none: identity.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        downsample: bool = False,
        bias: bool = False,
        temporal: nn.Module | None = None,
    ) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = ConvBeforeNorm2d(inplanes, planes, 1, bias=bias)
        self.bn1 = BatchNormAct2d(planes)
        self.conv2 = ConvBeforeNorm2d(planes, planes, 3, stride=stride, padding=1, bias=bias)
        self.bn2 = BatchNormAct2d(planes)
        self.conv3 = ConvBeforeNorm2d(planes, outplanes, 1, bias=bias)
        self.bn3 = BatchNormAct2d(outplanes)
        self.downsample = (
            _Shortcut(inplanes, outplanes, stride, bias) if downsample else nn.Identity()
        )
        self.temporal = temporal or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = _conv_norm_temporal(self.conv1, self.bn1, self.temporal, x)  # [NT, planes, H, W]
        y = conv_norm(self.conv2, self.bn2, y)  # [NT, planes, H/s, W/s]
        # [NT, 4*planes, H/s, W/s]
        out: Tensor = conv_norm(self.conv3, self.bn3, y, self.downsample(x))
        return out


class ResNet(nn.Module):
    """Feature extractor of single frames: [NT, 3, H, W] -> [NT, out_channels, h, w].

    Convolutions start from Kaiming's normal distribution (fan out, ReLU), drawn from torch's
    global generator; temporal modules keep their own initialization.

    Args:
        depth: 18, 34 (basic blocks), 50 or 101 (bottlenecks).
        width: channels of the stem and planes of the first stage; doubled in every further stage.
        stages: number of stages kept, 1..4.
        stem: "imagenet": 7x7 convolution of stride 2 and 3x3 max-pool of stride 2;
            "small" (for inputs below about 100 pixels): 3x3 convolution of stride 2 alone.
        bias: give all convolutions biases.
        in_channels: of the frames.
        temporal: makes the temporal module of each block; none: plain ResNet.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = 64,
        stages: int = 4,
        stem: Literal["imagenet", "small"] = "imagenet",
        bias: bool = False,
        in_channels: int = 3,
        temporal: TemporalFactory | None = None,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"ResNet: depth must be one of {[*BLOCKS_PER_STAGE]}, got {depth}.")
        if not 1 <= stages <= 4:
            raise ValueError(f"ResNet: stages must be in 1..4, got {stages}.")
        small = stem == "small"
        kernel = 3 if small else 7
        self.conv1 = ConvBeforeNorm2d(
            in_channels, width, kernel, stride=2, padding=kernel // 2, bias=bias
        )
        self.bn1 = BatchNormAct2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)

        block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth < 50 else Bottleneck
        inplanes = width
        self.stage_names = tuple(f"layer{i + 1}" for i in range(stages))
        for i, name in enumerate(self.stage_names):
            planes = width * 2**i
            outplanes = planes * block.expansion
            blocks = []
            for j in range(BLOCKS_PER_STAGE[depth][i]):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride=stride,
                        downsample=stride != 1 or inplanes != outplanes,
                        bias=bias,
                        temporal=temporal(planes, i + 1) if temporal else None,
                    )
                )
                inplanes = outplanes
            self.add_module(name, nn.Sequential(*blocks))
        self.out_channels = inplanes

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        to_channels_last(self)

    def forward(self, frames: Tensor) -> Tensor:
        """Feature map of the last stage; the submodules `maxpool`, `layer1`.. give the others.

        Args:
            frames: [NT, 3, H, W], any floating dtype; copied once unless channels_last.

        Returns:
            [NT, out_channels, h, w], channels_last.
        """
        x = frames.contiguous(memory_format=torch.channels_last)
        x = conv_norm(self.conv1, self.bn1, x)  # [NT, width, H/2, W/2]
        x = self.maxpool(x)  # [NT, width, H/4, W/4]
        for name in self.stage_names:
            x = self.get_submodule(name)(x)  # [NT, C_i, H/2^(i+2), W/2^(i+2)]
        features: Tensor = x
        return features
