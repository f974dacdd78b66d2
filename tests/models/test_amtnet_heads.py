"""AMTNet's heads: the convolution against gathered windows and linear layers, and the re-layout."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from accel.models.amtnet_heads import MicrotubeHead
from accel.models.convert.amtnet_heads import convolution_from_linear, linear_from_convolution


def gather_windows(x: Tensor, num_frames: int) -> Tensor:
    """[N*T, C, H, W] -> [N, H*W, T*9*C]: frame, row and column of the window, channel."""
    NT, C, H, W = x.shape
    windows = torch.empty(NT, H, W, 3, 3, C, dtype=x.dtype)
    for i in range(H):
        for j in range(W):
            for dy in range(3):
                for dx in range(3):
                    row, column = min(max(i + dy - 1, 0), H - 1), min(max(j + dx - 1, 0), W - 1)
                    windows[:, i, j, dy, dx] = x[:, :, row, column]
    windows = windows.view(-1, num_frames, H * W, 9 * C)  # [N, T, H*W, 9*C]
    return windows.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_head_is_windows_and_linear_layers(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    N, T, C, m, K = 2, 3, 5, 4, 7
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(N * T, C, *size).contiguous(memory_format=layout).requires_grad_()
    linear = {"loc": normal(m * 4 * T, T * 9 * C), "conf": normal(m * K, T * 9 * C)}
    bias = {"loc": normal(m * 4 * T), "conf": normal(m * K)}
    head = MicrotubeHead(C, num_frames=T, boxes_per_cell=m, loc_size=4 * T, num_classes=K).double()
    head.to(memory_format=layout)
    for name in linear:
        layer = head.get_submodule(name)
        layer.weight.data.copy_(convolution_from_linear(linear[name], T))
        layer.bias.data.copy_(bias[name])

    windows = gather_windows(x / 9, T)
    expected = {
        name: F.linear(windows, linear[name], bias[name]).reshape(N, size[0] * size[1] * m, -1)
        for name in linear
    }
    loc, conf = head(x)
    torch.testing.assert_close(loc, expected["loc"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conf, expected["conf"], rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(loc.sum() + conf.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected["loc"].sum() + expected["conf"].square().sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_concatenated_streams_are_further_frames() -> None:
    """Linear weight [base | extra]: the sum of one convolution for each stream."""
    T, C = 2, 3
    weight = torch.randn(4, 2 * T * 9 * C)
    both = convolution_from_linear(weight, 2 * T)
    base, extra = (convolution_from_linear(part, T) for part in weight.chunk(2, dim=1))
    assert torch.equal(both, torch.cat([base, extra], dim=1))


@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_re_layout_is_exact_both_ways(num_frames: int) -> None:
    weight = torch.randn(6, num_frames * 9 * 5)
    convolution = convolution_from_linear(weight, num_frames)
    assert convolution.shape == (6, num_frames * 5, 3, 3)
    assert convolution[2, num_frames * 5 - 1, 1, 2] == weight[2, (num_frames - 1) * 45 + 5 * 5 + 4]
    assert torch.equal(linear_from_convolution(convolution, num_frames), weight)


@pytest.mark.parametrize("shape", [(4, 44), (4, 45, 1)], ids=str)
def test_weights_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"AMTNet head: weight must be \[O, T\*9\*C\] with T = 1"):
        convolution_from_linear(torch.zeros(shape), 1)


def test_initial_weights_are_those_of_linear_layers() -> None:
    head = MicrotubeHead(64, num_frames=2, boxes_per_cell=4, loc_size=8, num_classes=25)
    for layer, outputs in ((head.loc, 32), (head.conf, 100)):
        bound = (6 / (2 * 9 * 64 + outputs)) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() == 0
