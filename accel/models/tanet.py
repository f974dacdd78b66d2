"""TANet: a ResNet with a Temporal Adaptive Module (TAM) in every block.

Source: Liu et al., "TAM: Temporal Adaptive Module for Video Recognition", ICCV 2021, as computed
by the authors' code and by mmaction2's port (the two agree bit for bit in float64).
"""

import torch
from torch import Tensor, nn

import kernels
from accel.models.config import ModelConfig
from accel.models.heads import ConsensusHead
from accel.models.network import ClipNetwork
from accel.models.resnet import ResNet


class TAM(nn.Module):
    """Temporal Adaptive Module: a 3-tap temporal filter made for each clip and channel.

    With theta[n,c,t] the spatial mean of x, kernel k = softmax(G(theta[n,c,:])) over 3 taps and
    importance a = sigmoid(L(theta[n])):

        y[n,t,p,c] = sum_j k[n,c,j] * a[n,c,t+j-1] * x[n,t+j-1,p,c],  j = 0, 1, 2

    with zero outside 0..T-1. The gradient reaches x on all three paths (x, k, a).

    Parameter names and initialization (PyTorch's defaults) are those of the published code. The
    weights of G depend on T: weights trained with 8 segments do not fit a module with 16.

    Args:
        channels: C, >= beta.
        num_segments: T, >= 1.
        alpha: hidden width of G in multiples of T.
        beta: C // beta is the hidden width of L.
    """

    takes_pooled = True

    def __init__(self, channels: int, num_segments: int, *, alpha: int = 2, beta: int = 4) -> None:
        super().__init__()
        if channels < beta:
            raise ValueError(f"TAM: channels must be >= beta = {beta}, got {channels}.")
        self.num_segments = num_segments
        hidden = alpha * num_segments
        self.G = nn.Sequential(
            nn.Linear(num_segments, hidden, bias=False),
            # Parity: every channel of every clip is one row of this norm, so its statistics
            # (over N*C rows) are shared by all channels and depend on the clips per device.
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, 3, bias=False),
            nn.Softmax(dim=-1),
        )
        self.L = nn.Sequential(
            nn.Conv1d(channels, channels // beta, 3, padding=1, bias=False),
            nn.BatchNorm1d(channels // beta),
            nn.ReLU(inplace=True),
            nn.Conv1d(channels // beta, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Filter the clips in time.

        The two branches see only N*T*C numbers; they run in float32 (float64 for float64 x) also
        under autocast, while x keeps its dtype.

        Args:
            x: [N*T, C, H, W], time fastest; copied once unless channels_last.
            pooled: the mean of x over H and W, if the norm before has it: [N*T, C], float32
                (float64 for float64 x).

        Returns:
            [N*T, C, H, W] in the dtype of x, channels_last.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            # Parity: both branches see the mean of x itself, not of the gated a * x.
            theta = x.mean(dim=(-2, -1), dtype=dtype) if pooled is None else pooled  # [NT, C]
            theta = torch.unflatten(theta, 0, (-1, self.num_segments))  # [N, T, C]
            theta = theta.transpose(1, 2)  # [N, C, T]
            taps = self.G(theta.flatten(0, 1))  # [N*C, 3]
            taps = torch.unflatten(taps, 0, theta.shape[:2])  # [N, C, 3]
            importance = self.L(theta).transpose(1, 2)  # [N, T, C]
            # Parity: the importance gates the source frame, before the taps; taps at the borders
            # of a clip are not renormalized (they sum to less than 1 there).
            y: Tensor = kernels.temporal_taps(x, taps, importance, num_segments=self.num_segments)
        return y


def tanet(config: ModelConfig, num_classes: int, num_segments: int) -> ClipNetwork:
    """TANet; without its module when the config asks for plain frames."""

    def tam(channels: int, _stage: int) -> TAM:
        return TAM(channels, num_segments)

    trunk = ResNet(
        config.depth,
        width=config.width,
        stages=config.stages,
        stem=config.stem,
        temporal=tam if config.has_temporal else None,
    )
    head = ConsensusHead(
        trunk.out_channels, num_classes, num_segments=num_segments, dropout=config.dropout
    )
    return ClipNetwork(
        trunk, head, system=config.name, num_segments=num_segments, partial_bn=config.partial_bn
    )
