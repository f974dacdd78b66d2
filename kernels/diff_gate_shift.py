"""diff_gate_shift: TDN's motion excitation of x and its trained shift, in one operator.

Operators of kernels._C:
    accel_kernels::diff_gate_shift(Tensor x, Tensor z, Tensor v, Tensor m, Tensor c, Tensor w,
        int num_segments) -> Tensor
    accel_kernels::diff_gate_shift_backward(Tensor grad, Tensor x, Tensor z, Tensor v, Tensor m,
        Tensor c, Tensor w, int num_segments)
        -> (Tensor dx, Tensor dz, Tensor dv, Tensor dm, Tensor dc, Tensor dw)
"""

from typing import Any

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "diff_gate_shift"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_RANK = 64  # of the compiled operator


def diff_gate_shift(
    x: Tensor,
    z: Tensor,
    v: Tensor,
    m: Tensor,
    c: Tensor,
    w: Tensor,
    *,
    num_segments: int,
    backend: str | None = None,
) -> Tensor:
    """Gate every element of x by two sigmoids, then filter every channel along time.

    With s0 = sigmoid(m[0] z + c[0]) and s1 = sigmoid(m[1] v + c[1]), products over the r channels
    of z and v at each pixel: q = x * (0.5 + 0.5 * (s0 + s1)), and
    y[n,t] = sum over k = 0, 1, 2 of w[:,k] * q[n,t+k-1], where frames before the first and after
    the last are zero. All in w's dtype (fp32, or fp64), with one rounding to x's dtype.

    In TDN, z and v are the forward and backward differences and (m, c) their last convolution with
    its batch norm folded in, so that no C-channel map but x and y exists.

    The compiled operator takes x, z and v in channels_last and never copies them: in "auto" mode
    any other layout runs the reference (one RuntimeWarning per process), a forced backend refuses
    it. Its gradients are deterministic and cannot be differentiated again; the reference's can. An
    incoming gradient in other strides is copied to channels_last.

    Args:
        x: [N*T, C, H, W], channels_last, fp16, bf16, fp32 or fp64; the T frames of a clip adjoin.
        z: [N*T, r, H, W], dtype and layout of x; r <= 64 in the compiled operator.
        v: like z.
        m: [2, C, r], for z and v; fp32, or fp64 if x is. m, c and w may have any strides.
        c: [2, C], dtype of m.
        w: [C, 3], dtype of m. Tap k multiplies frame t+k-1.
        num_segments: T >= 1. N*T must be a multiple of it; N = 0 is allowed.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        y: [N*T, C, H, W], dtype and layout of x.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(x, z, v, m, c, w, num_segments)
    if not use_compiled(_OP, backend, x.device.type, can_use_compiled(x, z, v)):
        return reference.diff_gate_shift(x, z, v, m, c, w, num_segments=num_segments)
    y: Tensor = torch.ops.accel_kernels.diff_gate_shift(
        x, z, v, m.contiguous(), c.contiguous(), w.contiguous(), num_segments
    )
    return y


def can_use_compiled(x: Tensor, z: Tensor, v: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin, by x's device, takes these; and if not, why."""
    usable, reason = _library.can_run_on(x.device.type)
    if not usable:
        return False, reason
    if x.dtype not in _DTYPES:
        return False, f"x is {x.dtype}"
    for name, tensor in (("x", x), ("z", z), ("v", v)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return False, f"{name} is not contiguous in channels_last"
    if z.shape[1] > _MAX_RANK:
        return False, f"z has {z.shape[1]} channels, more than {_MAX_RANK}"
    return True, ""


def _check(
    x: Tensor, z: Tensor, v: Tensor, m: Tensor, c: Tensor, w: Tensor, num_segments: int
) -> None:
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
    frames, channels, height, width = x.shape
    if m.dim() != 3 or m.shape[:2] != (2, channels) or m.shape[2] < 1:
        raise ValueError(
            f"{_OP}: m must be [2, C, r] = [2, {channels}, r >= 1], got {list(m.shape)} (x is "
            f"{list(x.shape)})."
        )
    rank = m.shape[2]
    for name, tensor in (("z", z), ("v", v)):
        if tensor.shape != (frames, rank, height, width):
            raise ValueError(
                f"{_OP}: {name} must be [N*T, r, H, W] = [{frames}, {rank}, {height}, {width}], "
                f"got {list(tensor.shape)}."
            )
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{_OP}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}."
            )
    for name, form, tensor, shape in (
        ("c", "[2, C]", c, (2, channels)),
        ("w", "[C, 3]", w, (channels, 3)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{_OP}: {name} must be {form} = {list(shape)}, got {list(tensor.shape)} (x is "
                f"{list(x.shape)})."
            )
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("m", m), ("c", c), ("w", w)):
        if tensor.dtype != expected:
            raise TypeError(
                f"{_OP}: {name} must be {expected} (x is {x.dtype}), got {tensor.dtype}."
            )


def _fake_forward(
    x: Tensor, z: Tensor, v: Tensor, m: Tensor, c: Tensor, w: Tensor, num_segments: int
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    v: Tensor,
    m: Tensor,
    c: Tensor,
    w: Tensor,
    num_segments: int,
) -> tuple[Tensor, ...]:
    maps = (torch.empty_like(value, memory_format=torch.channels_last) for value in (x, z, v))
    return *maps, *(torch.empty_like(value) for value in (m, c, w))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_segments = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Gradients of means and slices come with strides of their own; a copy only if they do.
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.accel_kernels.diff_gate_shift_backward(
        grad, *ctx.saved_tensors, ctx.num_segments
    )
    return *grads, None


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f'{_OP}: second derivatives are only available with backend="reference".')


if _library.AVAILABLE:
    _NAME = f"accel_kernels::{_OP}"
    torch.library.register_fake(_NAME, _fake_forward)
    torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
    torch.library.register_fake(f"{_NAME}_backward", _fake_backward)
    torch.library.register_autograd(f"{_NAME}_backward", _refuse_double_backward)
