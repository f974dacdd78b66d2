"""Boxes: two forms, overlap, and their coding relative to prior boxes.

A box is four numbers in the last dimension, as fractions of the image's width and height: `ltrb` is
(left, top, right, bottom), `cxcywh` is (center x, center y, width, height). The boxes of the T
frames of a micro-tube are coded one by one with the same prior.
"""

import torch
from torch import Tensor

CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2


def ltrb_from_cxcywh(boxes_cxcywh: Tensor) -> Tensor:
    """Corners of boxes [..., 4] given by center and size."""
    center, size = boxes_cxcywh.chunk(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def pairwise_iou(first_ltrb: Tensor, second_ltrb: Tensor) -> Tensor:
    """Intersection over union of each of [..., A, 4] with each of [..., B, 4]: [..., A, B].

    Areas are (right - left) * (bottom - top). Two boxes without area have the overlap 0.
    """
    first, second = first_ltrb[..., :, None, :], second_ltrb[..., None, :, :]
    corner = torch.minimum(first[..., 2:], second[..., 2:])
    sides = (corner - torch.maximum(first[..., :2], second[..., :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]  # [..., A, B]
    union = _area(first) + _area(second) - shared
    return torch.where(union > 0, shared / union, 0)


def encode(boxes_ltrb: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Regression targets [..., P, 4*T] of boxes [..., P, T, 4], one micro-tube per prior [P, 4].

    Per frame ((center - prior center) / (0.1 * prior size), ln(size / prior size) / 0.2). A box
    without width or height has a large negative finite target where the logarithm would be
    infinite.
    """
    center = (boxes_ltrb[..., :2] + boxes_ltrb[..., 2:]) / 2
    size = boxes_ltrb[..., 2:] - boxes_ltrb[..., :2]
    prior_center, prior_size = priors_cxcywh[:, None].chunk(2, dim=-1)  # [P, 1, 2] each
    move = (center - prior_center) / (CENTER_VARIANCE * prior_size)
    ratio = (size / prior_size).clamp(min=torch.finfo(size.dtype).tiny)
    return torch.cat([move, ratio.log() / SIZE_VARIANCE], dim=-1).flatten(-2)


def decode(loc: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Boxes [..., P, T, 4] in ltrb from regression outputs [..., P, 4*T]; inverse of `encode`."""
    move, scale = torch.unflatten(loc, -1, (-1, 4)).chunk(2, dim=-1)  # [..., P, T, 2] each
    prior_center, prior_size = priors_cxcywh[:, None].chunk(2, dim=-1)
    center = prior_center + CENTER_VARIANCE * move * prior_size
    size = prior_size * (SIZE_VARIANCE * scale).exp()
    return ltrb_from_cxcywh(torch.cat([center, size], dim=-1))


def _area(boxes_ltrb: Tensor) -> Tensor:
    sides = boxes_ltrb[..., 2:] - boxes_ltrb[..., :2]
    return sides[..., 0] * sides[..., 1]
