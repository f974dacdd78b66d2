"""Hard-negative mining: which background priors take part in the classification loss."""

import math

import torch
from torch import Tensor


def hard_negatives(background_loss: Tensor, labels: Tensor, *, ratio: int = 3) -> Tensor:
    """The `ratio` times as many background priors as there are others, with the largest loss.

    Counted in each image. Equal losses: lower index first. An image without other priors keeps
    nothing; one with too few background priors keeps them all. Nothing waits for the device.

    Args:
        background_loss: [B, P], -log of the probability of background. Pass it in fp32: in 16 bits
            many priors tie.
        labels: [B, P], 0 for background.
        ratio: >= 0.

    Returns:
        [B, P] bool, true for the chosen ones.
    """
    positive = labels > 0
    wanted = ratio * positive.sum(dim=1, keepdim=True)  # [B, 1]
    ranked_last = background_loss.detach().masked_fill(positive, -math.inf)
    order = ranked_last.sort(dim=1, descending=True, stable=True).indices  # [B, P]
    every = torch.arange(labels.shape[1], device=labels.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, every)
    return (rank < wanted) & ~positive
