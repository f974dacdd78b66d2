"""nms: greedy non-maximum suppression in many sets of boxes at once (a set is an image's class).

Operator of kernels._C:
    accel_kernels::nms(Tensor boxes, Tensor candidates, float iou_threshold) -> Tensor keep
"""

import math

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "nms"
_MOST_ON_CUDA = 512  # boxes of a set: kMostNmsBoxes


def nms(
    boxes_ltrb: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    top_k: int,
    score_threshold: float = -math.inf,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose boxes by descending score, each overlapping no chosen one by more than a threshold.

    In each set, of the boxes with a score above `score_threshold` the `top_k` best are candidates
    (equal scores: lower index first); from the best on, a candidate is kept if its intersection
    over union with every box kept before is at most `iou_threshold`. Areas are (right - left) *
    (bottom - top); between two boxes without area the overlap is undefined, and the worse is
    dropped. Nothing waits for the device, and no gradient flows. bf16 and fp16 boxes are compared
    in fp32.

    Args:
        boxes_ltrb: [S, M, 4] left, top, right, bottom, floating point.
        scores: [S, M], floating point. -inf marks padding; NaN is left out as well.
        iou_threshold: 0 to 1.
        top_k: candidates of a set, >= 1. The CUDA kernel takes up to 512, "auto" runs the reference
            beyond.
        score_threshold: scores must be larger.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        indices: [S, top_k] int64 into the M boxes, best first, filled up with -1.
        counts: [S] int64, kept boxes of each set.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(boxes_ltrb, scores, iou_threshold, top_k)
    boxes_ltrb, scores = boxes_ltrb.detach(), scores.detach()
    eligible = scores > score_threshold
    best = _best_first(scores.masked_fill(~eligible, -math.inf), top_k)  # [S, K]
    candidates = eligible.sum(dim=1).clamp(max=best.shape[1])  # [S]
    wide = torch.promote_types(boxes_ltrb.dtype, torch.float32)
    ordered = boxes_ltrb.gather(1, best[..., None].expand(-1, -1, 4)).to(wide)  # [S, K, 4]
    if use_compiled(_OP, backend, boxes_ltrb.device.type, can_use_compiled(ordered)):
        keep = torch.ops.accel_kernels.nms(ordered.contiguous(), candidates, iou_threshold)
    else:
        keep = reference.nms(ordered, candidates, iou_threshold=iou_threshold)
    return _to_front(best, keep, top_k), keep.sum(dim=1)


def _best_first(scores: Tensor, top_k: int) -> Tensor:
    """Indices [S, min(M, top_k)] of the largest scores, descending, equal ones by index.

    Only the chosen are sorted: topk alone would leave open which of equal scores it takes.
    """
    if scores.shape[1] <= top_k:
        return scores.sort(dim=1, descending=True, stable=True).indices
    least = scores.topk(top_k, dim=1).values[:, -1:]  # [S, 1]
    above, level = scores > least, scores == least
    room = top_k - above.sum(dim=1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=1) <= room))  # [S, M], top_k in each set
    every = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    indices = _to_front(every, chosen, top_k)
    order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


def _to_front(values: Tensor, chosen: Tensor, columns: int) -> Tensor:
    """The chosen values [S, columns] of each row in order, then -1."""
    # All others land in one column more, which is cut off.
    column = torch.where(chosen, chosen.cumsum(dim=1) - 1, columns)
    target = values.new_full((values.shape[0], columns + 1), -1)
    return target.scatter(1, column, values)[:, :columns]


def can_use_compiled(ordered: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin takes [S, K, 4] candidates; and if not, why."""
    usable, reason = _library.can_run_on(ordered.device.type)
    if usable and ordered.device.type == "cuda" and ordered.shape[1] > _MOST_ON_CUDA:
        return False, f"a set has {ordered.shape[1]} candidates, more than {_MOST_ON_CUDA}"
    return usable, reason


def _check(boxes_ltrb: Tensor, scores: Tensor, iou_threshold: float, top_k: int) -> None:
    if boxes_ltrb.dim() != 3 or boxes_ltrb.shape[2] != 4 or not boxes_ltrb.is_floating_point():
        raise ValueError(
            f"{_OP}: boxes_ltrb must be [S, M, 4] of a floating dtype, "
            f"got {list(boxes_ltrb.shape)}, {boxes_ltrb.dtype}."
        )
    if scores.shape != boxes_ltrb.shape[:2] or not scores.is_floating_point():
        raise ValueError(
            f"{_OP}: scores must be [S, M] = {list(boxes_ltrb.shape[:2])} of a floating dtype, "
            f"got {list(scores.shape)}, {scores.dtype}."
        )
    if top_k < 1 or not 0 <= iou_threshold <= 1:
        raise ValueError(
            f"{_OP}: top_k must be at least 1 and iou_threshold between 0 and 1, "
            f"got {top_k} and {iou_threshold}."
        )


def _fake(boxes: Tensor, candidates: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


if _library.AVAILABLE:
    torch.library.register_fake(f"accel_kernels::{_OP}", _fake)
