"""TDN: short-term differences in the stem, long-term differences in every block.

Source: Wang et al., "TDN: Temporal Difference Networks for Efficient Action Recognition",
CVPR 2021, as computed by the authors' code.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from accel.models.config import ModelConfig
from accel.models.difference import DifferenceResNet, difference_network, inflate_kernel
from accel.models.network import ClipNetwork
from accel.models.norm import BatchNormAct2d
from accel.models.tsm import Shift


class DifferenceStem(nn.Module):
    """Short-term differences: [NT, 15, H, W] -> [NT, width, H/8, W/8].

    maxpool(relu(bn(conv(avgpool2([f2-f1; f3-f2; f4-f3; f5-f4])))))

    Args:
        width: channels of the output.
        stem: "imagenet", or "small" with a 3x3 convolution and without the last pooling (H/4).
    """

    def __init__(self, width: int, *, stem: Literal["imagenet", "small"] = "imagenet") -> None:
        super().__init__()
        kernel = 3 if stem == "small" else 7
        self.conv = nn.Conv2d(12, width, kernel, stride=2, padding=kernel // 2, bias=False)
        self.bn = BatchNormAct2d(width)
        self.maxpool = nn.Identity() if stem == "small" else nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """See the class."""
        differences = frames[:, 3:] - frames[:, :-3]  # [NT, 12, H, W]
        s = F.avg_pool2d(differences, 2)  # [NT, 12, H/2, W/2]
        y: Tensor = self.maxpool(self.bn(self.conv(s)))
        return y


class MSEModule(nn.Module):
    """Multi-scale motion excitation (the published mSE), followed by the shift of the block.

    With B = bn1(conv1(x)) of r = C/16 channels, D = conv2(B), and for each of the differences
    Z[t] = D[t+1] - B[t] (forward) and Z[t] = D[t-1] - B[t] (backward), zero at the open end:

        Y = (Z + up(bn_2(conv_2(avgpool2(Z)))) + bn_4(conv_4(Z))) / 3
        e = sigmoid(bn3(conv3(Y))) - 0.5
        out = shift(x * (1 + (e_forward + e_backward) / 2))

    The two directions share all layers. The C-channel maps of conv3 and bn3 are never formed: both
    are folded into one matrix and one offset per direction, which the operator applies where it
    gates x; the batch statistics of bn3 follow from mean and covariance of the r-channel Y.

    Args:
        channels: C; r = C // 16, at least 1.
        num_segments: T.
    """

    def __init__(self, channels: int, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments
        reduced = max(channels // 16, 1)
        self.conv1 = nn.Conv2d(channels, reduced, 1, bias=False)
        self.bn1 = BatchNormAct2d(reduced, relu=False)
        self.conv2 = nn.Conv2d(reduced, reduced, 3, padding=1, groups=reduced, bias=False)
        self.conv3 = nn.Conv2d(reduced, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3_smallscale2 = nn.Conv2d(reduced, reduced, 3, padding=1, bias=False)
        self.bn3_smallscale2 = BatchNormAct2d(reduced, relu=False)
        # Parity: TDN: the branch called "smallscale4" does not pool; weights are trained that way.
        self.conv3_smallscale4 = nn.Conv2d(reduced, reduced, 3, padding=1, bias=False)
        self.bn3_smallscale4 = BatchNormAct2d(reduced, relu=False)

    def forward(self, x: Tensor, taps: Tensor) -> Tensor:
        """Excite x and filter it along time.

        Args:
            x: [N*T, C, H, W], time fastest; copied once unless channels_last.
            taps: [C, 3] of the shift.

        Returns:
            [N*T, C, H, W] in the dtype of x, channels_last.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        # Parity: TDN: the shared norms see first the forward, then the backward differences: own
        # statistics each, two updates of the running ones.
        forward, backward = (self._scales(z) for z in self._differences(x))  # [NT, r, H, W] each
        with torch.autocast(x.device.type, enabled=False):
            m, c = zip(self._fold(forward), self._fold(backward), strict=True)  # [C, r], [C] each
            return kernels.diff_gate_shift(
                x,
                forward,
                backward,
                torch.stack(m),
                torch.stack(c),
                taps,
                num_segments=self.num_segments,
            )

    def _differences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward differences: 2 times [NT, r, H, W], channels_last."""
        b = self.bn1(self.conv1(x))  # [NT, r, H, W]
        d = self.conv2(b)
        clips = (-1, self.num_segments)
        b = torch.unflatten(b.permute(0, 2, 3, 1), 0, clips)  # [N, T, H, W, r]
        d = torch.unflatten(d.permute(0, 2, 3, 1), 0, clips)
        forward = F.pad(d[:, 1:] - b[:, :-1], (0, 0, 0, 0, 0, 0, 0, 1))
        backward = F.pad(d[:, :-1] - b[:, 1:], (0, 0, 0, 0, 0, 0, 1, 0))
        return forward.flatten(0, 1).permute(0, 3, 1, 2), backward.flatten(0, 1).permute(0, 3, 1, 2)

    def _scales(self, z: Tensor) -> Tensor:
        """Sum of the three branches of one direction: [NT, r, H, W] -> the same."""
        height, width = z.shape[-2:]
        pooled = F.avg_pool2d(z, (min(2, height), min(2, width)))  # a single row cannot be halved
        half = self.bn3_smallscale2(self.conv3_smallscale2(pooled))  # [NT, r, H/2, W/2]
        full: Tensor = self.bn3_smallscale4(self.conv3_smallscale4(z))
        return z + F.interpolate(half, size=(height, width)) + full

    def _fold(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """conv3 and bn3 of y / 3 as one affine map of y: matrix [C, r] and offset [C]."""
        norm = self.bn3
        weight = self.conv3.weight.flatten(1) / 3  # [C, r]
        if norm.training:
            rows = y.permute(0, 2, 3, 1).flatten(0, 2).to(weight.dtype)  # [NT*H*W, r]
            center = rows.mean(0)
            rows = rows - center
            covariance = (rows.T @ rows / len(rows)).double()  # [r, r]
            mean = weight @ center  # [C]
            var = ((weight.double() @ covariance) * weight.double()).sum(1).to(mean.dtype)
            self._update_running(mean.detach(), var.detach(), len(rows))
        else:
            assert norm.running_mean is not None and norm.running_var is not None
            mean, var = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(var + norm.eps)
        return scale[:, None] * weight, norm.bias - scale * mean

    def _update_running(self, mean: Tensor, var: Tensor, count: int) -> None:
        """What nn.BatchNorm2d does in training: unbiased variance, exponential average."""
        norm = self.bn3
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None and norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)


class LongTermModule(nn.Module):
    """What the slot of a TDN block holds: motion excitation, then the learned shift.

    Args:
        channels: C.
        num_segments: T.
    """

    def __init__(self, channels: int, num_segments: int) -> None:
        super().__init__()
        self.mse = MSEModule(channels, num_segments)
        self.shift = Shift(channels, num_segments)

    def forward(self, x: Tensor) -> Tensor:
        """[N*T, C, H, W] -> the same, channels_last."""
        y: Tensor = self.mse(x, self.shift.taps)
        return y


def tdn(config: ModelConfig, num_classes: int, num_segments: int) -> ClipNetwork:
    """TDN: [N*T, 15, H, W] -> [N, K]."""
    # Parity: TDN: the weights of both fusions depend on T, and only on whether it is 8.
    share = 0.5 if num_segments == 8 else 0.25
    difference_stem = DifferenceStem(config.width, stem=config.stem)
    trunk = DifferenceResNet(
        config,
        difference_stem=difference_stem,
        share_stem=share,
        share_layer1=share,
        temporal=lambda channels: LongTermModule(channels, num_segments),
    )
    with torch.no_grad():
        source = trunk.unused.get_buffer("conv1_temp_weight")
        difference_stem.conv.weight.copy_(inflate_kernel(source, 12))
    return difference_network(config, trunk, num_classes, num_segments)
