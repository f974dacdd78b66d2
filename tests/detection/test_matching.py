"""Matching, mining and the loss: against plain loops, at the edges, as one graph."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from accel.detection.boxes import encode, ltrb_from_cxcywh, pairwise_iou
from accel.detection.losses import multibox_loss
from accel.detection.matching import match
from accel.detection.mining import hard_negatives

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


def make_priors(count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    priors = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    priors[:, 2:] = 0.1 + 0.4 * priors[:, 2:]
    priors[::7] = priors[3]  # equal priors: the first maximum decides
    return priors


def make_boxes(B: int, G: int, T: int) -> tuple[Tensor, Tensor]:
    """Boxes near the priors, some twice, and labels with padding."""
    generator = torch.Generator().manual_seed(B * 100 + G * 10 + T)
    near = make_priors()[torch.randint(0, 40, (B, G), generator=generator)]  # [B, G, 4]
    moves = 0.1 * torch.rand(B, G, T, 4, generator=generator, dtype=torch.float64)
    boxes = ltrb_from_cxcywh(near[:, :, None] + moves)
    boxes[:, 1::3] = boxes[:, :1]
    return boxes, torch.randint(-1, 5, (B, G), generator=generator)


def match_by_loops(boxes: Tensor, labels: Tensor, priors: Tensor, threshold: float) -> list[Tensor]:
    """The published procedure for one image after the other."""
    all_labels, all_targets = [], []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        image_boxes = image_boxes[image_labels >= 0]
        image_labels = image_labels[image_labels >= 0]
        if not len(image_labels):
            all_labels.append(torch.zeros(len(priors), dtype=torch.int64))
            all_targets.append(None)
            continue
        corners = ltrb_from_cxcywh(priors)
        overlap = sum(pairwise_iou(frame, corners) for frame in image_boxes.unbind(1))
        overlap = overlap / image_boxes.shape[1]
        best = [row.tolist() for row in overlap.max(0)]
        for g, row in enumerate(overlap.tolist()):
            prior = row.index(max(row))
            best[0][prior], best[1][prior] = 2.0, g
        chosen = torch.tensor(best[1])
        found = image_labels[chosen] + 1
        found[torch.tensor(best[0]) < threshold] = 0
        all_labels.append(found)
        all_targets.append(encode(image_boxes[chosen], priors))
    return [all_labels, all_targets]


@contextmanager
def refusing_to_wait(device: str) -> Iterator[None]:
    """On CUDA, waiting for the device raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 3, 2), (3, 12, 2), (2, 5, 4)], ids=str)
def test_matches_the_loops(sizes: tuple[int, int, int], device: str) -> None:
    boxes, labels = make_boxes(*sizes)
    priors = make_priors()
    for threshold in (0.0, 0.3, 0.5, 0.9):
        inputs = [value.to(device) for value in (boxes, labels, priors)]
        with refusing_to_wait(device):
            found = match(*inputs, iou_threshold=threshold)
        expected_labels, expected_targets = match_by_loops(boxes, labels, priors, threshold)
        for b, (expected, targets) in enumerate(
            zip(expected_labels, expected_targets, strict=True)
        ):
            assert torch.equal(found.labels[b].cpu(), expected)
            positive = expected > 0
            if positive.any():
                torch.testing.assert_close(found.targets[b].cpu()[positive], targets[positive])


def test_two_boxes_with_the_same_best_prior() -> None:
    """The later one has it, though the earlier overlaps more; the earlier has nothing."""
    priors = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]])
    good, bad = [0.2, 0.2, 0.4, 0.4], [0.25, 0.25, 0.5, 0.5]
    boxes = torch.tensor([[[good], [bad]], [[bad], [good]]])
    found = match(boxes, torch.tensor([[0, 1], [0, 1]]), priors)
    assert found.labels.tolist() == [[2, 0], [2, 0]]
    torch.testing.assert_close(found.targets[0, 0], encode(boxes[0, 1:], priors[:1])[0])


@pytest.mark.parametrize("most", [0, 2])
def test_images_without_boxes(most: int) -> None:
    found = match(torch.zeros(2, most, 2, 4), torch.full((2, most), -1), make_priors().float())
    assert found.labels.shape == (2, 40) and (found.labels == 0).all()
    assert found.targets.shape == (2, 40, 8)


def test_bad_shapes() -> None:
    boxes, labels = make_boxes(2, 3, 2)
    for arguments in ((boxes[0], labels), (boxes, labels[:, :2]), (boxes[..., :3], labels)):
        with pytest.raises(ValueError, match=r"match: boxes_ltrb must be \[B, G, T, 4\]"):
            match(*arguments, make_priors())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0, 1, 3])
def test_hard_negatives(ratio: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(4, 60, generator=generator).mul(10).round()  # many ties
    labels = torch.zeros(4, 60, dtype=torch.int64)
    for row, count in enumerate((0, 1, 7, 30)):
        labels[row, torch.randperm(60, generator=generator)[:count]] = 3
    with refusing_to_wait(device):
        chosen = hard_negatives(loss.to(device), labels.to(device), ratio=ratio).cpu()
    for row_loss, row_labels, row in zip(loss.tolist(), labels.tolist(), chosen, strict=True):
        negatives = [p for p in range(60) if row_labels[p] == 0]
        wanted = ratio * (60 - len(negatives))
        expected = sorted(negatives, key=lambda p: (-row_loss[p], p))[:wanted]
        assert row.nonzero()[:, 0].tolist() == sorted(expected)


def make_loss_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    conf = 3 * torch.randn(3, 50, 6, generator=generator, dtype=torch.float64)
    loc, targets = torch.randn(2, 3, 50, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(-20, 6, (3, 50), generator=generator).clamp(min=0)
    labels[2] = 0
    targets[labels == 0] = math.nan
    conf, loc = conf.to(dtype).requires_grad_(), loc.to(dtype).requires_grad_()
    return conf, loc, labels, targets.to(dtype)


def test_loss_by_loops() -> None:
    conf, loc, labels, targets = make_loss_inputs()
    loss_loc, loss_conf = multibox_loss(conf, loc, labels, targets)
    log_probs = conf.log_softmax(-1)
    expected_loc = expected_conf = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        positive = [p for p in range(50) if labels[b, p] > 0]
        negative = [p for p in range(50) if labels[b, p] == 0]
        negative.sort(key=lambda p: log_probs[b, p, 0].item())
        for p in positive + negative[: 3 * len(positive)]:
            expected_conf = expected_conf - log_probs[b, p, labels[b, p]]
        for p in positive:
            distance = (loc[b, p] - targets[b, p]).abs()
            smooth = torch.where(distance < 1, distance.square() / 2, distance - 0.5)
            expected_loc = expected_loc + smooth.sum()
    count = (labels > 0).sum()
    torch.testing.assert_close(loss_loc, expected_loc / count)
    torch.testing.assert_close(loss_conf, expected_conf / count)
    grads = torch.autograd.grad(loss_loc + loss_conf, (conf, loc))
    wanted = torch.autograd.grad((expected_loc + expected_conf) / count, (conf, loc))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_without_positive_priors_is_zero() -> None:
    conf, loc, labels, targets = make_loss_inputs()
    losses = multibox_loss(conf, loc, torch.zeros_like(labels), targets)
    assert [loss.item() for loss in losses] == [0, 0]
    for grad in torch.autograd.grad(sum(losses), (conf, loc)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_loss_of_a_part_of_the_batch() -> None:
    conf, loc, labels, targets = make_loss_inputs()
    whole = multibox_loss(conf, loc, labels, targets)
    count = (labels > 0).sum()
    parts = [
        multibox_loss(conf[s], loc[s], labels[s], targets[s], divisor=count)
        for s in (slice(0, 1), slice(1, 3))
    ]
    for total, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(first + second, total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_of_half_predictions_is_fp32(dtype: torch.dtype) -> None:
    conf, loc, labels, targets = make_loss_inputs(dtype)
    wide = [value.detach().float() for value in (conf, loc)]
    losses = multibox_loss(conf, loc, labels, targets)
    for loss, expected in zip(losses, multibox_loss(*wide, labels, targets.float()), strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)
    sum(losses).backward()
    assert conf.grad.dtype == dtype and torch.isfinite(conf.grad).all()
    assert torch.isfinite(loc.grad).all()


@pytest.mark.parametrize("device", DEVICES)
def test_everything_is_one_graph(device: str) -> None:
    """From boxes to the loss: no branch on a value, no shape that depends on one."""
    torch.compiler.reset()
    boxes, labels = (value.to(device) for value in make_boxes(3, 4, 2))
    priors = make_priors().to(device)
    conf, loc = (value.detach().to(device)[:, :40] for value in make_loss_inputs()[:2])

    def step(conf: Tensor, loc: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        losses = multibox_loss(conf, loc, *match(boxes, labels, priors))
        return losses[0] + losses[1]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [value.clone().requires_grad_() for value in (conf, loc)]
        with refusing_to_wait(device):
            loss = function(*leaves, boxes, labels)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
