"""Parameters and multiply-adds of a network, counted on tensors without storage."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from accel.models.detectors import Detector
from accel.models.network import ClipNetwork
from kernels import reference

# Multiply-adds of our operators, by the counting of the published figures: products with weights
# (convolutions, linear layers, taps) and nothing else. So blends, gates, norms, pooling and
# bilinear sampling are free, wherever they are computed.
_MACS: dict[str, Callable[..., int]] = {
    # Three taps per element.
    "temporal_taps": lambda x, *_: 3 * x.numel(),
    # The motion is a product over its r reduced channels; then three taps.
    "mas_fuse": lambda x, m, *_: (m.shape[1] + 3) * x.numel(),
    # Each of two gates is a product over r reduced channels; then three taps.
    "diff_gate_shift": lambda x, z, *_: (2 * z.shape[1] + 3) * x.numel(),
    # The kernel at each output position.
    "deform_conv": lambda x, _offset, weight, *_: weight.numel() * x[:, 0].numel(),
    "branch_fuse": lambda *_: 0,
    "bn_act": lambda *_: 0,
}


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network_cost(build: Callable[[], ClipNetwork], *, size: int = 224) -> tuple[int, int]:
    """Parameters of a network, and multiply-adds of one clip in evaluation.

    Parameters are counted as in published tables: everything in the state dict except statistics of
    norms, so also tensors that TDN and MSN carry along without using them.

    Args:
        build: makes the network; called where tensors have no storage.
        size: height and width of the frames, pixels.
    """
    with FakeTensorMode():
        model = build().eval().requires_grad_(False)
        frames = torch.empty(model.num_segments, 3 * model.frames_per_segment, size, size)
        counter = FlopCounterMode(display=False)
        extra = [0]
        with counter, _counted_operators(counter, extra), torch.no_grad():
            model(frames)
        parameters = sum(
            value.numel()
            for name, value in model.state_dict().items()
            if not name.endswith(_STATISTICS)
        )
    return parameters, counter.get_total_flops() // 2 + extra[0]


def detector_cost(build: Callable[[], Detector], *, size: int = 300) -> tuple[int, int]:
    """Parameters of a detector, and multiply-adds of one micro-tube (one frame of an SSD).

    Args:
        build: makes the network; called where tensors have no storage.
        size: height and width of the frames, pixels.
    """
    with FakeTensorMode():
        model = build().eval().requires_grad_(False)
        inputs = [
            torch.empty(model.num_frames, trunk.in_channels, size, size) for trunk in model.trunks
        ]
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(*inputs)
        parameters = sum(value.numel() for value in model.parameters())
    return parameters, counter.get_total_flops() // 2


@contextlib.contextmanager
def _counted_operators(counter: FlopCounterMode, extra: list[int]) -> Iterator[None]:
    """Run the operators as their references; add to `extra` what `counter` does not see of them."""

    def counted(name: str) -> Callable[..., Tensor]:
        def operator(*args: Any, backend: str | None = None, **options: Any) -> Tensor:
            before = counter.get_total_flops()
            result: Tensor = getattr(reference, name)(*args, **options)
            inside = (counter.get_total_flops() - before) // 2
            extra[0] += _MACS[name](*args) - inside
            return result

        return operator

    with contextlib.ExitStack() as stack:
        for name in _MACS:
            if hasattr(kernels, name):
                stack.enter_context(mock.patch.object(kernels, name, counted(name)))
        yield
