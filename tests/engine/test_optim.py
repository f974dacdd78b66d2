"""DenseSGD: torch's fused SGD, bit for bit, also where gradients are laid out unlike parameters."""

import pytest
import torch

from accel.engine.optim import DenseSGD

SHAPES = [(8, 4, 3, 3), (4, 3, 7, 7), (16,), (8, 4, 1, 1), (4, 4, 3, 3, 3)]


def _laid_out(tensor, layout):
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gradients", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format])
def test_same_bits_as_torch(weights, gradients, momentum):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    results = []
    for optimizer, layout in ((torch.optim.SGD, torch.contiguous_format), (DenseSGD, weights)):
        steps = torch.Generator().manual_seed(1)
        parameters = [torch.nn.Parameter(_laid_out(v.clone(), layout)) for v in values]
        sgd = optimizer(parameters, lr=0.1, momentum=momentum, weight_decay=0.01, fused=True)
        for parameter in parameters if momentum else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros(parameter.shape)
        for _ in range(3):
            for parameter in parameters:
                grad = torch.randn(parameter.shape, generator=steps)
                own = gradients if optimizer is DenseSGD else layout
                parameter.grad = _laid_out(grad, own)
            sgd.found_inf = torch.tensor(0.0)
            sgd.step()
        sgd.found_inf = torch.tensor(1.0)
        sgd.step()  # changes nothing
        results.append(parameters)
    for expected, value in zip(*results, strict=True):
        assert torch.equal(expected, value)
        assert not torch.equal(value, torch.zeros_like(value))
