"""Batch-norm statistics of a training step that was skipped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # elements: vector loads of a statistic stay aligned


class StepStatistics:
    """Takes batch-norm statistics back to where a step found them, decided on the device.

    A loss scaler may skip a step, but by then the forward pass has moved the running statistics
    (and one that overflowed has ruined them). The buffers of all norms become views of one tensor
    per type, so that keeping and restoring them are few operations.

    Args:
        model: on its device; its buffers stay what they are for everybody else.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._now: list[Tensor] = []
        for names in (("running_mean", "running_var"), ("num_batches_tracked",)):
            found = [(m, n) for m in norms for n in names if getattr(m, n) is not None]
            if found:
                self._now.append(_joined(found))
        self._before = [values.clone() for values in self._now]

    def keep(self) -> None:
        """Remember the statistics before a step."""
        for before, now in zip(self._before, self._now, strict=True):
            before.copy_(now)

    def restore_if(self, skipped: Tensor) -> None:
        """Take the statistics back if `skipped` (a scalar on the device) is not zero."""
        for before, now in zip(self._before, self._now, strict=True):
            now.copy_(before.where(skipped != 0, now))


def _joined(buffers: Sequence[tuple[nn.Module, str]]) -> Tensor:
    """One tensor of which all these buffers are views from now on."""
    tensors: list[Tensor] = [getattr(module, name) for module, name in buffers]
    lengths = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    joined = torch.zeros(sum(lengths), dtype=tensors[0].dtype, device=tensors[0].device)
    offset = 0
    for (module, name), tensor, length in zip(buffers, tensors, lengths, strict=True):
        view = joined[offset : offset + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        setattr(module, name, view)
        offset += length
    return joined
