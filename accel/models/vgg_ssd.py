"""VGG16-SSD300: the frame network of AMTNet, and the single-frame detector of ROAD."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.detection.priors import BOXES_PER_CELL

# Channels of the published width, None: pooling. Position = index in published files, with a ReLU
# behind each convolution.
_VGG = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)
_CEILING_POOL = 2  # of the poolings; 75 cells become 38
_LAST_OF_SOURCE_0 = 13  # of _VGG: the pooling behind conv4_3
_FC = 1024
_EXTRAS = ((256, 1, 1, 0), (512, 3, 2, 1), (128, 1, 1, 0), (256, 3, 2, 1)) + 2 * (
    (128, 1, 1, 0),
    (256, 3, 1, 0),
)
"""Channels, kernel, stride, padding; every second one is a source."""

SOURCE_CHANNELS = (512, 1024, 512, 256, 256, 256)
PUBLISHED_WIDTH = 64
NORM_FLOOR = 1e-12
MEAN_RGB = (123.0, 117.0, 104.0)
"""Subtracted from the bytes of every image, flow too; nothing is divided."""


class ScaledL2Norm(nn.Module):
    """Scales every pixel to unit length over the channels, then by a trained factor per channel.

    Args:
        channels: C.
        scale: of the start.
    """

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same; a pixel of zeros stays zero."""
        return self.weight[:, None, None] * F.normalize(x, dim=1, eps=NORM_FLOOR)


class SSDTrunk(nn.Module):
    """Feature maps of SSD: VGG16 with its last layers as convolutions, and the extra layers.

    Args:
        in_channels: 3 for each image of the stack that one frame brings.
        width: channels of the first layers; published: 64.
        levels: maps, 2 to 6; published: 6.
        batch_norm: a norm behind each convolution, for training from random weights; the published
            trunk has none.
    """

    def __init__(
        self, in_channels: int = 3, *, width: int = 64, levels: int = 6, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        scaled = [None if c is None else _scaled(c, width) for c in _VGG]
        layers: list[nn.Module] = []
        channels = in_channels
        for position, wanted in enumerate(scaled):
            if position == _LAST_OF_SOURCE_0:
                self._source_0 = len(layers)
            if wanted is None:
                poolings = sum(isinstance(layer, nn.MaxPool2d) for layer in layers)
                layers.append(nn.MaxPool2d(2, ceil_mode=poolings == _CEILING_POOL))
            else:
                layers += _convolution(channels, wanted, 3, batch_norm, padding=1)
                channels = wanted
        fc = _scaled(_FC, width)
        layers += [
            nn.MaxPool2d(3, stride=1, padding=1),
            *_convolution(channels, fc, 3, batch_norm, padding=6, dilation=6),
            *_convolution(fc, fc, 1, batch_norm),
        ]
        self.vgg = nn.Sequential(*layers)
        self.norm = ScaledL2Norm(channels)
        self.extras = nn.ModuleList()
        self.extra_norms = nn.ModuleList()  # without parameters unless batch_norm
        self.channels = [channels, fc]
        channels = fc
        for c, kernel, stride, padding in _EXTRAS[: 2 * (levels - 2)]:
            wanted = _scaled(c, width)
            self.extras.append(nn.Conv2d(channels, wanted, kernel, stride, padding))
            self.extra_norms.append(nn.BatchNorm2d(wanted) if batch_norm else nn.Identity())
            channels = wanted
            if len(self.extras) % 2 == 0:
                self.channels.append(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for layer in self.extras:  # as ROAD, whose other layers start from weights
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps [N, C_k, h_k, w_k], coarser and coarser, of frames [N, in_channels, H, W]."""
        x = self.vgg[: self._source_0](x)
        sources = [self.norm(x)]
        x = self.vgg[self._source_0 :](x)
        sources.append(x)
        for k, (layer, norm) in enumerate(zip(self.extras, self.extra_norms, strict=True)):
            x = F.relu(norm(layer(x)), inplace=True)
            if k % 2:
                sources.append(x)
        return sources


def _convolution(
    channels: int, wanted: int, kernel: int, batch_norm: bool, padding: int = 0, dilation: int = 1
) -> list[nn.Module]:
    """A convolution with bias, its norm if any, its ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, wanted, kernel, padding=padding, dilation=dilation)
    ]
    if batch_norm:
        layers.append(nn.BatchNorm2d(wanted))
    return [*layers, nn.ReLU(inplace=True)]


def map_sizes(size: int, levels: int = 6) -> tuple[int, ...]:
    """Cells along one side of each map for images of `size` pixels.

    Raises:
        ValueError: an image too small for so many maps.
    """
    first = math.ceil(size // 2 // 2 / 2)
    sizes = [first, first // 2]
    for k in range(2, levels):
        sizes.append((sizes[-1] + 1) // 2 if k < 4 else sizes[-1] - 2)
    if min(sizes) < 1:
        raise ValueError(f"ssd: images of {size} pixels are too small for {levels} maps: {sizes}.")
    return tuple(sizes)


class SSD300(nn.Module):
    """ROAD's single-frame detector: convolutions on every map give boxes and class scores.

    Args:
        num_classes: K, background included.
        input_frames: images stacked in the channels.
        width, levels, batch_norm: of the trunk.
    """

    system = "ssd300"

    def __init__(
        self,
        num_classes: int,
        *,
        input_frames: int = 1,
        width: int = 64,
        levels: int = 6,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_frames, self.levels = num_classes, 1, levels
        self.base = SSDTrunk(3 * input_frames, width=width, levels=levels, batch_norm=batch_norm)
        self.loc, self.conf = nn.ModuleList(), nn.ModuleList()
        for channels, boxes in zip(self.base.channels, BOXES_PER_CELL, strict=False):
            for heads, numbers in ((self.loc, 4), (self.conf, num_classes)):
                head = nn.Conv2d(channels, boxes * numbers, 3, padding=1)
                nn.init.xavier_uniform_(head.weight)
                assert head.bias is not None
                nn.init.zeros_(head.bias)
                heads.append(head)

    @property
    def trunks(self) -> list[SSDTrunk]:
        """The only trunk."""
        return [self.base]

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """conf [N, P, K] (logits) and loc [N, P, 4] of frames [N, 3*F, H, W]."""
        sources = self.base(frames)
        return (
            _flat(self.conf, sources, self.num_classes),
            _flat(self.loc, sources, 4),
        )


def _flat(heads: nn.ModuleList, sources: Sequence[Tensor], numbers: int) -> Tensor:
    """Outputs of the heads, [N, P, numbers], by map, row, column, box."""
    parts = [
        head(x).permute(0, 2, 3, 1).reshape(len(x), -1, numbers)
        for head, x in zip(heads, sources, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _scaled(channels: int, width: int) -> int:
    return max(channels * width // PUBLISHED_WIDTH, 1)
