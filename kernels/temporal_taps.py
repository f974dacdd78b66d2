"""temporal_taps: a gated three-tap filter along time (TAM aggregation, trained shifts).

Operators of kernels._C:
    accel_kernels::temporal_taps(Tensor x, Tensor w, Tensor? a, int num_segments) -> Tensor
    accel_kernels::temporal_taps_backward(Tensor grad, Tensor? x, Tensor w, Tensor? a,
        int num_segments, bool[3] output_mask) -> (Tensor dx, Tensor dw, Tensor da)
"""

from typing import Any

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "temporal_taps"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def temporal_taps(
    x: Tensor, w: Tensor, a: Tensor | None = None, *, num_segments: int, backend: str | None = None
) -> Tensor:
    """Filter every channel of every pixel along time with three taps, after an optional gate.

    y[n,t,c,h,w] = sum over k = 0, 1, 2 of w[n,c,k] * a[n,t+k-1,c] * x[n,t+k-1,c,h,w], where frames
    before the first and after the last are zero. Sums are formed in w's dtype (fp32, or fp64), with
    one rounding to x's dtype.

    The compiled operator takes x in channels_last only and never copies it: in "auto" mode any
    other layout runs the reference (one RuntimeWarning per process), a forced backend refuses it.
    Its gradients are deterministic and cannot be differentiated again; the reference's can. An
    incoming gradient in other strides (that of a mean is expanded) is copied to channels_last.

    Args:
        x: [N*T, C, H, W], channels_last, fp16, bf16, fp32 or fp64; the T frames of a clip adjoin.
        w: [C, 3] or, per sample, [N, C, 3]; fp32, or fp64 if x is. Tap k multiplies frame t+k-1.
        a: gate [N, T, C], dtype of w, or None for ones. w and a may have any strides: they are made
            contiguous, which costs little at their size.
        num_segments: T >= 1. N*T must be a multiple of it; N = 0 is allowed.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        y: [N*T, C, H, W], dtype and layout of x.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(x, w, a, num_segments)
    if not use_compiled(_OP, backend, x.device.type, can_use_compiled(x)):
        return reference.temporal_taps(x, w, a, num_segments=num_segments)
    gate = None if a is None else a.contiguous()
    y: Tensor = torch.ops.accel_kernels.temporal_taps(x, w.contiguous(), gate, num_segments)
    return y


def can_use_compiled(x: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin, by x's device, takes x; and if not, why."""
    usable, reason = _library.can_run_on(x.device.type)
    if not usable:
        return False, reason
    if x.dtype not in _DTYPES:
        return False, f"x is {x.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False, "x is not contiguous in channels_last"
    return True, ""


def _check(x: Tensor, w: Tensor, a: Tensor | None, num_segments: int) -> None:
    """Shapes and dtypes that every backend relies on."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{_OP}: x must be [N*T, C, H, W] of a floating dtype, got {list(x.shape)}, {x.dtype}."
        )
    if num_segments < 1 or x.shape[0] % num_segments:
        raise ValueError(
            f"{_OP}: x must hold whole clips of num_segments = {num_segments} frames, got x of "
            f"{list(x.shape)}."
        )
    batch, channels = x.shape[0] // num_segments, x.shape[1]
    if w.shape != (channels, 3) and w.shape != (batch, channels, 3):
        raise ValueError(
            f"{_OP}: w must be [C, 3] = [{channels}, 3] or [N, C, 3] = [{batch}, {channels}, 3], "
            f"got {list(w.shape)} (x is {list(x.shape)}, num_segments {num_segments})."
        )
    if a is not None and a.shape != (batch, num_segments, channels):
        raise ValueError(
            f"{_OP}: a must be [N, T, C] = [{batch}, {num_segments}, {channels}], "
            f"got {list(a.shape)} (x is {list(x.shape)})."
        )
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("w", w), ("a", a)):
        if tensor is not None and tensor.dtype != expected:
            raise TypeError(
                f"{_OP}: {name} must be {expected} (x is {x.dtype}), got {tensor.dtype}."
            )


def _fake_forward(x: Tensor, w: Tensor, a: Tensor | None, num_segments: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    w: Tensor,
    a: Tensor | None,
    num_segments: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    want_dx, want_dw, want_da = output_mask
    return (
        torch.empty_like(grad, memory_format=torch.channels_last) if want_dx else grad.new_empty(0),
        torch.empty_like(w) if want_dw else w.new_empty(0),
        torch.empty_like(a) if want_da and a is not None else w.new_empty(0),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor
) -> None:
    x, w, a, ctx.num_segments = inputs
    # Taps that are not trained need no activations: x is then free to go.
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if needs_x else None, w, a)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, a = ctx.saved_tensors
    mask = ctx.needs_input_grad[:3]
    # Gradients of means and slices come with strides of their own; a copy only if they do.
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.accel_kernels.temporal_taps_backward(
        grad, x, w, a, ctx.num_segments, list(mask)
    )
    return *(value if wanted else None for value, wanted in zip(grads, mask, strict=True)), None


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f'{_OP}: second derivatives are only available with backend="reference".')


if _library.AVAILABLE:
    _NAME = f"accel_kernels::{_OP}"
    torch.library.register_fake(_NAME, _fake_forward)
    torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
    torch.library.register_fake(f"{_NAME}_backward", _fake_backward)
    torch.library.register_autograd(f"{_NAME}_backward", _refuse_double_backward)
