"""deform_conv: a convolution whose taps move by learned offsets (version 1; MSN's motion branch).

Operators of kernels._C:
    accel_kernels::deform_conv(Tensor x, Tensor offset, Tensor weight, Tensor? bias) -> Tensor
    accel_kernels::deform_conv_backward(Tensor grad, Tensor x, Tensor offset, Tensor weight,
        bool[4] output_mask) -> (Tensor dx, Tensor doffset, Tensor dweight, Tensor dbias)
"""

from typing import Any

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "deform_conv"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve with stride 1 and padding k//2 at taps that `offset` moves, pixel by pixel.

    out[b,o,i,j] = bias[o] + sum over q = 0..k*k-1 and c of
        weight[o,c,q // k,q % k] * x~[b,c](i - k//2 + q // k + offset[b,2q,i,j],
                                           j - k//2 + q % k + offset[b,2q+1,i,j])
    where x~(y, z) interpolates bilinearly, pixels outside the map are 0, and x~ is 0 altogether
    unless -1 < y < H and -1 < z < W. At whole numbers the derivative is that of the cell below and
    to the right. The same function as torchvision's deform_conv2d without mask. Sums are formed in
    fp32 (fp64); the result is rounded to x's dtype, on CUDA the sampled values are as well.

    The compiled operator takes x and offset in channels_last only and never copies them: in "auto"
    mode any other layout runs the reference (one RuntimeWarning per process), a forced backend
    refuses it. Its gradients are deterministic (on CUDA in fp64 exact only to about 2^-30 of dx's
    largest value) and cannot be differentiated again; the reference's can. A frozen weight costs no
    second sampling in the backward pass.

    Args:
        x: [B, C, H, W], channels_last, fp16, bf16, fp32 or fp64.
        offset: [B, 2*k*k, H, W], channels_last, dtype of x; pixels, (dy, dx) of tap 0, of tap 1,
            and so on.
        weight: [O, C, k, k], k odd; fp32, or fp64 if x is. In channels_last it is used in place.
        bias: [O], dtype of weight, or None for zeros.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        out: [B, O, H, W], dtype and layout of x.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(x, offset, weight, bias)
    if not use_compiled(_OP, backend, x.device.type, can_use_compiled(x, offset)):
        return reference.deform_conv(x, offset, weight, bias)
    out: Tensor = torch.ops.accel_kernels.deform_conv(
        x,
        offset,
        weight.contiguous(memory_format=torch.channels_last),
        None if bias is None else bias.contiguous(),
    )
    return out


def can_use_compiled(x: Tensor, offset: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernels or the C++ twin, by x's device, take x and offset; if not, why."""
    usable, reason = _library.can_run_on(x.device.type)
    if not usable:
        return False, reason
    if x.dtype not in _DTYPES:
        return False, f"x is {x.dtype}"
    for name, tensor in (("x", x), ("offset", offset)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return False, f"{name} is not contiguous in channels_last"
    return True, ""


def _check(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes and dtypes that every backend relies on."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{_OP}: x must be [B, C, H, W] of a floating dtype, got {list(x.shape)}, {x.dtype}."
        )
    channels = x.shape[1]
    k = weight.shape[-1] if weight.dim() == 4 else 0
    if k % 2 == 0 or weight.shape[1:] != (channels, k, k) or weight.shape[0] == 0:
        raise ValueError(
            f"{_OP}: weight must be [O, C, k, k] with C = {channels} and k odd, "
            f"got {list(weight.shape)} (x is {list(x.shape)})."
        )
    expected_offset = (x.shape[0], 2 * k * k, *x.shape[2:])
    if offset.shape != expected_offset:
        raise ValueError(
            f"{_OP}: offset must be [B, 2*k*k, H, W] = {list(expected_offset)}, "
            f"got {list(offset.shape)} (x is {list(x.shape)}, k is {k})."
        )
    if offset.dtype != x.dtype:
        raise TypeError(f"{_OP}: offset must be {x.dtype} as x is, got {offset.dtype}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_OP}: bias must be [O] = [{weight.shape[0]}], got {list(bias.shape)} "
            f"(weight is {list(weight.shape)})."
        )
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != expected:
            raise TypeError(
                f"{_OP}: {name} must be {expected} (x is {x.dtype}), got {tensor.dtype}."
            )


def _fake_forward(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = x.shape
    out = x.new_empty((batch, height, width, weight.shape[0]))
    return out.permute(0, 3, 1, 2)


def _fake_backward(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    activations = [
        torch.empty_like(tensor, memory_format=torch.channels_last)
        if wanted
        else tensor.new_empty(0)
        for tensor, wanted in zip((x, offset, weight), output_mask, strict=False)
    ]
    return *activations, weight.new_empty(weight.shape[0] if output_mask[3] else 0)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor
) -> None:
    x, offset, weight, _ = inputs
    ctx.save_for_backward(x, offset, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad)
    # Gradients of means and slices come with strides of their own; a copy only if they do.
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.accel_kernels.deform_conv_backward(grad, *ctx.saved_tensors, mask)
    return tuple(value if wanted else None for value, wanted in zip(grads, mask, strict=True))


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f'{_OP}: second derivatives are only available with backend="reference".')


if _library.AVAILABLE:
    _NAME = f"accel_kernels::{_OP}"
    torch.library.register_fake(_NAME, _fake_forward)
    torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
    torch.library.register_fake(f"{_NAME}_backward", _fake_backward)
    torch.library.register_autograd(f"{_NAME}_backward", _refuse_double_backward)
