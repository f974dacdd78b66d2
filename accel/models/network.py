"""A clip classifier: a frame trunk, a consensus head, and partial batch normalization."""

from collections.abc import Iterator

from torch import Tensor, nn

from accel.models.heads import ConsensusHead
from accel.models.resnet import ResNet


class ClipNetwork(nn.Module):
    """Logits of clips whose frames are folded into the batch: [N*T, 3, H, W] -> [N, K].

    Args:
        trunk: frame features, [NT, 3, H, W] -> [NT, C, h, w]; its temporal modules see T.
        head: [NT, C, h, w] -> [N, K].
        partial_bn: see `set_partial_bn`.
    """

    def __init__(self, trunk: ResNet, head: ConsensusHead, *, partial_bn: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.partial_bn = False
        self.set_partial_bn(partial_bn)

    @property
    def num_segments(self) -> int:
        """T, frames of one clip."""
        return self.head.num_segments

    @property
    def num_classes(self) -> int:
        """K, classes of the head."""
        return self.head.fc.out_features

    def forward_features(self, frames: Tensor) -> Tensor:
        """Feature maps of the last stage: [N*T, 3, H, W] -> [N*T, C, h, w], channels_last."""
        features: Tensor = self.trunk(frames)
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from feature maps: [N*T, C, h, w] -> [N, K]."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, frames: Tensor) -> Tensor:
        """Logits of N clips.

        Args:
            frames: [N*T, 3, H, W], normalized, time fastest, any H and W from 32 up.

        Returns:
            [N, K] logits, float32 also under autocast (float64 for a float64 model).

        Raises:
            ValueError: frames are not [N*T, 3, H, W].
        """
        if frames.dim() != 4 or frames.shape[1] != 3 or frames.shape[0] % self.num_segments:
            raise ValueError(
                f"ClipNetwork: frames must be [N*T, 3, H, W] with T = {self.num_segments}, "
                f"got {list(frames.shape)}."
            )
        return self.forward_head(self.forward_features(frames))

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

    def _later_norms(self) -> Iterator[nn.BatchNorm2d]:
        norms = (m for m in self.trunk.modules() if isinstance(m, nn.BatchNorm2d))
        next(norms)
        return norms

    def train(self, mode: bool = True) -> "ClipNetwork":
        """Switch to training or evaluation; norms frozen by `set_partial_bn` stay in evaluation."""
        super().train(mode)
        if self.partial_bn:
            for norm in self._later_norms():
                norm.eval()
        return self
