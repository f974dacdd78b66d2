"""AMS-Net: a ResNet with competitive temporal modules (CPTM) and a collaborative neck (CSTP).

Source: the AMS-Net authors' published code (Adaptive Multi-granularity Spatio-temporal Network,
built on mmaction2). Variants:

    2d        frames through a ResNet, with a CPTM bottleneck after stages 1 and 3
    snippet   the same, but the stem sees 3 consecutive frames (the starred published rows)
    slowonly  a SlowOnly ResNet with CPTM in place of four of its temporal convolutions

Parity: amsnet: "slowonly" is a reconstruction. The authors' 3-D files cannot run as published and
no weights exist; any that appear later must first be checked against it.
"""

import torch
from torch import Tensor, nn

from accel.errors import ConfigError
from accel.models.config import ModelConfig
from accel.models.cptm import CPTMBottleneck, clip_view, frame_view
from accel.models.cstp import CSTP, AuxiliaryHead
from accel.models.heads import AuxiliaryLogits, ConsensusHead
from accel.models.network import ClipNetwork
from accel.models.resnet import Bottleneck, ResNet, to_channels_last

CPTM_BLOCKS = {"layer3": (1, 3, 5), "layer4": (2,)}
"""Blocks of the SlowOnly ResNet-50 whose first convolution is a CPTM bottleneck."""

AUXILIARY_WEIGHT = 0.5
"""Of the auxiliary cross-entropy in the training loss."""

INIT_STD = 0.01
"""Of both classifiers' weights at the start."""


class TemporalConv(nn.Conv2d):
    """A full (3,1,1) convolution without bias: [N*T, C, H, W] -> [N*T, C', H, W].

    Args:
        in_channels: C.
        out_channels: C'.
        num_segments: T.
    """

    def __init__(self, in_channels: int, out_channels: int, num_segments: int) -> None:
        super().__init__(in_channels, out_channels, (3, 1), padding=(1, 0), bias=False)
        self.num_segments = num_segments
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        clips = super().forward(clip_view(input, self.num_segments))  # [N, C', T, H*W]
        return frame_view(clips, *input.shape[-2:])


class AMSTrunk(ResNet):
    """The frame network of AMS-Net with its CPTM bottlenecks; gives its last two stages.

    A network of fewer than the published 4 stages has CPTM after its first stage and after its
    last but one.

    Args:
        config: `depth`, `width`, `stages`, `stem`, `variant`.
        num_segments: T.
    """

    def __init__(self, config: ModelConfig, num_segments: int) -> None:
        super().__init__(
            config.depth,
            width=config.width,
            stages=config.stages,
            stem=config.stem,
            in_channels=3 * config.frames_per_segment,
        )
        self.middle_channels = self.out_channels // 2
        self.cptm = nn.ModuleDict()
        if config.variant == "slowonly":
            self._make_slowonly(num_segments)
        else:
            for stage in dict.fromkeys((1, config.stages - 1)):
                channels = self.out_channels // 2 ** (config.stages - stage)
                self.cptm[f"layer{stage}"] = CPTMBottleneck(channels, num_segments)
        # Parity: amsnet: the stem of a snippet starts as a random kernel for one frame, repeated
        # but not divided, and ImageNet weights skip it; only the norm behind it takes them.
        kernel = self.conv1.weight.data
        kernel.copy_(kernel[:, :3].repeat(1, config.frames_per_segment, 1, 1))

    def _make_slowonly(self, num_segments: int) -> None:
        """Put temporal convolutions and CPTM bottlenecks before the 3x3s of stages 3 and 4."""
        for block in (m for m in self.modules() if isinstance(m, Bottleneck)):
            nn.init.zeros_(block.bn3.weight)
        for stage in (name for name in self.stage_names if name in CPTM_BLOCKS):
            stage_blocks = (
                m for m in self.get_submodule(stage).modules() if isinstance(m, Bottleneck)
            )
            for index, block in enumerate(stage_blocks):
                inplanes, planes = block.conv1.in_channels, block.conv1.out_channels
                if index in CPTM_BLOCKS[stage]:
                    block.add_module("conv1", _conv1_cptm(inplanes, num_segments))
                    block.add_module("bn1", nn.Identity())  # the bottleneck has its own
                else:
                    block.add_module("conv1", TemporalConv(inplanes, planes, num_segments))

    def levels(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[N*T, 3*L, H, W] -> the last two stages, [N*T, C4, 2h, 2w] and [N*T, C5, h, w]."""
        x = frames.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.bn1(self.conv1(x)))  # [NT, width, H/4, W/4]
        middle = x
        for name in self.stage_names:
            middle = x
            x = self.get_submodule(name)(x)
            if name in self.cptm:
                x = self.cptm[name](x)
        return middle, x

    def forward(self, frames: Tensor) -> Tensor:
        """The last stage alone, see `levels`."""
        return self.levels(frames)[1]


def _conv1_cptm(channels: int, num_segments: int) -> CPTMBottleneck:
    """What replaces the first convolution of a SlowOnly block: C -> C // 4 channels."""
    # Parity: amsnet: no ReLU in these temporal blocks: their norms' scales start at 0 (the module
    # is then its 1x1 convolution alone), where a ReLU would never pass a gradient.
    cptm = CPTMBottleneck(channels, num_segments, restore=False, temporal_relu=False, shortcut=True)
    for module in cptm.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for block in cptm.core.temporal_blocks:
        nn.init.zeros_(block.get_parameter("bn.weight"))
    return cptm


class AMSNet(ClipNetwork):
    """Logits of clips, [N*T, 3*L, H, W] -> [N, K]; in training also those of the auxiliary head.

    Args:
        config: of the model.
        num_classes: K.
        num_segments: T.
    """

    trunk: AMSTrunk

    def __init__(self, config: ModelConfig, num_classes: int, num_segments: int) -> None:
        trunk = AMSTrunk(config, num_segments)
        middle, channels = trunk.middle_channels, trunk.out_channels
        super().__init__(
            trunk,
            # The neck leaves one map for each clip.
            ConsensusHead(
                channels, num_classes, num_segments=1, dropout=config.dropout, init_std=INIT_STD
            ),
            system="amsnet_slowonly" if config.variant == "slowonly" else "amsnet",
            num_segments=num_segments,
            frames_per_segment=config.frames_per_segment,
        )
        self.neck = CSTP(middle, channels, num_segments)
        self.aux_head = AuxiliaryHead(
            middle,
            channels,
            num_classes,
            clip_len=num_segments,
            dropout=config.dropout,
            init_std=INIT_STD,
        )
        to_channels_last(self)
        self.set_partial_bn(config.partial_bn)

    def forward_features(self, frames: Tensor) -> Tensor:
        """Feature maps of the neck: [N*T, 3*L, H, W] -> [N, C, h, w], channels_last."""
        features: Tensor = self.neck(*self.trunk.levels(frames))
        return features

    def forward(self, frames: Tensor) -> Tensor | AuxiliaryLogits:
        """Logits of N clips.

        Args:
            frames: [N*T, 3*L, H, W], normalized, time fastest, any H and W from 32 up.

        Returns:
            [N, K] logits; in training mode with the auxiliary head's.

        Raises:
            ValueError: frames are not [N*T, 3*L, H, W].
            ConfigError: one clip in training.
        """
        if not self.training:
            return super().forward(frames)
        self.check_frames(frames)
        middle, last = self.trunk.levels(frames)
        logits = self.forward_head(self.neck(middle, last))
        return AuxiliaryLogits(logits, self.aux_head(middle), AUXILIARY_WEIGHT)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers by fresh ones with `num_classes` outputs."""
        super().reset_classifier(num_classes)
        self.aux_head.reset_classifier(num_classes)


def amsnet(config: ModelConfig, num_classes: int, num_segments: int) -> ClipNetwork:
    """AMS-Net in the variant of the config."""
    least = 3 if config.variant == "slowonly" else 2  # the neck joins two; time is from the third
    if config.stages < least:
        raise ConfigError(
            f"model.stages: got {config.stages}, expected {least}..4 for amsnet in variant "
            f'"{config.variant}".'
        )
    return AMSNet(config, num_classes, num_segments)
