"""mas_fuse: MAS-Net's blend of motion and appearance, then three trained taps along time.

Operators of kernels._C:
    accel_kernels::mas_fuse(Tensor x, Tensor m, Tensor b, Tensor d, Tensor w, int num_segments)
        -> Tensor
    accel_kernels::mas_fuse_backward(Tensor grad, Tensor x, Tensor m, Tensor b, Tensor d, Tensor w,
        int num_segments, bool[5] output_mask)
        -> (Tensor dx, Tensor dm, Tensor db, Tensor dd, Tensor dw)
"""

from typing import Any

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "mas_fuse"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_RANK = 32


def mas_fuse(
    x: Tensor,
    m: Tensor,
    b: Tensor,
    d: Tensor,
    w: Tensor,
    *,
    num_segments: int,
    backend: str | None = None,
) -> Tensor:
    """Blend each frame with its motion by weights shared in a clip, then filter along time.

    With y = b m (a 1x1 convolution from r to C channels) and (s0, s1) the softmax over the two
    halves of d: q[n,t] = s0[n] * y[n,t] + s1[n] * x[n,t], and out[n,t,c] = sum over k = 0, 1, 2 of
    w[c,k] * q[n,t+k-1,c], where frames before the first and after the last are zero. All arithmetic
    is in w's dtype (fp32, or fp64), with one rounding to x's dtype; y, s and q are never stored.

    The compiled operator takes x, m and d in channels_last only and never copies them: in "auto"
    mode any other layout runs the reference (one RuntimeWarning per process), a forced backend
    refuses it. Its gradients are deterministic and cannot be differentiated again; the reference's
    can. An incoming gradient in other strides is copied to channels_last.

    Args:
        x: [N*T, C, H, W], channels_last, fp16, bf16, fp32 or fp64; the T frames of a clip adjoin.
        m: motion bottleneck [N*T, r, H, W], 1 <= r <= 32, dtype and layout of x.
        b: [C, r], fp32, or fp64 if x is.
        d: [N, 2*C, H, W], dtype and layout of x: logits of motion (first C channels) and of x.
        w: taps [C, 3], dtype of b. Tap k multiplies frame t+k-1. b and w may have any strides.
        num_segments: T >= 1. N*T must be a multiple of it; N = 0 is allowed.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        out: [N*T, C, H, W], dtype and layout of x.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(x, m, b, d, w, num_segments)
    if not use_compiled(_OP, backend, x.device.type, can_use_compiled(x, m, d)):
        return reference.mas_fuse(x, m, b, d, w, num_segments=num_segments)
    out: Tensor = torch.ops.accel_kernels.mas_fuse(
        x, m, b.contiguous(), d, w.contiguous(), num_segments
    )
    return out


def can_use_compiled(x: Tensor, m: Tensor, d: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin, by x's device, takes the tensors; if not, why."""
    usable, reason = _library.can_run_on(x.device.type)
    if not usable:
        return False, reason
    if x.dtype not in _DTYPES:
        return False, f"x is {x.dtype}"
    for name, tensor in (("x", x), ("m", m), ("d", d)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return False, f"{name} is not contiguous in channels_last"
    return True, ""


def _check(x: Tensor, m: Tensor, b: Tensor, d: Tensor, w: Tensor, num_segments: int) -> None:
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
    total, channels, *size = x.shape
    rank = m.shape[1] if m.dim() == 4 else 0
    if not 1 <= rank <= _MAX_RANK or m.shape != (total, rank, *size):
        raise ValueError(
            f"{_OP}: m must be [N*T, r, H, W] with r from 1 to {_MAX_RANK}, got {list(m.shape)} "
            f"(x is {list(x.shape)})."
        )
    for name, tensor, form, shape in (
        ("b", b, "[C, r]", [channels, rank]),
        ("d", d, "[N, 2*C, H, W]", [total // num_segments, 2 * channels, *size]),
        ("w", w, "[C, 3]", [channels, 3]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{_OP}: {name} must be {form} = {shape}, got {list(tensor.shape)} "
                f"(x is {list(x.shape)}, num_segments {num_segments})."
            )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor, dtype in (
        ("m", m, x.dtype),
        ("b", b, wide),
        ("d", d, x.dtype),
        ("w", w, wide),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{_OP}: {name} must be {dtype} (x is {x.dtype}), got {tensor.dtype}.")


def _fake_forward(
    x: Tensor, m: Tensor, b: Tensor, d: Tensor, w: Tensor, num_segments: int
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    m: Tensor,
    b: Tensor,
    d: Tensor,
    w: Tensor,
    num_segments: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(
            tensor,
            memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format,
        )
        if wanted
        else tensor.new_empty(0)
        for tensor, wanted in zip((x, m, b, d, w), output_mask, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_segments = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = ctx.needs_input_grad[:5]
    # Gradients of means and slices come with strides of their own; a copy only if they do.
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.accel_kernels.mas_fuse_backward(
        grad, *ctx.saved_tensors, ctx.num_segments, list(mask)
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
