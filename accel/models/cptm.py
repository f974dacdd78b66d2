"""CPTM, the competitive progressive temporal modelling of AMS-Net, and the parts it shares.

Source: the AMS-Net authors' published code (Adaptive Multi-granularity Spatio-temporal Network).

All tensors are 4-D and channels_last. The memory of the frames [N*T, C, H, W] is also that of the
clips [N, C, T, H*W] (height is time, width is all pixels), so the published (3,1,1) convolution
over [N, C, T, H, W] is a (3,1) convolution over that view, without a copy.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from accel.errors import ConfigError
from accel.models.norm import BatchNormAct2d
from accel.models.patch_conv import PatchConv2d


def clip_view(frames: Tensor, num_segments: int) -> Tensor:
    """[N*T, C, H, W] -> [N, C, T, H*W], the same memory (copied once unless channels_last)."""
    frames = frames.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = frames.shape
    clips = frames.permute(0, 2, 3, 1).reshape(-1, num_segments, height * width, channels)
    return clips.permute(0, 3, 1, 2)


def frame_view(clips: Tensor, height: int, width: int) -> Tensor:
    """[N, C, T, H*W] -> [N*T, C, H, W], the inverse of `clip_view`."""
    clips = clips.contiguous(memory_format=torch.channels_last)
    frames = clips.permute(0, 2, 3, 1).reshape(-1, height, width, clips.shape[1])
    return frames.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, optional ReLU: [B, C, H, W] -> [B, C', H/s, W/s].

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: odd; padded by half of it.
        stride: s.
        groups: of the convolution.
        relu: end with a ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        patches = groups == 1 and kernel_size[0] == kernel_size[1]
        conv = PatchConv2d if patches else nn.Conv2d
        self.conv = conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=groups,
            bias=False,
        )
        self.bn = BatchNormAct2d(out_channels, relu=relu)

    def forward(self, x: Tensor, *, pool: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The map, [B, C', H/s, W/s]; with `pool` also its mean over the pixels, [B, C']."""
        y: Tensor | tuple[Tensor, Tensor] = self.bn(self.conv(x), pool=pool)
        return y


class BranchAttention(nn.Module):
    """Competition of K branches for each clip and channel.

    z = relu(norm(W s + b)) of the pooled branches s, v_k = W_k z + b_k; the shares are the softmax
    of gamma * v_k over k.

    Args:
        channels: C of each branch.
        branches: K.
        rate: the hidden width is max(C // rate, min_dim).
        min_dim: see rate.
        gamma: inverse temperature.
    """

    def __init__(
        self, channels: int, branches: int, *, rate: int, min_dim: int = 32, gamma: float = 1.0
    ) -> None:
        super().__init__()
        hidden = max(channels // rate, min_dim)
        self.gamma = gamma
        self.fc = nn.Linear(channels, hidden)
        self.bn = nn.BatchNorm1d(hidden)
        self.fcs = nn.ModuleList(nn.Linear(hidden, channels) for _ in range(branches))

    def forward(self, pooled: Tensor) -> Tensor:
        """Shares of the branches; in full precision also under autocast.

        Args:
            pooled: [N, C], in float32 (float64 for a float64 model).

        Returns:
            [N, K, C], summing to 1 over K.

        Raises:
            ConfigError: one clip in training.
        """
        # Parity: amsnet: this norm runs over the clips of one device, so its statistics depend on
        # the clips per forward, and with a single clip there are none.
        if self.training and pooled.shape[0] < 2:
            raise ConfigError(
                "amsnet: a training forward needs at least 2 clips per process, because its "
                f"attention is normalized over clips; got {pooled.shape[0]}. Raise "
                "train.micro_batch."
            )
        bias: Tensor = self.fc.bias
        if self.training:  # the norm takes it out again: a gradient of 0, not of rounding errors
            bias = bias.detach() + 0 * bias
        with torch.autocast(pooled.device.type, enabled=False):
            z = torch.relu(self.bn(F.linear(pooled, self.fc.weight, bias)))  # [N, hidden]
            logits = torch.stack([fc(z) for fc in self.fcs], dim=1)  # [N, K, C]
            return torch.softmax(self.gamma * logits, dim=1)


class CPTMCore(nn.Module):
    """Three temporal convolutions in a chain whose outputs compete: [N, C, T, P] -> same.

    f_1 = TB(x), f_2 = TB(f_1), f_3 = TB(f_2) with TB = relu(norm(conv)), the convolution (3,1) and
    full; y = sum_k p_k f_k with the shares p of `BranchAttention`, made from the mean of
    (f_1 + f_2 + f_3) / 3 over time and pixels.

    Args:
        channels: C.
        rate: the hidden width of the attention is max(C // rate, min_dim).
        min_dim: see rate.
        gamma: inverse temperature of the competition; 1 in every published recipe.
        relu: of the temporal blocks.
    """

    def __init__(
        self,
        channels: int,
        *,
        rate: int = 16,
        min_dim: int = 32,
        gamma: float = 1.0,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.temporal_blocks = nn.ModuleList(
            ConvNorm(channels, channels, (3, 1), relu=relu) for _ in range(3)
        )
        self.attention = BranchAttention(channels, 3, rate=rate, min_dim=min_dim, gamma=gamma)

    def forward(self, clips: Tensor) -> Tensor:
        first, second, third = self.temporal_blocks
        f1, mean1 = first(clips, pool=True)  # [N, C, T, P], [N, C]
        f2, mean2 = second(f1, pool=True)
        f3, mean3 = third(f2, pool=True)
        # Parity: amsnet: the mean over the branches here, but their plain sum in the neck. The
        # averaged map itself is never formed: means commute.
        shares = self.attention((mean1 + mean2 + mean3) / 3)  # [N, 3, C]
        # A clip is one "frame" of T*P pixels to the operator: the same numbers, no folding.
        return kernels.branch_fuse(f1, f2, f3, shares, num_segments=1)


class CPTMBottleneck(nn.Module):
    """CPTM on a share of the channels: [N*T, C, H, W] -> [N*T, C', H, W].

    reduce (1x1, norm, ReLU), `CPTMCore`, then restore (1x1 back to C, norm, ReLU) or nothing.

    Args:
        channels: C.
        num_segments: T.
        inner: channels between; none: C // 4.
        restore: back to C' = C channels; otherwise C' = inner.
        restore_relu: ReLU after restore.
        temporal_relu: ReLU in the temporal blocks.
        shortcut: add the reduced input to the core's output.
        rate, min_dim, gamma: see `CPTMCore`.
    """

    def __init__(
        self,
        channels: int,
        num_segments: int,
        *,
        inner: int | None = None,
        restore: bool = True,
        restore_relu: bool = True,
        temporal_relu: bool = True,
        shortcut: bool = False,
        rate: int = 16,
        min_dim: int = 32,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        inner = inner or channels // 4
        self.num_segments = num_segments
        self.shortcut = shortcut
        self.reduce = ConvNorm(channels, inner)
        self.core = CPTMCore(inner, rate=rate, min_dim=min_dim, gamma=gamma, relu=temporal_relu)
        self.restore = ConvNorm(inner, channels, relu=restore_relu) if restore else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Parity: amsnet: no shortcut around the 2-D module; it replaces the stage's output.
        reduced = self.reduce(x)  # [NT, inner, H, W]
        y = self.core(clip_view(reduced, self.num_segments))  # [N, inner, T, H*W]
        y = frame_view(y, *x.shape[-2:])  # [NT, inner, H, W]
        if self.shortcut:
            y = y + reduced
        restored: Tensor = self.restore(y)
        return restored


class MultiscaleTemporal(nn.Module):
    """The ablation without competition: the mean of chained temporal blocks, shape kept.

    Args:
        channels: C.
        num_segments: T.
        blocks: temporal blocks in the chain.
    """

    def __init__(self, channels: int, num_segments: int, *, blocks: int = 3) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.temporal_blocks = nn.ModuleList(
            ConvNorm(channels, channels, (3, 1)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        clips = clip_view(x, self.num_segments)  # [N, C, T, H*W]
        branches = []
        for block in self.temporal_blocks:
            clips = block(clips)
            branches.append(clips)
        mean = torch.stack(branches).mean(dim=0)  # [N, C, T, H*W]
        return frame_view(mean, *x.shape[-2:])
