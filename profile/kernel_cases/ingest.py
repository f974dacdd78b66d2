"""ingest at 224 x 224: single frames, the 5 frames of a TDN segment, and their differences."""

import functools
from collections.abc import Iterator

import torch
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels

SIZE = 224
# Form: (frames per segment, channels of the result).
FORMS = {"rgb": (1, 3), "padded": (1, 4), "segment": (5, 15), "differ": (5, 12)}


def original_chain(frames: Tensor, mean: Tensor, std: Tensor, frames_per_segment: int) -> Tensor:
    """The computation as published loaders run it: to [0, 1] in NCHW, stack, subtract, divide."""
    x = frames.permute(0, 3, 1, 2).contiguous().to(mean.dtype).div(255)  # [B*L, 3, H, W]
    x = x.view(-1, 3 * frames_per_segment, *x.shape[2:])
    x = x - mean.repeat(frames_per_segment)[:, None, None]
    return x.div(std.repeat(frames_per_segment)[:, None, None])


def cases(setting: Setting) -> Iterator[Case]:
    """All forms; the sites of ResNet-50 play no role."""
    mean, std = setting.coefficient(3).abs(), setting.coefficient(3).abs() + 0.1
    for form, (length, channels) in FORMS.items():
        shape = (setting.batch * setting.num_segments * length, SIZE, SIZE, 3)
        frames = torch.randint(256, shape, device=setting.device, dtype=torch.uint8)
        common = {"dtype": setting.dtype, "frames_per_segment": length}
        if form == "differ":
            operator, inputs = kernels.ingest_differences, (frames, std)
        else:
            common["channels"] = channels
            operator, inputs = kernels.ingest, (frames, mean, std)
        codes = {
            backend: Code(functools.partial(operator, **common, backend=backend), inputs)
            for backend in (setting.backend, "reference")
        }
        if form in ("rgb", "segment") and setting.dtype == mean.dtype:
            chain = functools.partial(original_chain, frames_per_segment=length)
            codes["original"] = Code(chain, inputs)
        element = torch.empty((), dtype=setting.dtype).element_size()
        written = frames.numel() // (3 * length) * channels * element
        yield Case("ingest", form, channels, SIZE, {"forward": frames.numel() + written}, codes)
