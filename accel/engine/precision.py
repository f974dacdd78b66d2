"""Precision modes, the loss scaler, and the step from stored pixels to the network's input."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accel.errors import ConfigError
from kernels import ingest
from pipelines.color import apply_maps

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Arithmetic of forward and backward; parameters, statistics and the update stay fp32."""

    mode: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """fp32 | tf32 (CUDA, Ampere and newer) | bf16 autocast | fp16 autocast with loss scaling."""
    init_scale: float = 65536.0
    """fp16: first loss scale, > 0."""

    def __post_init__(self) -> None:
        if self.init_scale <= 0:
            raise ValueError(f"precision.init_scale: must be > 0, got {self.init_scale}.")


class Precision:
    """A precision mode on a device, and the normalization of its input.

    Args:
        config: the mode.
        device: of the network.
        mean: RGB, of values in 0..1.
        std: RGB, of values in 0..1, > 0.
        frames_per_segment: L, frames that the network sees at once, >= 1.

    Raises:
        ConfigError: the device cannot run the mode.
    """

    def __init__(
        self,
        config: PrecisionConfig,
        device: torch.device,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        frames_per_segment: int = 1,
    ) -> None:
        self.mode = config.mode
        self.device = device
        if config.mode == "tf32" and device.type != "cuda":
            raise ConfigError(
                "precision.mode: tf32 exists on CUDA devices only, this run is on "
                f"{device.type}; use fp32 or bf16."
            )
        if (
            config.mode == "bf16"
            and device.type == "cuda"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise ConfigError(
                f"precision.mode: {torch.cuda.get_device_name(device)} has no bf16 arithmetic; "
                "use fp16 (with loss scaling)."
            )
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = config.mode == "tf32"
            torch.backends.cudnn.allow_tf32 = config.mode == "tf32"
        # On the device once: a copy in the loop would wait for the device.
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)
        self._frames_per_segment = frames_per_segment
        self.autocast_dtype = _AUTOCAST.get(config.mode)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=config.init_scale, enabled=config.mode == "fp16"
        )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of the forward pass and the loss."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def forget_unscaling(self) -> None:
        """Let the scaler begin a step again that was recorded but did not run."""
        # It has no public way back from "already unscaled" but an update of the scale.
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()

    def network_input(self, clips: Tensor, colors: Tensor | None = None) -> Tensor:
        """Normalized, folded, channels_last input of the network.

        (x / 255 - mean) / std as one multiply-add in fp32, rounded once to the autocast type, in
        one pass over the pipeline's NHWC memory.

        Args:
            clips: [N, T*L, H, W, 3] uint8, contiguous; the L frames of a segment adjoin.
            colors: [N*T*L, 3, 4] float32, map of each frame's colors before the normalization
                (`pipelines.color`); None = none.

        Returns:
            [N*T, 3*L, H, W], channels_last, fp32 or the autocast type; channels are those of the
            first frame (R, G, B), then of the second, and so on.
        """
        frames = clips.flatten(0, 1)  # [N*T*L, H, W, 3]
        if colors is not None:
            return self._recolored_input(frames, colors)
        return ingest(
            frames,
            self._mean,
            self._std,
            dtype=self.autocast_dtype or torch.float32,
            frames_per_segment=self._frames_per_segment,
        )

    def _recolored_input(self, frames: Tensor, colors: Tensor) -> Tensor:
        """Color map and normalization as one map per frame; rounded once, as in `ingest`."""
        maps = colors / (255 * self._std)[:, None]  # [N*T*L, 3, 4]
        maps[..., 3] -= self._mean / self._std
        mapped = apply_maps(frames, maps)  # [N*T*L, H, W, 3]
        segments = mapped.view(-1, self._frames_per_segment, *mapped.shape[1:])
        stacked = segments.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [N*T, 3*L, H, W]
        dtype = self.autocast_dtype or torch.float32
        return stacked.to(dtype).contiguous(memory_format=torch.channels_last)
