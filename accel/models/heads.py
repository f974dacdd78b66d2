"""Classification heads over the frames of a clip."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class AuxiliaryLogits(NamedTuple):
    """What a network with an auxiliary head returns in training.

    The loss is the cross-entropy of `logits` plus `weight` times that of `auxiliary`.
    """

    logits: Tensor
    """[N, K], of the network's classifier."""

    auxiliary: Tensor
    """[N, K], of the auxiliary head."""

    weight: float
    """Of the auxiliary loss, > 0."""


class ConsensusHead(nn.Module):
    """Global average pool, dropout and a linear layer on every frame, then the mean over T.

    Args:
        in_channels: channels of the feature map.
        num_classes: K.
        num_segments: T, frames of one clip.
        dropout: probability in [0, 1) of dropping a pooled feature in training.
        init_std: the classifier starts at N(0, init_std) with zero bias; 0.001 in TSN and both
            published TANet codes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_segments: int,
        dropout: float,
        init_std: float = 0.001,
    ) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.init_std = init_std
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.normal_(self.fc.weight, std=self.init_std)
        nn.init.zeros_(self.fc.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer by a fresh one with `num_classes` outputs, same device/dtype."""
        old = self.fc
        self.fc = nn.Linear(
            old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype
        )
        self._initialize()

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the clips.

        Args:
            features: [N*T, C, h, w], time fastest.

        Returns:
            [N, K] logits, averaged over T in float32 (float64 for float64 features).
        """
        pooled = features.mean(dim=(-2, -1))  # [NT, C]
        logits = self.fc(self.dropout(pooled))  # [NT, K]
        logits = torch.unflatten(logits, 0, (-1, self.num_segments))  # [N, T, K]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return logits.mean(dim=1, dtype=dtype)  # [N, K]
