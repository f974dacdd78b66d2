"""The skeleton that TDN and MSN share: appearance of the middle frame plus short-term differences.

Every segment brings 5 consecutive frames. A ResNet sees the middle one; a stem of its own turns
the differences of the five into a map that is fused into the ResNet twice, after the stem and,
through a second copy of the first stage, after that stage. Stages 2 to 4 hold a long-term motion
module and a learned shift in the slot of every block.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.config import ModelConfig
from accel.models.heads import ConsensusHead
from accel.models.network import ClipNetwork
from accel.models.norm import conv_norm
from accel.models.resnet import ResNet, to_channels_last


class Fusion(nn.Module):
    """(1 - share) * x + share * s, after s was enlarged to the size of x (nearest neighbor).

    Args:
        share: weight of the difference path, in [0, 1].
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """Fuse x [NT, C, H, W] and s [NT, C, h, w] into [NT, C, H, W]."""
        if s.shape[-2:] == x.shape[-2:]:
            return torch.lerp(x, s, self.share)
        s = F.interpolate(self.share * s, size=x.shape[-2:])  # weighed while it is small
        return torch.add(s, x, alpha=1 - self.share)


class Unused(nn.Module):
    """Tensors that published checkpoints hold although no forward pass uses them.

    They are kept as buffers, so that a checkpoint survives import and export unchanged, while
    optimizers, gradient norms and distributed training never see them.

    Args:
        **modules: layers whose state to keep; `a.0.weight` is kept as `a_0_weight`.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for prefix, module in modules.items():
            for name, value in module.state_dict(prefix=f"{prefix}.").items():
                self.register_buffer(name.replace(".", "_"), value.clone())


def inflate_kernel(kernel: Tensor, channels: int) -> Tensor:
    """A kernel for `channels` inputs from one for RGB: its mean over RGB, for each of them.

    Parity: TDN: not divided by the number of frames.

    Args:
        kernel: [C, 3, k, k].
        channels: inputs of the result.

    Returns:
        [C, channels, k, k].
    """
    return kernel.mean(1, keepdim=True).expand(-1, channels, -1, -1)


class DifferenceResNet(ResNet):
    """ResNet over segments of 5 frames: [N*T, 15, H, W] -> [N*T, out_channels, h, w].

    With f1..f5 the frames of a segment and S the map of the difference stem:

        x = fuse_stem(stem of ResNet (f3), S)
        x = fuse_layer1(layer1(x), difference_layer1(S))
        x = layer4(layer3(layer2(x)))

    All convolutions of the ResNet have biases. Convolutions start from Kaiming's normal
    distribution (those of the temporal modules too), their biases from PyTorch's default, as in
    the published code.

    Args:
        config: depth, width, stages and stem of the ResNet.
        difference_stem: [NT, 15, H, W] -> S.
        share_stem, share_layer1: weight of the difference path in the two fusions.
        temporal: makes the module of a block of stages 2 to 4, given its channels.
        unused: what else the published checkpoints hold, by published name.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        difference_stem: nn.Module,
        share_stem: float,
        share_layer1: float,
        temporal: Callable[[int], nn.Module],
        unused: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(
            config.depth,
            width=config.width,
            stages=config.stages,
            stem=config.stem,
            bias=True,
            temporal=lambda channels, stage: temporal(channels) if stage > 1 else None,
        )
        copy = ResNet(config.depth, width=config.width, stages=1, stem=config.stem, bias=True)
        self.difference_stem = difference_stem
        self.difference_layer1 = copy.get_submodule("layer1")
        self.fuse_stem = Fusion(share_stem)
        self.fuse_layer1 = Fusion(share_layer1)
        # Parity: TDN, MSN: `conv1_temp` is only where the kernel of TDN's stem is taken from.
        self.unused = Unused(conv1_temp=copy.conv1, **(unused or {}))
        to_channels_last(difference_stem)

    def forward(self, frames: Tensor) -> Tensor:
        """Feature map of the last stage.

        Args:
            frames: [NT, 15, H, W]: f1 RGB, ..., f5 RGB, any floating dtype; copied once unless
                channels_last.

        Returns:
            [NT, out_channels, h, w], channels_last.
        """
        frames = frames.contiguous(memory_format=torch.channels_last)
        s = self.difference_stem(frames)  # [NT, width, H/8, W/8], or H/4 and W/4
        x = frames[:, 6:9].contiguous(memory_format=torch.channels_last)  # f3
        x = self.maxpool(conv_norm(self.conv1, self.bn1, x))  # [NT, width, H/4, W/4]
        x = self.fuse_stem(x, s)
        first, *others = (self.get_submodule(name) for name in self.stage_names)
        x = self.fuse_layer1(first(x), self.difference_layer1(s))  # [NT, C_1, H/4, W/4]
        for stage in others:
            x = stage(x)  # [NT, C_i, H/2^(i+1), W/2^(i+1)]
        features: Tensor = x
        return features


def difference_network(
    config: ModelConfig, trunk: DifferenceResNet, num_classes: int, num_segments: int
) -> ClipNetwork:
    """The network of `config` around a trunk: [N*T, 15, H, W] -> [N, K]."""
    head = ConsensusHead(
        trunk.out_channels, num_classes, num_segments=num_segments, dropout=config.dropout
    )
    return ClipNetwork(
        trunk,
        head,
        system=config.name,
        num_segments=num_segments,
        frames_per_segment=config.frames_per_segment,
        partial_bn=config.partial_bn,
    )
