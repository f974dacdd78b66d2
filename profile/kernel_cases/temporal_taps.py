"""temporal_taps as TAM uses it (taps per clip, gate) and as trained shifts do."""

import functools
import itertools
from collections.abc import Iterator

import torch.nn.functional as F
from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels

# Form: (taps per sample, gate).
FORMS = {"tam": (True, True), "shift": (False, False)}


def original_chain(x: Tensor, w: Tensor, a: Tensor | None, num_segments: int) -> Tensor:
    """The computation as published models run it: NCHW copies around a grouped convolution.

    To [N, C, T, H, W], gate, one convolution with N*C groups over a [1, N*C, T, H*W] view, back.
    """
    batch, channels, size = x.shape[0] // num_segments, x.shape[1], x.shape[2:]
    clips = x.view(batch, num_segments, channels, *size).transpose(1, 2).contiguous()
    if a is not None:
        clips = clips * a.transpose(1, 2)[..., None, None]
    taps = w.expand(batch, channels, 3).reshape(batch * channels, 1, 3, 1).to(x.dtype)
    rows = clips.to(x.dtype).view(1, batch * channels, num_segments, -1)
    rows = F.conv2d(rows, taps, padding=(1, 0), groups=batch * channels)
    clips = rows.view(batch, channels, num_segments, *size)
    return clips.transpose(1, 2).reshape(x.shape)


def cases(setting: Setting) -> Iterator[Case]:
    """All forms at all sites."""
    batch, num_segments = setting.batch, setting.num_segments
    for (channels, size), (form, (per_sample, gated)) in itertools.product(
        setting.sites, FORMS.items()
    ):
        x = setting.activation(channels, size)
        w = setting.coefficient(*((batch, channels, 3) if per_sample else (channels, 3)))
        a = setting.coefficient(batch, num_segments, channels) if gated else None
        taps = functools.partial(kernels.temporal_taps, num_segments=num_segments)
        bytes_per_pass = x.numel() * x.element_size()
        yield Case(
            "temporal_taps",
            form,
            channels,
            size,
            {"forward": 2 * bytes_per_pass, "backward": 3 * bytes_per_pass},
            {
                setting.backend: Code(functools.partial(taps, backend=setting.backend), (x, w, a)),
                "reference": Code(functools.partial(taps, backend="reference"), (x, w, a)),
                "original": Code(
                    functools.partial(original_chain, num_segments=num_segments),
                    (x.contiguous(), w, a),
                ),
            },
        )
