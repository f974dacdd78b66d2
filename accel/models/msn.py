"""MSN: a pyramid of frame differences in the stem, deformable motion alignment in every block.

Source: the anonymous release "MSN: Motion-Sensitive Network" (built on TDN's code); everything here
is what that code computes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from accel.errors import ConfigError
from accel.models.config import ModelConfig
from accel.models.difference import DifferenceResNet, difference_network, inflate_kernel
from accel.models.network import ClipNetwork
from accel.models.norm import BatchNormAct2d, ConvBeforeNorm2d, conv_norm
from accel.models.tdn import DifferenceStem
from accel.models.tsm import Shift

RELEASED_GROUP = 8
"""Rows that the released code takes for one clip in stem and motion module, whatever T is."""


class DifferencePyramid(nn.Module):
    """Short-term differences on three levels: [NT, 15, H, W] -> [NT, width, H/4, W/4].

    With g and h the convolutions `conv_1` and `conv_2`, and MP a 3x3 max-pool of stride 2:

        D1 = relu(norm(conv(MP([f2-f1; f3-f2; f4-f3; f5-f4]))))
        D2 = relu(norm(conv(MP([g(f5)-g(f3); g(f3)-g(f1)]))))
        D3 = MP(h(g(f5)) - h(g(f1)))
        S = D1 + D2 + D3

    g and h are linear up to their biases, which cancel: they are applied to differences. So the
    biases have no gradient and never change; they exist for the sake of checkpoints.

    Args:
        width: channels of the output, a multiple of 4.
        group: rows r with equal r % group share the batch statistics of a norm in training.
        stem: "imagenet", or "small" with 3x3 in place of 7x7 convolutions and without MP (H/2).
    """

    def __init__(
        self, width: int, *, group: int, stem: Literal["imagenet", "small"] = "imagenet"
    ) -> None:
        super().__init__()
        self.group = group
        small = stem == "small"
        kernel = 3 if small else 7
        inner = width // 4
        self.conv_1 = nn.Conv2d(3, inner, kernel, stride=2, padding=kernel // 2)
        self.conv_2 = nn.Conv2d(inner, width, 5, padding=2)
        for conv in (self.conv_1, self.conv_2):
            assert conv.bias is not None
            conv.bias.requires_grad_(False)
        self.conv_diff_1 = nn.Conv2d(12, width, kernel, stride=2, padding=kernel // 2, bias=False)
        self.bn_diff_1 = BatchNormAct2d(width)
        self.conv_diff_2 = nn.Conv2d(2 * inner, width, 5, padding=2, bias=False)
        self.bn_diff_2 = BatchNormAct2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: NT is not a multiple of `group`.
        """
        if len(frames) % self.group:
            raise ValueError(
                f"MSN: clips x segments must be a multiple of {self.group}, got {len(frames)} rows."
                " The released network groups 8 rows whatever the number of segments is;"
                " model.faithful false groups by the number of segments."
            )
        near = frames[:, 3:] - frames[:, :-3]  # [NT, 12, H, W]
        far = torch.cat([frames[:, 12:] - frames[:, 6:9], frames[:, 6:9] - frames[:, :3]])
        late, early = self._without_bias(self.conv_1, far).chunk(2)  # g(f5)-g(f3), g(f3)-g(f1)
        d1 = self._norm(self.bn_diff_1, self.conv_diff_1(self.maxpool(near)))
        d2 = self.conv_diff_2(self.maxpool(torch.cat([late, early], 1)))
        d2 = self._norm(self.bn_diff_2, d2)
        d3 = self.maxpool(self._without_bias(self.conv_2, late + early))
        y: Tensor = d1 + d2 + d3
        return y

    @staticmethod
    def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)

    def _norm(self, norm: BatchNormAct2d, x: Tensor) -> Tensor:
        """Norm and ReLU; in training once per segment index, in order, on the rows of that index.

        Parity: MSN: the released stem loops over the segments, so statistics are those of one
        segment index and the running ones are updated `group` times per step.
        """
        if not norm.training:
            return norm(x)  # type: ignore[no-any-return]
        rows = torch.unflatten(x.permute(0, 2, 3, 1), 0, (-1, self.group))  # [M, group, h, w, C]
        rows = rows.transpose(0, 1).contiguous()  # [group, M, h, w, C]
        normed = [norm(part.permute(0, 3, 1, 2)) for part in rows.unbind()]
        y = torch.stack([part.permute(0, 2, 3, 1) for part in normed], 1)  # [M, group, h, w, C]
        return y.flatten(0, 1).permute(0, 3, 1, 2)


class DeformConv(nn.Module):
    """Deformable convolution (version 1) with its own offset convolution; keeps C, H and W.

    Args:
        channels: C.
        kernel_size: k, odd.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        taps = kernel_size**2
        bound = 1 / math.sqrt(channels * taps)
        self.weight = nn.Parameter(
            torch.empty(channels, channels, kernel_size, kernel_size).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.conv_offset = nn.Conv2d(channels, 2 * taps, kernel_size, padding=kernel_size // 2)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def start(self, faithful: bool) -> None:
        """Settle how it starts and whether its kernel is trained.

        Args:
            faithful: as the released code does.

        Parity: MSN: the released optimizer never sees this kernel and this bias, so checkpoints
        hold them as they were drawn. Frozen, they also stay out of the norm that gradients are
        clipped by; in the released loop their gradients pile up there over the whole run, because
        nothing sets them to zero. And the released initialization of all 2-D convolutions
        overwrites the zeros of the offset convolution's weight: sampling starts at random offsets.
        """
        self.weight.requires_grad_(not faithful)
        self.bias.requires_grad_(not faithful)
        if not faithful:
            nn.init.zeros_(self.conv_offset.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor = kernels.deform_conv(x, self.conv_offset(x), self.weight, self.bias)
        return y


class MotionModule(nn.Module):
    """Gate of every frame and channel from aligned differences to the next frame.

    For groups of g rows, with Q = bn1(conv_down(X)) of c = C/4 channels:

        A[t] = |DCN3(Q[t+1]) + DCN5(Q[t+1]) + bn3(conv1(maxpool3(Q[t+1]))) - 3 Q[t]|,  t < g-1
        A[g-1] = mean over t of bn_t(time_conv(Q))[t]
        gate = 0.5 + sigmoid(bn2(conv(spatial mean of A)))

    Args:
        channels: C.
        group: g, rows of one group, >= 2.
    """

    def __init__(self, channels: int, *, group: int) -> None:
        super().__init__()
        self.group = group
        inner = max(channels // 4, 1)
        self.conv_down = ConvBeforeNorm2d(channels, inner, 1)
        self.motion_offset = DeformConv(inner, 3)
        self.motion_offset_7 = DeformConv(inner, 5)  # the published name of the 5x5 one
        self.bn1 = BatchNormAct2d(inner, relu=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.bn3 = BatchNormAct2d(inner, relu=False)
        self.conv = nn.Conv2d(inner, channels, 1)
        self.time_conv = nn.Conv3d(inner, inner, 3, padding=1)
        self.bn_t = nn.BatchNorm3d(inner)
        self.conv1 = ConvBeforeNorm2d(inner, inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate of every row and channel.

        Args:
            x: [rows, C, H, W], rows a multiple of g; copied once unless channels_last.

        Returns:
            [rows, C] in (0.5, 1.5), float32 (float64 for a float64 model).
        """
        x = x.contiguous(memory_format=torch.channels_last)
        q = conv_norm(self.conv_down, self.bn1, x)  # [rows, c, H, W]
        groups = torch.unflatten(q.permute(0, 2, 3, 1), 0, (-1, self.group))  # [M, g, H, W, c]
        following = groups[:, 1:].flatten(0, 1).permute(0, 3, 1, 2)  # [M*(g-1), c, H, W]
        present = groups[:, :-1].flatten(0, 1).permute(0, 3, 1, 2)
        aligned = self.motion_offset(following) + self.motion_offset_7(following)
        pooled = F.max_pool2d(following, 3, stride=1, padding=1)
        motion = (aligned + conv_norm(self.conv1, self.bn3, pooled) - 3 * present).abs()
        summary = self.bn_t(self.time_conv(groups.permute(0, 4, 1, 2, 3)))  # [M, c, g, H, W]
        with torch.autocast(x.device.type, enabled=False):
            wide = self.bn2.weight.dtype
            means = motion.mean((-2, -1), dtype=wide).unflatten(0, (-1, self.group - 1))
            last = summary.mean((-3, -2, -1), dtype=wide)  # [M, c]
            means = torch.cat([means, last[:, None]], 1).flatten(0, 1)  # [rows, c]
            y = self.bn2(self.conv(means[..., None, None]))  # [rows, C, 1, 1]
            return 0.5 + torch.sigmoid(y.flatten(1))


class MotionShift(nn.Module):
    """What the slot of an MSN block holds: the motion gate, then the learned shift.

    Args:
        channels: C.
        num_segments: T of the shift.
        group: rows of one group of the motion module.
    """

    def __init__(self, channels: int, num_segments: int, *, group: int) -> None:
        super().__init__()
        self.shift = Shift(channels, num_segments)
        self.motion_layer = MotionModule(channels, group=group)

    def forward(self, x: Tensor) -> Tensor:
        """[N*T, C, H, W] -> the same, channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        gate = self.motion_layer(x).unflatten(0, (-1, self.shift.num_segments))  # [N, T, C]
        y: Tensor = self.shift(x, gate)
        return y


def msn(config: ModelConfig, num_classes: int, num_segments: int) -> ClipNetwork:
    """MSN: [N*T, 15, H, W] -> [N, K].

    `config.faithful`: as the released code: groups of 8 rows whatever T is (N*T must be a multiple
    of 8), deformable kernels frozen as they were drawn, random offsets at the start. Otherwise:
    groups of T, all kernels trained, offsets zero at the start.

    Raises:
        ConfigError: one segment, not faithful.
    """
    group = RELEASED_GROUP if config.faithful else num_segments
    if group < 2:
        raise ConfigError("model.name: msn with model.faithful false needs at least 2 segments.")
    trunk = DifferenceResNet(
        config,
        difference_stem=DifferencePyramid(config.width, group=group, stem=config.stem),
        # Parity: MSN: the first fusion weighs as TDN's, by T; the second one has fixed weights.
        share_stem=0.5 if num_segments == 8 else 0.25,
        share_layer1=0.25,
        temporal=lambda channels: MotionShift(channels, num_segments, group=group),
        # Parity: MSN: the checkpoints hold TDN's whole stem; the forward pass never uses it.
        unused={"conv1_5": DifferenceStem(config.width, stem=config.stem)},
    )
    with torch.no_grad():
        source = trunk.unused.get_buffer("conv1_temp_weight")
        trunk.unused.get_buffer("conv1_5_conv_weight").copy_(inflate_kernel(source, 12))
    for module in trunk.modules():
        if isinstance(module, DeformConv):
            module.start(config.faithful)
    return difference_network(config, trunk, num_classes, num_segments)
