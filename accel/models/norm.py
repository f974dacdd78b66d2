"""Batch normalization with what follows it in a residual block: shortcut addition and ReLU."""

from torch import Tensor, nn
from torch.nn import functional as F


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm, then an optional shortcut is added, then an optional ReLU.

    Parameters, buffers and state-dict names are those of `nn.BatchNorm2d`.

    Args:
        num_features: C.
        relu: end with a ReLU.
    """

    def __init__(self, num_features: int, *, relu: bool = True) -> None:
        super().__init__(num_features)
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """relu(norm(x) + shortcut).

        Args:
            x: [NT, C, H, W].
            shortcut: like x, or None.

        Returns:
            [NT, C, H, W], layout of x.
        """
        y = super().forward(x)
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y, inplace=True) if self.relu else y
