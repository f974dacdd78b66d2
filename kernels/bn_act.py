"""bn_act: batch norm with what follows it in a residual block: shortcut, ReLU, pooled mean.

Operators of kernels._C; mean and var are those that x is normalized with, of the batch or running:
    accel_kernels::bn_act_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var,
        float momentum) -> (Tensor mean, Tensor var)
    accel_kernels::bn_act(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var,
        Tensor? shortcut, float eps, bool relu, bool batch_statistics, bool pool, bool save_mask)
        -> (Tensor y, Tensor pooled, Tensor mask)
    accel_kernels::bn_act_backward_sums(Tensor grad, Tensor? grad_pooled, Tensor x, Tensor weight,
        Tensor bias, Tensor mean, Tensor var, Tensor? mask, float eps, bool relu)
        -> (Tensor dweight, Tensor dbias)
    accel_kernels::bn_act_backward(Tensor grad, Tensor? grad_pooled, Tensor? x, Tensor weight,
        Tensor bias, Tensor mean, Tensor var, Tensor? mask, Tensor? dweight, Tensor? dbias,
        Tensor? count, float eps, bool relu, bool[2] output_mask) -> (Tensor dx, Tensor dshortcut)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_OP = "bn_act"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

AllReduce = Callable[[Tensor], object]
"""Sums a tensor over the processes, in place."""


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor | None = None,
    *,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
    pool: bool = False,
    all_reduce: AllReduce | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """relu((x - mean) / sqrt(var + eps) * weight + bias + shortcut), and its mean over the pixels.

    In training mean and var are those of x over B, H and W (var divided by their number), and the
    running statistics are updated in place: running += momentum * (batch - running), where the
    variance of the batch is divided by the number less one. Otherwise mean and var are the running
    statistics.

    Sums are formed in weight's dtype (fp32, or fp64); y is rounded once, at the end. The reference
    rounds the norm to x's dtype before it adds the shortcut, as PyTorch's modules do: in 16 bits
    the two differ by up to half a unit in the last place of the norm.

    The compiled operator takes x in channels_last only and never copies it: in "auto" mode any
    other layout runs the reference (one RuntimeWarning per process), a forced backend refuses it.
    It saves x and, where a shortcut is added under a ReLU, one bit per element. Its gradients are
    deterministic and cannot be differentiated again; the reference's can. An incoming gradient in
    other strides (that of a mean is expanded) is copied to channels_last.

    Args:
        x: [B, C, H, W], channels_last, fp16, bf16, fp32 or fp64; B = 0 is allowed.
        weight, bias, running_mean, running_var: [C]; fp32, or fp64 if x is.
        shortcut: like x, or None.
        relu: end with a ReLU.
        training: use the statistics of x, and update the running ones.
        momentum: share of the batch in the running statistics.
        eps: added to var.
        pool: also return the mean of the rounded y over H and W.
        all_reduce: sums a tensor over all processes in place. Training statistics are then those of
            all their x together; forward and backward call it once each, on every process, also
            with an empty batch. Needs equal running means on all of them. None: this x alone.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        y: [B, C, H, W], dtype and layout of x; with `pool` (y, pooled), pooled [B, C] in weight's
        dtype.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, training on a single row, or an
            unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    _check(x, weight, bias, running_mean, running_var, shortcut)
    if training and all_reduce is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"{_OP}: training needs more than one value per channel, got x of {list(x.shape)}."
        )
    supported = can_use_compiled(x, shortcut)
    if not use_compiled(_OP, backend, x.device.type, supported):
        return reference.bn_act(
            x, weight, bias, running_mean, running_var, shortcut,
            relu=relu, training=training, momentum=momentum, eps=eps, pool=pool,
            all_reduce=all_reduce,
        )  # fmt: skip
    weight, bias = weight.contiguous(), bias.contiguous()
    # In evaluation frozen parameters make a mask cheaper to keep than x; a shortcut hides the sign.
    leaves = [t for t in (x, weight, bias, shortcut) if t is not None and t.requires_grad]
    needs_x = training or weight.requires_grad or bias.requires_grad
    save_mask = (
        relu and torch.is_grad_enabled() and bool(leaves) and (shortcut is not None or not needs_x)
    )
    flags = (eps, relu, training, pool, save_mask)
    if training and all_reduce is not None:
        with torch.no_grad():
            mean, var = torch.ops.accel_kernels.bn_act_statistics(x, None, None, 0.0)
            mean, var, count = reference.exchange_statistics(
                mean, var, x.numel() // x.shape[1], running_mean, all_reduce
            )
            reference.update_running(running_mean, running_var, mean, var, count, momentum)
        y, pooled = _SynchronizedBnAct.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, shortcut, mean, var, count, all_reduce, flags
        )
    else:
        mean, var = running_mean, running_var
        if training:
            mean, var = torch.ops.accel_kernels.bn_act_statistics(
                x.detach(), running_mean, running_var, momentum
            )
        y, pooled, _ = torch.ops.accel_kernels.bn_act(x, weight, bias, mean, var, shortcut, *flags)
    return (y, pooled) if pool else y


def can_use_compiled(x: Tensor, shortcut: Tensor | None = None) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin takes x and shortcut; and if not, why."""
    usable, reason = _library.can_run_on(x.device.type)
    if not usable:
        return False, reason
    if x.dtype not in _DTYPES:
        return False, f"x is {x.dtype}"
    for name, tensor in (("x", x), ("shortcut", shortcut)):
        if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            return False, f"{name} is not contiguous in channels_last"
    return True, ""


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor | None,
) -> None:
    """Shapes and dtypes that every backend relies on."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{_OP}: x must be [B, C, H, W] of a floating dtype, got {list(x.shape)}, {x.dtype}."
        )
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if tensor.shape != x.shape[1:2]:
            raise ValueError(
                f"{_OP}: {name} must be [C] = [{x.shape[1]}], got {list(tensor.shape)} "
                f"(x is {list(x.shape)})."
            )
        if tensor.dtype != expected:
            raise TypeError(
                f"{_OP}: {name} must be {expected} (x is {x.dtype}), got {tensor.dtype}."
            )
    if shortcut is not None and (shortcut.shape != x.shape or shortcut.dtype != x.dtype):
        raise ValueError(
            f"{_OP}: shortcut must be like x, {list(x.shape)} {x.dtype}, got "
            f"{list(shortcut.shape)} {shortcut.dtype}."
        )


def _fake_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[1], dtype=wide), x.new_empty(x.shape[1], dtype=wide)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    shortcut: Tensor | None,
    eps: float,
    relu: bool,
    batch_statistics: bool,
    pool: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        weight.new_empty(x.shape[:2] if pool else 0),
        x.new_empty(rows * ((x.shape[1] + 7) // 8) if save_mask else 0, dtype=torch.uint8),
    )


def _fake_backward_sums(
    grad: Tensor, grad_pooled: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(bias)


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    want_dx, want_dshortcut = rest[-1]
    return (
        torch.empty_like(grad, memory_format=torch.channels_last) if want_dx else grad.new_empty(0),
        torch.empty_like(grad, memory_format=torch.channels_last)
        if want_dshortcut
        else grad.new_empty(0),
    )


def _save(
    ctx: Any, x: Tensor, norm: tuple[Tensor, ...], mask: Tensor, flags: tuple[Any, ...]
) -> None:
    """Keep what `_gradients` needs; ctx.wanted: gradients of x, weight, bias and shortcut."""
    ctx.eps, ctx.relu, ctx.batch_statistics, ctx.pool, save_mask = flags
    # In evaluation frozen parameters need no activations: x is then free to go.
    needs_x = ctx.batch_statistics or ctx.wanted[1] or ctx.wanted[2] or (ctx.relu and not save_mask)
    ctx.save_for_backward(x if needs_x else None, *norm, mask if save_mask else None)


def _gradients(
    ctx: Any, grad: Tensor, grad_pooled: Tensor, count: Tensor | None, all_reduce: AllReduce | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and shortcut; those of the parameters are of this x alone.

    With `all_reduce`, x is normalized with the statistics of `count` rows of all processes.
    """
    x, *norm = ctx.saved_tensors  # weight, bias, mean, var, mask
    want_x, want_weight, want_bias, want_shortcut = ctx.wanted
    # Gradients of means and slices come with strides of their own; a copy only if they do.
    grad = grad.contiguous(memory_format=torch.channels_last)
    pooled = grad_pooled.contiguous() if ctx.pool else None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    if want_weight or want_bias or (ctx.batch_statistics and want_x):
        dweight, dbias = torch.ops.accel_kernels.bn_act_backward_sums(
            grad, pooled, x, *norm, ctx.eps, ctx.relu
        )
    sums = (dweight, dbias) if ctx.batch_statistics else (None, None)
    if all_reduce is not None and dweight is not None and dbias is not None:
        both = torch.stack([dweight, dbias])
        all_reduce(both)
        sums = (both[0], both[1])
    dx, dshortcut = torch.ops.accel_kernels.bn_act_backward(
        grad, pooled, x, *norm, *sums, count, ctx.eps, ctx.relu, [want_x, want_shortcut]
    )
    values = (dx, dweight, dbias, dshortcut)
    return tuple(
        value if wanted else None for value, wanted in zip(values, ctx.wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, mean, var, _shortcut, *flags = inputs
    ctx.wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    _save(ctx, x, (weight, bias, mean, var), output[2], tuple(flags))


def _backward(ctx: Any, grad: Tensor, grad_pooled: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dshortcut = _gradients(ctx, grad, grad_pooled, None, None)
    return dx, dweight, dbias, None, None, dshortcut, *[None] * 5


class _SynchronizedBnAct(torch.autograd.Function):
    """bn_act with statistics of all processes: its backward has to call `all_reduce`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        all_reduce: AllReduce,
        flags: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        y, pooled, mask = torch.ops.accel_kernels.bn_act(
            x, weight, bias, mean, var, shortcut, *flags
        )
        ctx.wanted = ctx.needs_input_grad[:4]
        ctx.count, ctx.all_reduce = count, all_reduce
        _save(ctx, x, (weight, bias, mean, var), mask, flags)
        return y, pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        values = _gradients(ctx, grad, grad_pooled, ctx.count, ctx.all_reduce)
        return *values, *[None] * 5


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f'{_OP}: second derivatives are only available with backend="reference".')


if _library.AVAILABLE:
    _NAME = f"accel_kernels::{_OP}"
    torch.library.register_fake(f"{_NAME}_statistics", _fake_statistics)
    torch.library.register_fake(_NAME, _fake_forward)
    torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
    torch.library.register_fake(f"{_NAME}_backward_sums", _fake_backward_sums)
    torch.library.register_autograd(f"{_NAME}_backward_sums", _refuse_double_backward)
    torch.library.register_fake(f"{_NAME}_backward", _fake_backward)
    torch.library.register_autograd(f"{_NAME}_backward", _refuse_double_backward)
