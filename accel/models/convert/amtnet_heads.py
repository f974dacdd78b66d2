"""AMTNet's heads: weights of the published linear layers to 3 x 3 convolutions, and back.

Both directions only reorder the numbers, so that a round trip is exact.
"""

import torch
from torch import Tensor

from accel.models.amtnet_heads import WINDOW


def convolution_from_linear(weight: Tensor, num_frames: int) -> Tensor:
    """Weight [O, T*C, 3, 3] of a convolution from that of a linear layer [O, T*9*C].

    A row of the linear layer is ordered by frame (with two concatenated streams by stream, then
    frame), row and column in the window, channel.

    Args:
        weight: [O, T*9*C].
        num_frames: T, times the number of concatenated streams.

    Raises:
        ValueError: the row's length is no multiple of 9 T.
    """
    if weight.dim() != 2 or weight.shape[1] % (num_frames * WINDOW**2):
        raise ValueError(
            f"AMTNet head: weight must be [O, T*9*C] with T = {num_frames}, "
            f"got {list(weight.shape)}."
        )
    windows = torch.unflatten(weight, 1, (num_frames, WINDOW, WINDOW, -1))  # [O, T, 3, 3, C]
    return windows.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [O, T*C, 3, 3]


def linear_from_convolution(weight: Tensor, num_frames: int) -> Tensor:
    """The inverse of `convolution_from_linear`: [O, T*9*C] from [O, T*C, 3, 3]."""
    windows = torch.unflatten(weight, 1, (num_frames, -1))  # [O, T, C, 3, 3]
    return windows.permute(0, 1, 3, 4, 2).flatten(1)
