"""A clip classifier: a frame trunk, a consensus head, and partial batch normalization."""

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from accel.models.heads import AuxiliaryLogits, ConsensusHead


class ClipNetwork(nn.Module):
    """Logits of clips whose segments are folded into the batch: [N*T, 3*L, H, W] -> [N, K].

    Args:
        trunk: features, [N*T, 3*L, H, W] -> [M, C, h, w]; its temporal modules see T. The first
            BatchNorm2d in its module order is the stem's.
        head: [M, C, h, w] -> [N, K].
        system: whose state-dict names it has: a key of `accel.models.convert.TABLES`.
        num_segments: T, segments of one clip.
        frames_per_segment: L, frames of one segment, stacked in the channels (f1 RGB, f2 RGB, ..).
        partial_bn: see `set_partial_bn`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: ConsensusHead,
        *,
        system: str,
        num_segments: int,
        frames_per_segment: int = 1,
        partial_bn: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.system = system
        self.num_segments = num_segments
        self.frames_per_segment = frames_per_segment
        self.partial_bn = False
        self.set_partial_bn(partial_bn)

    @property
    def num_classes(self) -> int:
        """K, classes of the head."""
        return self.head.fc.out_features

    def forward_features(self, frames: Tensor) -> Tensor:
        """Feature maps for the head: [N*T, 3*L, H, W] -> [M, C, h, w], channels_last."""
        features: Tensor = self.trunk(frames)
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from feature maps: [M, C, h, w] -> [N, K]."""
        logits: Tensor = self.head(features)
        return logits

    def check_frames(self, frames: Tensor) -> None:
        """Raise ValueError unless frames are [N*T, 3*L, H, W]."""
        channels = 3 * self.frames_per_segment
        if frames.dim() != 4 or frames.shape[1] != channels or frames.shape[0] % self.num_segments:
            raise ValueError(
                f"ClipNetwork: frames must be [N*T, {channels}, H, W] with T = "
                f"{self.num_segments}, got {list(frames.shape)}."
            )

    def forward(self, frames: Tensor) -> Tensor | AuxiliaryLogits:
        """Logits of N clips.

        Args:
            frames: [N*T, 3*L, H, W], normalized, time fastest, any H and W from 32 up.

        Returns:
            [N, K] logits, float32 also under autocast (float64 for a float64 model). A network
            with an auxiliary head returns AuxiliaryLogits in training mode.

        Raises:
            ValueError: frames are not [N*T, 3*L, H, W].
        """
        self.check_frames(frames)
        return self.forward_head(self.forward_features(frames))

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """What a profile names: parts of the trunk, temporal modules in them, the head.

        A temporal module has the name of its class, so that equal ones add up; of modules inside
        each other only the outermost is given.
        """
        for name, part in self.trunk.named_children():
            yield name, part
            yield from _temporal_modules(part)
        yield "head", self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one with `num_classes` outputs."""
        self.head.reset_classifier(num_classes)

    def set_partial_bn(self, enabled: bool) -> None:
        """Freeze every BatchNorm2d except the stem's, or train all of them.

        Frozen norms use their running statistics in training too, and their scale and shift take
        no gradient. Call it before the optimizer is made.
        """
        # Parity: only BatchNorm2d freezes (as in TSN, whose networks have no other norm); the
        # BatchNorm1d layers of TAM keep batch statistics and gradients.
        self.partial_bn = enabled
        for norm in self._later_norms():
            norm.weight.requires_grad_(not enabled)
            norm.bias.requires_grad_(not enabled)
        self.train(self.training)

    @property
    def stem_norm(self) -> nn.BatchNorm2d:
        """The norm that partial batch normalization leaves in training."""
        return next(self._norms())

    def _norms(self) -> Iterator[nn.BatchNorm2d]:
        return (m for m in self.modules() if isinstance(m, nn.BatchNorm2d))

    def _later_norms(self) -> Iterator[nn.BatchNorm2d]:
        return itertools.islice(self._norms(), 1, None)

    def train(self, mode: bool = True) -> "ClipNetwork":
        """Switch to training or evaluation; norms frozen by `set_partial_bn` stay in evaluation."""
        super().train(mode)
        if self.partial_bn:
            for norm in self._later_norms():
                norm.eval()
        return self


_NOT_TEMPORAL = tuple(f"accel.models.{name}" for name in ("resnet", "norm", "heads"))


def _temporal_modules(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules below `part` that a system brings along itself."""
    for child in part.children():
        home = type(child).__module__
        if home.startswith("accel.models.") and home not in _NOT_TEMPORAL:
            yield type(child).__name__, child
        else:
            yield from _temporal_modules(child)
