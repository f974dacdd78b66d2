import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from accel.models import patch_conv
from accel.models.patch_conv import PatchConv2d

EXACT = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-4, 1e-5)}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches are used for small weights too."""
    monkeypatch.setattr(patch_conv, "MIN_WEIGHTS", 1)


def run(conv: nn.Conv2d, x: torch.Tensor, *, plain: bool) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = nn.Conv2d.forward(conv, x) if plain else conv(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
    assert x.grad is not None
    assert conv.weight.grad is not None
    grads = [x.grad, conv.weight.grad]
    conv.weight.grad = None
    return [y.detach(), *grads]


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((14, 14), 3, 2, 1),
        ((7, 9), 3, 2, 1),
        ((6, 8), 3, 2, 0),
        ((5, 4), 5, 1, 2),
        ((1, 1), 3, 2, 1),
    ],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_values_and_gradients_are_those_of_the_convolution(
    size: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    layout: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    conv = PatchConv2d(6, 10, kernel, stride=stride, padding=padding, bias=False)
    conv = conv.to(dtype=dtype, memory_format=layout)
    x = torch.randn(3, 6, *size, dtype=dtype).contiguous(memory_format=layout)
    rtol, atol = EXACT[dtype]
    for got, expected in zip(run(conv, x, plain=False), run(conv, x, plain=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    conv = PatchConv2d(4, 4, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 4, 6, 6)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    conv.weight.requires_grad_(False)
    x.requires_grad_()
    conv.weight.grad = None
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None


def test_multiply_adds_are_counted_as_those_of_the_convolution() -> None:
    with FakeTensorMode():
        conv = PatchConv2d(8, 16, 3, stride=2, padding=1, bias=False)
        x = torch.empty(2, 8, 14, 14)
        counts = []
        for forward in (conv.forward, super(PatchConv2d, conv).forward):
            with FlopCounterMode(display=False) as counter:
                forward(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 7 * 7 * 16 * 8 * 9


def test_autocast_and_export_take_the_convolution() -> None:
    conv = PatchConv2d(4, 8, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    exported = torch.export.export(conv, (x,))
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert operators == {"aten.conv2d.default"}
