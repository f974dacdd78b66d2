"""Color jitter as one affine map of (R, G, B) per frame. Pure numbers, grey levels 0..255.

Every part of AMS-Net's jitter (mmaction) is linear in a pixel's three values, so a frame's whole
jitter is a 3 x 4 matrix. The pipelines keep their uint8 frames, and the engine applies matrix and
normalization at once, without the clipping and rounding that the published code does not do either.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Part = Literal["brightness", "contrast", "saturation", "hue"]
Matrix = npt.NDArray[np.float64]

_GREY = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_FROM_YIQ = np.array([[1, 0.956, 0.621], [1, -0.272, -0.647], [1, -1.107, 1.705]])
_PCA_VALUES = np.array([55.46, 4.794, 1.148])
_PCA_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def jitter_matrix(parts: Sequence[tuple[Part, float]]) -> Matrix:
    """Parts of a jitter, one after the other, as one map.

    "brightness" adds the amount; "contrast" multiplies (about zero, not about the mean);
    "saturation" gives amount x color + (1 - amount) x grey; "hue" turns I and Q of YIQ by amount x
    pi radians.

    Returns:
        [3, 4]: color (R, G, B, 1) -> (R, G, B).
    """
    total = np.eye(3, 4)
    for part, amount in parts:
        if part == "brightness":
            total[:, 3] += amount
        elif part == "contrast":
            total *= amount
        elif part == "saturation":
            total = (amount * np.eye(3) + (1 - amount) * np.tile(_GREY, (3, 1))) @ total
        else:
            cos, sin = np.cos(amount * np.pi), np.sin(amount * np.pi)
            # Parity: AMS-Net: an amount up to 18 is up to nine turns, so any hue is as likely.
            turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
            total = _FROM_YIQ @ turn @ _TO_YIQ @ total
    return total


def pca_offset(alpha: npt.ArrayLike) -> Matrix:
    """What `alpha`, three shares of the principal components of ImageNet's colors, adds: [3]."""
    offset: Matrix = _PCA_VECTORS @ (np.asarray(alpha) * _PCA_VALUES)
    return offset


def draw_jitter(num_frames: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """The published jitter of one clip (AMS-Net).

    The amounts, the order of the parts and the PCA offset are those of the clip; whether a part is
    applied at all is drawn for every frame.

    Returns:
        [num_frames, 3, 4] float32, one map per frame.
    """
    brightness: tuple[Part, float] = ("brightness", rng.uniform(-32, 32))
    contrast: tuple[Part, float] = ("contrast", rng.uniform(0.6, 1.4))
    saturation: tuple[Part, float] = ("saturation", rng.uniform(0.6, 1.4))
    hue: tuple[Part, float] = ("hue", rng.uniform(-18, 18))
    contrast_first = rng.random() < 0.5
    parts = [brightness, contrast, saturation, hue]
    if not contrast_first:
        parts = [brightness, saturation, hue, contrast]
    offset = pca_offset(rng.normal(0.0, 0.1, size=3))
    # Parity: AMS-Net: independent coins per frame, so neighboring frames differ in color.
    coins = rng.random((num_frames, 4)) < 0.5
    maps = np.stack(
        [jitter_matrix([part for part, on in zip(parts, row, strict=True) if on]) for row in coins]
    )
    maps[:, :, 3] += offset
    return maps.astype(np.float32)


def apply_maps(frames: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Each pixel's color under its frame's map; nothing is clipped.

    Args:
        frames: [F, H, W, 3], any number type.
        maps: [F, 3, 4] float32.

    Returns:
        [F, H, W, 3] float32.
    """
    # Multiply-adds instead of a matrix product, which TF32 would round.
    maps = maps[:, None, None]  # [F, 1, 1, 3, 4]
    colors = maps[..., 3].expand(frames.shape).contiguous()  # [F, H, W, 3]
    for channel in range(3):
        colors.addcmul_(frames[..., channel : channel + 1].float(), maps[..., channel])
    return colors
