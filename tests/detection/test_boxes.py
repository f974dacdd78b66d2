"""Boxes and priors: forms, overlap, coding."""

import pytest
import torch

from accel.detection.boxes import decode, encode, ltrb_from_cxcywh, pairwise_iou
from accel.detection.priors import BOXES_PER_CELL, MAP_SIZES, ssd300_priors


def test_corners() -> None:
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.25], [0.0, 0.0, 0.0, 0.0]])
    assert ltrb_from_cxcywh(boxes).tolist() == [[0.25, 0.125, 0.75, 0.375], [0.0] * 4]


def test_overlap() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 3.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 4.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[1 / 7, 0, 0], [0, 0, 0]]))
    assert pairwise_iou(a, a).diagonal().tolist() == [1.0, 0.0]
    assert pairwise_iou(a[None], b[None].expand(4, -1, -1)).shape == (4, 2, 3)


def test_coding_inverts_and_follows_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    priors = 0.1 + torch.rand(5, 4, generator=generator, dtype=torch.float64)
    loc = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    boxes = decode(loc, priors)
    assert boxes.shape == (2, 5, 3, 4)
    torch.testing.assert_close(encode(boxes, priors), loc, rtol=0, atol=1e-12)
    x, y, w, h = priors[3].tolist()
    left, _, right, bottom = boxes[1, 3, 2].tolist()
    dx, dy, dw, dh = loc[1, 3, 8:].tolist()
    assert (left + right) / 2 == pytest.approx(x + 0.1 * dx * w)
    assert right - left == pytest.approx(w * torch.tensor(0.2 * dw).exp().item(), rel=1e-6)
    assert bottom == pytest.approx(
        y + 0.1 * dy * h + h / 2 * torch.tensor(0.2 * dh).exp().item(), rel=1e-6
    )


def test_boxes_without_area_have_finite_targets() -> None:
    boxes = torch.tensor([0.5, 0.5, 0.5, 0.4]).expand(1, 1, 4)  # not even the right way round
    targets = encode(boxes, torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    assert torch.isfinite(targets).all() and (targets[0, 2:] < -100).all()


def test_priors() -> None:
    priors = ssd300_priors()
    assert priors.shape == (8732, 4) and priors.dtype == torch.float32
    cells = sum(s * s * n for s, n in zip(MAP_SIZES, BOXES_PER_CELL, strict=True))
    assert cells == 8732
    assert priors.min() >= 0 and priors.max() <= 1
    torch.testing.assert_close(priors[0], torch.tensor([4 / 300, 4 / 300, 0.1, 0.1]))
    torch.testing.assert_close(priors[-1, :2], torch.tensor([0.5, 0.5]))
    assert (ltrb_from_cxcywh(priors) < 0).any()  # the center form is clamped, not the corners
