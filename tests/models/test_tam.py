"""The Temporal Adaptive Module against its formula, written out in loops."""

import pytest
import torch

from accel.models.tanet import TAM


def _formula(tam: TAM, x: torch.Tensor) -> torch.Tensor:
    """y[n,t,c] = sum_j k[n,c,j] a[n,c,t+j-1] x[n,t+j-1,c], in evaluation mode."""
    num_segments = tam.num_segments
    clips = x.unflatten(0, (-1, num_segments))  # [N, T, C, H, W]
    y = torch.zeros_like(clips)
    for n, clip in enumerate(clips):
        theta = clip.mean(dim=(-2, -1)).T  # [C, T]
        taps = tam.G(theta)  # [C, 3]
        importance = tam.L(theta[None])[0]  # [C, T]
        for t in range(num_segments):
            for j in range(3):
                source = t + j - 1
                if 0 <= source < num_segments:
                    gate = taps[:, j] * importance[:, source]  # [C]
                    y[n, t] += gate[:, None, None] * clip[source]
    return y.flatten(0, 1)  # [N*T, C, H, W]


@pytest.mark.parametrize("num_segments", [1, 2, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_formula(num_segments, memory_format):
    torch.manual_seed(0)
    tam = TAM(12, num_segments).double().eval()
    x = torch.randn(3 * num_segments, 12, 4, 5, dtype=torch.float64)
    y = tam(x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, _formula(tam, x), rtol=1e-12, atol=1e-12)


def test_gradients():
    torch.manual_seed(0)
    tam = TAM(4, 3).double()
    x = torch.randn(6, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tam, (x,))


def test_branches_stay_in_fp32_under_autocast():
    torch.manual_seed(0)
    tam = TAM(8, 4).eval()
    x = torch.randn(4, 8, 3, 3).bfloat16()
    dtypes = []
    for branch in (tam.G, tam.L):
        branch.register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tam(x)
    assert y.dtype == torch.bfloat16
    assert dtypes == [torch.float32, torch.float32]


def test_too_few_channels_are_named():
    with pytest.raises(ValueError, match="channels must be >= beta = 4, got 3"):
        TAM(3, 8)
