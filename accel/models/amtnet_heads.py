"""AMTNet's heads: boxes and class scores of the micro-tubes at every cell of a feature map."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 3  # cells in each direction that a head sees


class MicrotubeHead(nn.Module):
    """Linear maps from the 3 x 3 windows of all frames to the boxes and classes of each cell.

    The published head gathers the windows (border cells repeated), divides by 9, concatenates the
    frames, and applies two linear layers. This is a convolution with repeated borders: no window is
    ever stored. `convert.amtnet_heads` turns the weights of one form into those of the other.

    Args:
        channels: C of one frame's feature map.
        num_frames: T frames of a micro-tube, times the number of concatenated streams (stream
            outside frame, as in the published weights).
        boxes_per_cell: prior boxes m at each cell.
        loc_size: numbers that place a micro-tube, 4 for each of its frames.
        num_classes: K, background included.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_frames: int,
        boxes_per_cell: int,
        loc_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.num_frames, self.loc_size, self.num_classes = num_frames, loc_size, num_classes
        self.loc = nn.Conv2d(num_frames * channels, boxes_per_cell * loc_size, WINDOW)
        self.conf = nn.Conv2d(num_frames * channels, boxes_per_cell * num_classes, WINDOW)
        for layer in (self.loc, self.conf):
            # Xavier-uniform of the published linear layer, whose outputs see one window each.
            outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
            bound = math.sqrt(6 / (inputs + outputs))
            nn.init.uniform_(layer.weight, -bound, bound)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and logits of every prior of the map.

        Args:
            x: [N*T, C, H, W], the frames (and streams) of a micro-tube adjoin.

        Returns:
            loc [N, H*W*m, loc_size] and conf [N, H*W*m, K]: by row, column, box.
        """
        # Parity: AMTNet divides all maps by 9 before the linear layers, so that the layers' weights
        # are 9 times as large; dividing the maps or the weights is the same.
        weight = torch.cat([self.loc.weight, self.conf.weight]) / WINDOW**2
        assert self.loc.bias is not None and self.conf.bias is not None
        bias = torch.cat([self.loc.bias, self.conf.bias])
        y = window_convolution(x, weight, bias, self.num_frames)  # [N, H, W, m*(loc_size + K)]
        loc, conf = torch.split(y, [self.loc.out_channels, self.conf.out_channels], dim=-1)
        batch = y.shape[0]
        return loc.reshape(batch, -1, self.loc_size), conf.reshape(batch, -1, self.num_classes)


def window_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, num_frames: int) -> Tensor:
    """Convolve the frames of each micro-tube together, repeating the border cells.

    Args:
        x: [N*T, C, H, W].
        weight: [O, T*C, 3, 3], frame outside channel.
        bias: [O].
        num_frames: T.

    Returns:
        [N, H, W, O].
    """
    frames = torch.unflatten(x, 0, (-1, num_frames))  # [N, T, C, H, W]
    together = torch.cat(frames.unbind(1), dim=1)  # [N, T*C, H, W]
    # Parity: AMTNet repeats border cells where a convolution usually pads with zeros.
    padded = F.pad(together, (WINDOW // 2,) * 4, mode="replicate")
    return F.conv2d(padded, weight, bias).permute(0, 2, 3, 1)
