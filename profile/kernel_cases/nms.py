"""nms as AMTNet's evaluation uses it: 24 classes of each image, the best 200 of 8732 boxes."""

import functools
from collections.abc import Iterator

import torch
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels

CLASSES = 24
PRIORS = 8732
OPTIONS = {"iou_threshold": 0.45, "top_k": 200}


def original_loop(boxes_ltrb: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The computation as published models run it: set by set, box by box, on the host."""
    top_k = OPTIONS["top_k"]
    indices = torch.full((len(scores), top_k), -1, device=scores.device)
    for row, boxes, set_scores in zip(indices, boxes_ltrb, scores, strict=True):
        order = set_scores.sort(descending=True, stable=True).indices[:top_k]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
        kept = []
        while order.numel():
            best, order = order[0], order[1:]
            kept.append(best)
            sides = torch.minimum(boxes[best, 2:], boxes[order, 2:])
            sides = (sides - torch.maximum(boxes[best, :2], boxes[order, :2])).clamp(min=0)
            shared = sides.prod(dim=-1)
            overlap = shared / (areas[best] + areas[order] - shared)
            order = order[overlap <= OPTIONS["iou_threshold"]]
        row[: len(kept)] = torch.stack(kept)
    return indices, (indices >= 0).sum(dim=1)


def cases(setting: Setting) -> Iterator[Case]:
    """One case; the sites of ResNet-50 play no role."""
    sets = setting.batch * CLASSES
    corner = setting.coefficient(sets, PRIORS, 2).abs()
    boxes = torch.cat([corner, corner + 0.5 * setting.coefficient(sets, PRIORS, 2).abs()], dim=-1)
    scores = setting.coefficient(sets, PRIORS)
    read = (boxes.numel() + scores.numel()) * boxes.element_size()
    written = 8 * sets * (OPTIONS["top_k"] + 1)
    operator = functools.partial(kernels.nms, **OPTIONS)
    codes = {
        setting.backend: Code(
            functools.partial(operator, backend=setting.backend), (boxes, scores)
        ),
        "reference": Code(functools.partial(operator, backend="reference"), (boxes, scores)),
    }
    if setting.device == "cpu":  # on a GPU each box waits for the device: minutes in all
        codes["original"] = Code(original_loop, (boxes, scores))
    yield Case(
        "nms",
        "detect",
        CLASSES,
        PRIORS,
        {"forward": read + written},
        codes,
    )
