"""branch_fuse: the weighted sum of AMS-Net's three temporal branches.

Operators of kernels._C:
    accel_kernels::branch_fuse(Tensor f1, Tensor f2, Tensor f3, Tensor s, int num_segments)
        -> Tensor
    accel_kernels::branch_fuse_backward(Tensor grad, Tensor? f1, Tensor? f2, Tensor? f3, Tensor s,
        int num_segments, bool[4] output_mask) -> (Tensor df1, Tensor df2, Tensor df3, Tensor ds)
"""

from typing import Any

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "branch_fuse"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def branch_fuse(
    f1: Tensor,
    f2: Tensor,
    f3: Tensor,
    s: Tensor,
    *,
    num_segments: int,
    backend: str | None = None,
) -> Tensor:
    """Add three feature maps, each channel of each clip with its own three weights.

    out[n,t,c,h,w] = sum over i = 1, 2, 3 of s[n,i,c] * f_i[n,t,c,h,w], summed in s's dtype (fp32,
    or fp64), with one rounding to the branches'.

    The compiled operator takes branches in channels_last only and never copies them: in "auto" mode
    any other layout runs the reference (one RuntimeWarning per process), a forced backend refuses
    it. Its gradients are deterministic and cannot be differentiated again; the reference's can. An
    incoming gradient in other strides is copied to channels_last.

    Args:
        f1, f2, f3: [N*T, C, H, W], channels_last, fp16, bf16, fp32 or fp64, one dtype; the T frames
            of a clip adjoin.
        s: weights [N, 3, C], fp32, or fp64 if the branches are; any strides.
        num_segments: T >= 1. N*T must be a multiple of it; N = 0 is allowed.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        out: [N*T, C, H, W], dtype and layout of f1.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(f1, f2, f3, s, num_segments)
    if not use_compiled(_OP, backend, f1.device.type, can_use_compiled(f1, f2, f3)):
        return reference.branch_fuse(f1, f2, f3, s, num_segments=num_segments)
    out: Tensor = torch.ops.accel_kernels.branch_fuse(f1, f2, f3, s.contiguous(), num_segments)
    return out


def can_use_compiled(f1: Tensor, f2: Tensor, f3: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin, by f1's device, takes the branches; if not, why."""
    usable, reason = _library.can_run_on(f1.device.type)
    if not usable:
        return False, reason
    if f1.dtype not in _DTYPES:
        return False, f"f1 is {f1.dtype}"
    for name, branch in (("f1", f1), ("f2", f2), ("f3", f3)):
        if not branch.is_contiguous(memory_format=torch.channels_last):
            return False, f"{name} is not contiguous in channels_last"
    return True, ""


def _check(f1: Tensor, f2: Tensor, f3: Tensor, s: Tensor, num_segments: int) -> None:
    """Shapes and dtypes that every backend relies on."""
    if f1.dim() != 4 or not f1.is_floating_point():
        raise ValueError(
            f"{_OP}: f1 must be [N*T, C, H, W] of a floating dtype, got {list(f1.shape)}, "
            f"{f1.dtype}."
        )
    for name, branch in (("f2", f2), ("f3", f3)):
        if branch.shape != f1.shape:
            raise ValueError(
                f"{_OP}: {name} must be like f1 of {list(f1.shape)}, got {list(branch.shape)}."
            )
    if num_segments < 1 or f1.shape[0] % num_segments:
        raise ValueError(
            f"{_OP}: f1 must hold whole clips of num_segments = {num_segments} frames, got f1 of "
            f"{list(f1.shape)}."
        )
    batch, channels = f1.shape[0] // num_segments, f1.shape[1]
    if s.shape != (batch, 3, channels):
        raise ValueError(
            f"{_OP}: s must be [N, 3, C] = [{batch}, 3, {channels}], got {list(s.shape)} "
            f"(f1 is {list(f1.shape)}, num_segments {num_segments})."
        )
    wide = torch.float64 if f1.dtype == torch.float64 else torch.float32
    for name, tensor, dtype in (("f2", f2, f1.dtype), ("f3", f3, f1.dtype), ("s", s, wide)):
        if tensor.dtype != dtype:
            raise TypeError(
                f"{_OP}: {name} must be {dtype} (f1 is {f1.dtype}), got {tensor.dtype}."
            )


def _fake_forward(f1: Tensor, f2: Tensor, f3: Tensor, s: Tensor, num_segments: int) -> Tensor:
    return torch.empty_like(f1, memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor,
    f1: Tensor | None,
    f2: Tensor | None,
    f3: Tensor | None,
    s: Tensor,
    num_segments: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    *want_df, want_ds = output_mask
    df = [
        torch.empty_like(grad, memory_format=torch.channels_last) if wanted else grad.new_empty(0)
        for wanted in want_df
    ]
    return *df, torch.empty_like(s) if want_ds else s.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *branches, s, ctx.num_segments = inputs
    # Weights that are not trained need no activations: the branches are then free to go.
    needs_branches = ctx.needs_input_grad[3]
    ctx.save_for_backward(*(branch if needs_branches else None for branch in branches), s)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = ctx.needs_input_grad[:4]
    # Gradients of means and slices come with strides of their own; a copy only if they do.
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.accel_kernels.branch_fuse_backward(
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
