"""The MultiBox loss of SSD and AMTNet."""

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.detection.mining import hard_negatives


def multibox_loss(
    conf: Tensor,
    loc: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    negatives_per_positive: int = 3,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Localization and classification loss of a batch; the training loss is their sum.

    Localization is the sum of smooth L1 (beta 1) over all 4*T numbers of the positive priors
    (label > 0), classification the sum of cross-entropy over these and each image's hard negatives.
    Both are divided by the number of positive priors of the batch, 1 at least: a batch without any
    has the loss 0. Computed in fp32 (fp64).

    Args:
        conf: logits [B, P, K], class 0 is background.
        loc: [B, P, 4*T].
        labels: [B, P] int64, from `matching.match`.
        targets: [B, P, 4*T], used where the label is positive.
        negatives_per_positive: of the mining.
        divisor: instead of the number of positive priors, > 0: for a part of a larger batch.
    """
    wide = torch.promote_types(conf.dtype, torch.float32)
    log_probs = conf.to(wide).log_softmax(dim=-1)
    positive = labels > 0
    chosen = positive | hard_negatives(
        -log_probs[..., 0], labels, ratio=negatives_per_positive
    )  # [B, P]
    entropy = -log_probs.gather(2, labels[..., None])[..., 0]  # [B, P]
    # Priors that do not take part may have targets that are not finite: they are replaced first,
    # since 0 times their gradient would not be 0.
    inside = positive[..., None]
    distance = F.smooth_l1_loss(
        loc.to(wide), torch.where(inside, targets.to(wide), 0), reduction="none"
    )
    count = positive.sum().clamp(min=1) if divisor is None else divisor
    return (
        torch.where(inside, distance, 0).sum() / count,
        torch.where(chosen, entropy, 0).sum() / count,
    )
