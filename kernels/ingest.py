"""ingest: stored pixels to the network's input in one pass, or to differences of frames.

Operators of kernels._C:
    accel_kernels::ingest(Tensor frames, Tensor mean, Tensor std, ScalarType dtype,
        int frames_per_segment, int channels) -> Tensor
    accel_kernels::ingest_differences(Tensor frames, Tensor std, ScalarType dtype,
        int frames_per_segment) -> Tensor
"""

import torch
from torch import Tensor

from kernels import _library, reference
from kernels._backend import use_compiled

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ingest(
    frames: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype,
    frames_per_segment: int = 1,
    channels: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalize bytes: (x / 255 - mean) / std, the frames of a segment side by side as channels.

    One multiply-add in mean's dtype and one rounding. Channels are frame-major: R, G, B of the
    first frame, then of the second, and so on; further ones, which let a convolution use wider
    instructions, are zero.

    Args:
        frames: [B*L, H, W, 3] uint8, contiguous; the L frames of a segment adjoin.
        mean, std: [3], RGB, of values in 0..1, std > 0; fp32, or fp64 if dtype is.
        dtype: of the result: fp16, bf16, fp32 or fp64.
        frames_per_segment: L >= 1. B*L must be a multiple of it; B = 0 is allowed.
        channels: of the result, >= 3*L; None: 3*L.
        backend: "auto", "cuda", "cpp" or "reference"; None: environment variable ACCEL_KERNELS,
            else "auto".

    Returns:
        [B, channels, H, W], channels_last.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    wanted = 3 * frames_per_segment if channels is None else channels
    _check("ingest", frames, {"mean": mean, "std": std}, dtype, frames_per_segment, 1)
    if wanted < 3 * frames_per_segment:
        raise ValueError(
            f"ingest: channels must be at least 3 * frames_per_segment = {3 * frames_per_segment}, "
            f"got {wanted}."
        )
    if not use_compiled("ingest", backend, frames.device.type, can_use_compiled(frames)):
        return reference.ingest(
            frames, mean, std, dtype=dtype, frames_per_segment=frames_per_segment, channels=wanted
        )
    y: Tensor = torch.ops.accel_kernels.ingest(
        frames, mean.contiguous(), std.contiguous(), dtype, frames_per_segment, wanted
    )
    return y


def ingest_differences(
    frames: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype,
    frames_per_segment: int,
    backend: str | None = None,
) -> Tensor:
    """Differences of neighboring frames of normalized clips, from the bytes: (x[l+1] - x[l]) / std.

    The mean cancels, and the subtraction is exact: in 16 bits this keeps what differences of
    rounded frames lose (the stems of TDN and MSN).

    Args:
        frames, std, dtype, backend: see `ingest`.
        frames_per_segment: L >= 2.

    Returns:
        [B, 3*(L-1), H, W], channels_last.

    Raises:
        ValueError, TypeError: shapes or dtypes do not match, or an unknown backend.
        RuntimeError: a forced backend cannot run.
    """
    op = "ingest_differences"
    _check(op, frames, {"std": std}, dtype, frames_per_segment, 2)
    if not use_compiled(op, backend, frames.device.type, can_use_compiled(frames)):
        return reference.ingest_differences(
            frames, std, dtype=dtype, frames_per_segment=frames_per_segment
        )
    y: Tensor = torch.ops.accel_kernels.ingest_differences(
        frames, std.contiguous(), dtype, frames_per_segment
    )
    return y


def can_use_compiled(frames: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel or the C++ twin, by frames' device, takes frames; and if not, why."""
    usable, reason = _library.can_run_on(frames.device.type)
    if usable and not frames.is_contiguous():
        return False, "frames are not contiguous"
    return usable, reason


def _check(
    op: str,
    frames: Tensor,
    coefficients: dict[str, Tensor],
    dtype: torch.dtype,
    frames_per_segment: int,
    least: int,
) -> None:
    """Shapes and dtypes that every backend relies on."""
    if frames.dim() != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"{op}: frames must be [B*L, H, W, 3] uint8, got {list(frames.shape)}, {frames.dtype}."
        )
    if frames_per_segment < least:
        raise ValueError(
            f"{op}: frames_per_segment must be at least {least}, got {frames_per_segment}."
        )
    if frames.shape[0] % frames_per_segment:
        raise ValueError(
            f"{op}: frames must hold whole segments of frames_per_segment = {frames_per_segment} "
            f"frames, got {list(frames.shape)}."
        )
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: dtype must be a floating one, got {dtype}.")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in coefficients.items():
        if tensor.shape != (3,):
            raise ValueError(f"{op}: {name} must be [3], got {list(tensor.shape)}.")
        if tensor.dtype != expected:
            raise TypeError(
                f"{op}: {name} must be {expected} (dtype is {dtype}), got {tensor.dtype}."
            )


def _fake(frames: Tensor, dtype: torch.dtype, frames_per_segment: int, channels: int) -> Tensor:
    shape = (frames.shape[0] // frames_per_segment, *frames.shape[1:3], channels)
    return frames.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


def _fake_ingest(
    frames: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    frames_per_segment: int,
    channels: int,
) -> Tensor:
    return _fake(frames, dtype, frames_per_segment, channels)


def _fake_differences(
    frames: Tensor, std: Tensor, dtype: torch.dtype, frames_per_segment: int
) -> Tensor:
    return _fake(frames, dtype, frames_per_segment, 3 * (frames_per_segment - 1))


if _library.AVAILABLE:
    torch.library.register_fake("accel_kernels::ingest", _fake_ingest)
    torch.library.register_fake("accel_kernels::ingest_differences", _fake_differences)
