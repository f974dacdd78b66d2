"""Matching of ground-truth micro-tubes to prior boxes, on the device and for a whole batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from accel.detection.boxes import encode, ltrb_from_cxcywh, pairwise_iou

FORCED_OVERLAP = 2.0  # above any threshold


class Matches(NamedTuple):
    """What each prior should predict."""

    labels: Tensor
    """[B, P] int64: 0 for background, else class + 1."""

    targets: Tensor
    """[B, P, 4*T]: the coded boxes of the best micro-tube, for background priors as well."""


def match(
    boxes_ltrb: Tensor, labels: Tensor, priors_cxcywh: Tensor, *, iou_threshold: float = 0.5
) -> Matches:
    """Assign to each prior the micro-tube that it overlaps most, or background.

    Overlap is the mean over the frames of intersection over union. The prior with the largest
    overlap with a micro-tube (the first of several) is that micro-tube's in any case; of two
    micro-tubes with the same best prior the later one has it. The other priors are background where
    their overlap is below `iou_threshold`. No value decides what runs: nothing waits for the
    device, and the function compiles as one graph.

    Args:
        boxes_ltrb: [B, G, T, 4], fractions of the image; G is the largest number in the batch.
        labels: [B, G] int64 class, 0-based; -1 marks padding, whose boxes are ignored.
        priors_cxcywh: [P, 4], dtype of boxes_ltrb.
        iou_threshold: 0 to 1.

    Raises:
        ValueError: shapes that do not fit.
    """
    if boxes_ltrb.dim() != 4 or boxes_ltrb.shape[3] != 4 or labels.shape != boxes_ltrb.shape[:2]:
        raise ValueError(
            "match: boxes_ltrb must be [B, G, T, 4] and labels [B, G], "
            f"got {list(boxes_ltrb.shape)} and {list(labels.shape)}."
        )
    batch, most, frames = boxes_ltrb.shape[:3]
    num_priors = priors_cxcywh.shape[0]
    if most == 0:
        nothing = boxes_ltrb.new_zeros((batch, num_priors, 4 * frames))
        return Matches(labels.new_zeros((batch, num_priors)), nothing)
    priors_ltrb = ltrb_from_cxcywh(priors_cxcywh)
    overlap = torch.stack([pairwise_iou(b, priors_ltrb) for b in boxes_ltrb.unbind(2)]).mean(0)
    present = labels >= 0  # [B, G]
    overlap = overlap.masked_fill(~present[..., None], -1)  # [B, G, P]

    best_overlap, best_box = overlap.max(dim=1)  # [B, P] each
    best_prior = overlap.argmax(dim=2)  # [B, G]
    forced = best_prior[..., None] == torch.arange(num_priors, device=labels.device)
    forced &= present[..., None]  # [B, G, P]
    # Parity: AMTNet forces the best priors box by box, so that a later box overwrites an earlier
    # one, which may then be left without any prior.
    number = torch.arange(most, device=labels.device)[:, None]  # [G, 1]
    forced_box = torch.where(forced, number, -1).amax(dim=1)  # [B, P]

    box = torch.where(forced_box >= 0, forced_box, best_box)
    best_overlap = torch.where(forced_box >= 0, FORCED_OVERLAP, best_overlap)
    classes = labels.gather(1, box) + 1
    matched = boxes_ltrb.gather(1, box[..., None, None].expand(-1, -1, frames, 4))  # [B, P, T, 4]
    return Matches(
        torch.where(best_overlap >= iou_threshold, classes, 0), encode(matched, priors_cxcywh)
    )
