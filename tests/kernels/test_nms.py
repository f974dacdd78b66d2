"""nms: compiled operator against the reference and a plain loop, ties, padding, PyTorch's parts."""

import math
import warnings

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

needs_extension = pytest.mark.needs_extension
DEVICES = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[needs_extension, pytest.mark.needs_cuda]),
]


def make(S: int, M: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Boxes in few places, so that many overlap, and scores with many ties."""
    generator = torch.Generator().manual_seed(S * 1000 + M)
    centers = torch.rand(S, M, 2, generator=generator).mul(4).round() / 4
    sizes = 0.05 + 0.4 * torch.rand(S, M, 2, generator=generator)
    moves = 0.1 * torch.rand(S, M, 2, generator=generator)
    boxes = torch.cat([centers + moves - sizes / 2, centers + moves + sizes / 2], dim=-1)
    scores = torch.rand(S, M, generator=generator).mul(M / 3).round() / max(M, 1)
    return boxes.to(dtype), scores.to(dtype)


def loop(
    boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int, score_threshold: float
) -> tuple[Tensor, Tensor]:
    """The definition, box by box."""
    indices = torch.full((len(boxes), top_k), -1)
    for s, (set_boxes, set_scores) in enumerate(zip(boxes.tolist(), scores.tolist(), strict=True)):
        order = [i for i, score in enumerate(set_scores) if score > score_threshold]
        order = sorted(order, key=lambda i: -set_scores[i])[:top_k]
        kept: list[int] = []
        for i in order:
            a = set_boxes[i]
            for j in kept:
                b = set_boxes[j]
                width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
                height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
                areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
                union = sum(areas) - width * height
                if union == 0 or not width * height / union <= iou_threshold:
                    break
            else:
                kept.append(i)
        indices[s, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return indices, (indices >= 0).sum(1)


SIZES = [(1, 1, 1), (3, 7, 200), (2, 300, 200), (5, 130, 64), (2, 600, 257), (4, 65, 65)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_the_loop(sizes: tuple[int, int, int], backend: str | None, device: str) -> None:
    S, M, top_k = sizes
    boxes, scores = make(S, M)
    for iou, least in ((0.45, -math.inf), (0.2, 0.1), (0.0, 0.0), (1.0, 0.5)):
        expected = loop(boxes, scores, iou, top_k, least)
        actual = kernels.nms(
            boxes.to(device),
            scores.to(device),
            iou_threshold=iou,
            top_k=top_k,
            score_threshold=least,
            backend=backend,
        )
        assert [v.dtype for v in actual] == [torch.int64, torch.int64]
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_padding_ties_and_boxes_without_area(backend: str | None, device: str) -> None:
    box, far, empty = [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.2, 0.2, 0.2, 0.4]
    boxes = torch.tensor([[far, box, box, far], [empty, empty, box, far]], device=device)
    scores = torch.tensor([[math.nan, 0.5, 0.5, -math.inf], [0.9, 0.8, 0.7, 0.7]], device=device)
    indices, counts = kernels.nms(boxes, scores, iou_threshold=0.45, top_k=4, backend=backend)
    assert indices.tolist() == [[1, -1, -1, -1], [0, 2, 3, -1]]
    assert counts.tolist() == [1, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_threshold_itself_is_kept(device: str) -> None:
    """Overlap exactly one half: 2 of 4 units."""
    boxes = torch.tensor([[[0.0, 0.0, 3.0, 1.0], [1.0, 0.0, 4.0, 1.0]]], device=device)
    scores = torch.tensor([[0.9, 0.8]], device=device)
    for threshold, count in ((0.5, 2), (0.49, 1)):
        _, counts = kernels.nms(boxes, scores, iou_threshold=threshold, top_k=2)
        assert counts.item() == count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_and_strides(dtype: torch.dtype, device: str) -> None:
    boxes, scores = make(3, 90, dtype)
    expected = loop(boxes.float(), scores.float(), 0.45, 50, 0.1)
    boxes = boxes.to(device).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    scores = scores.to(device).t().contiguous().t().requires_grad_()
    actual = kernels.nms(boxes, scores, iou_threshold=0.45, top_k=50, score_threshold=0.1)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other) and not one.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing_to_choose_from(sizes: tuple[int, int], device: str) -> None:
    boxes, scores = (v.to(device) for v in make(*sizes))
    indices, counts = kernels.nms(boxes, scores, iou_threshold=0.5, top_k=4)
    assert indices.shape == (sizes[0], 4) and (indices == -1).all()
    assert torch.equal(counts, torch.zeros_like(counts)) and counts.shape == sizes[:1]


def test_bad_arguments() -> None:
    boxes, scores = make(2, 5)
    cases = [
        ((boxes[0], scores), {}, r"boxes_ltrb must be \[S, M, 4\]"),
        ((boxes[..., :3], scores), {}, r"boxes_ltrb must be \[S, M, 4\]"),
        ((boxes.int(), scores), {}, "of a floating dtype, got"),
        ((boxes, scores[:, :4]), {}, r"scores must be \[S, M\] = \[2, 5\]"),
        ((boxes, scores.int()), {}, "scores must be"),
        ((boxes, scores), {"top_k": 0}, "top_k must be at least 1"),
        ((boxes, scores), {"iou_threshold": 1.5}, "iou_threshold between 0 and 1"),
        ((boxes, scores), {"backend": "fast"}, "backend must be one of"),
    ]
    for arguments, changes, message in cases:
        with pytest.raises(ValueError, match=f"nms: .*{message}|{message}"):
            kernels.nms(*arguments, **{"iou_threshold": 0.5, "top_k": 4, **changes})


@needs_extension
def test_operator_refuses_what_it_cannot_read() -> None:
    boxes, _ = make(2, 5)
    operator = torch.ops.accel_kernels.nms
    candidates = torch.tensor([5, 5])
    with pytest.raises(ValueError, match=r"boxes must be contiguous \[S, K, 4\]"):
        operator(boxes.transpose(0, 1), candidates, 0.5)
    with pytest.raises(TypeError, match="boxes must be float32 or float64"):
        operator(boxes.half(), candidates, 0.5)
    with pytest.raises(ValueError, match="candidates must be contiguous int64"):
        operator(boxes, candidates.int(), 0.5)


@pytest.mark.needs_cuda
@needs_extension
def test_many_candidates_run_the_reference_on_cuda() -> None:
    boxes, scores = (v.cuda() for v in make(2, 600))
    with pytest.warns(RuntimeWarning, match="a set has 600 candidates, more than 512"):
        actual = kernels.nms(boxes, scores, iou_threshold=0.45, top_k=600)
    expected = loop(boxes, scores, 0.45, 600, -math.inf)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other)


@needs_extension
def test_compiled_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "nms", None)  # must not be called
    boxes, scores = make(2, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.nms(boxes, scores, iou_threshold=0.45, top_k=20)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    boxes = make(3, 20)[0].to(device)
    candidates = torch.tensor([20, 0, 7], device=device)
    torch.library.opcheck(torch.ops.accel_kernels.nms, (boxes, candidates, 0.45))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device: str) -> None:
    """No value of a tensor decides what runs: nothing waits for the device."""
    torch.compiler.reset()

    def choose(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.nms(boxes, scores, iou_threshold=0.45, top_k=20, score_threshold=0.1)

    boxes, scores = (v.to(device) for v in make(3, 50))
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(boxes, scores), choose(boxes, scores)))


@pytest.mark.needs_cuda
@needs_extension
def test_cuda_graph_capture() -> None:
    boxes, scores = (v.cuda() for v in make(24, 500, torch.float32))

    def choose() -> tuple[Tensor, Tensor]:
        return kernels.nms(boxes, scores, iou_threshold=0.45, top_k=200, score_threshold=0.1)

    expected = choose()
    with torch.cuda.stream(torch.cuda.Stream()):
        choose()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = choose()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
