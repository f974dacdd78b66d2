"""From a network's output to detections, on the device and for a whole batch."""

from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from accel.detection.boxes import decode


class Detections(NamedTuple):
    """Boxes of B micro-tubes for A classes, best first, padded."""

    boxes: Tensor
    """[B, A, n, T, 4] ltrb, fractions of the image; left and top at least 0, right and bottom at
    most 1; 0 behind the count."""

    scores: Tensor
    """[B, A, n]; 0 behind the count."""

    counts: Tensor
    """[B, A] int64"""

    priors: Tensor
    """[B, A, n] int64: prior of each box; -1 behind the count."""


def detect(
    conf: Tensor,
    loc: Tensor,
    priors_cxcywh: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float = 0.45,
    top_k: int = 20,
    drop_single: bool = False,
) -> Detections:
    """Score, decode and suppress: the detections of every action class.

    Suppression compares the boxes of the first frame. Nothing waits for the device.

    Args:
        conf: logits [B, P, K], class 0 is background.
        loc: [B, P, 4*T].
        priors_cxcywh: [P, 4].
        score_threshold: scores must be larger.
        iou_threshold: a box that overlaps a better one by more is dropped.
        top_k: best boxes of a class that suppression sees.
        drop_single: a class with exactly one box above the threshold has none, as in the published
            frame evaluation.
    """
    wide = torch.promote_types(conf.dtype, torch.float32)
    probs = conf.to(wide).softmax(dim=-1)[..., 1:].transpose(1, 2)  # [B, A, P]
    boxes = decode(loc.to(wide), priors_cxcywh.to(wide))  # [B, P, T, 4]
    batch, num_classes = probs.shape[:2]
    if drop_single:
        # Parity: AMTNet, ROAD: a squeeze makes a list of one number a number, taken for nothing.
        single = (probs > score_threshold).sum(dim=-1, keepdim=True) == 1
        probs = probs.masked_fill(single, 0)
    first = boxes[:, None, :, 0].expand(-1, num_classes, -1, -1)  # [B, A, P, 4]
    indices, counts = kernels.nms(
        first.flatten(0, 1),
        probs.flatten(0, 1),
        iou_threshold=iou_threshold,
        top_k=top_k,
        score_threshold=score_threshold,
    )
    found = indices >= 0
    chosen = indices.clamp(min=0)  # [B*A, n]
    scores = probs.flatten(0, 1).gather(1, chosen).masked_fill(~found, 0)
    batch_index = torch.arange(batch, device=conf.device).repeat_interleave(num_classes)
    picked = boxes[batch_index[:, None], chosen]  # [B*A, n, T, 4]
    picked = torch.cat([picked[..., :2].clamp(min=0), picked[..., 2:].clamp(max=1)], dim=-1)
    picked = picked.masked_fill(~found[..., None, None], 0)
    shape = (batch, num_classes)
    return Detections(
        picked.view(*shape, *picked.shape[1:]),
        scores.view(*shape, -1),
        counts.view(shape),
        indices.view(*shape, -1),
    )
