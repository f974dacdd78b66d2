"""Where a clip is cut from its frames. Pure numbers; x runs right, y down, (0, 0) is top left."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class View:
    """How all frames of one clip become `size` x `size`: cut, scale, cut again, mirror."""

    window: tuple[int, int, int, int]
    """(x0, y0, width, height) cut from the decoded frame, px."""

    scaled: tuple[int, int]
    """(width, height) the window is scaled to, px."""

    crop: tuple[int, int]
    """(x0, y0) of the `size` x `size` square cut from the scaled window, px."""

    flip: bool
    """Mirror left and right."""


# Offsets of the multi-scale crop in quarters of the free space, in the published order.
_POSITIONS = (
    (0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3),
    (3, 3),
)  # fmt: skip


def multiscale_sizes(
    width: int, height: int, size: int, scales: Sequence[float]
) -> list[tuple[int, int]]:
    """The (width, height) candidates of the multi-scale crop, equal ones not merged.

    Sides c_i = int(min(width, height) scale_i), replaced by `size` when less than 3 px from it;
    candidates are the pairs (c_j, c_i) with |i - j| <= 1, i outer.
    """
    short = min(width, height)
    sides = [max(1, int(short * scale)) for scale in scales]
    # The published code also enlarges a side beyond a frame of size - 1 or size - 2 and pads with
    # black; here the side then stays as it is.
    sides = [size if abs(side - size) < 3 and size <= short else side for side in sides]
    indices = range(len(sides))
    return [(sides[j], sides[i]) for i in indices for j in indices if abs(i - j) <= 1]


def multiscale_offsets(
    width: int, height: int, crop_width: int, crop_height: int
) -> list[tuple[int, int]]:
    """The 13 places (x0, y0) of a crop: in units of floor(free space / 4) per axis."""
    step_x, step_y = (width - crop_width) // 4, (height - crop_height) // 4
    return [(x * step_x, y * step_y) for x, y in _POSITIONS]


def multiscale_view(
    width: int,
    height: int,
    *,
    size: int,
    scales: Sequence[float],
    flip: bool,
    rng: np.random.Generator,
) -> View:
    """Training view of a `width` x `height` frame: one candidate size, one of 13 places."""
    sizes = multiscale_sizes(width, height, size, scales)
    crop_width, crop_height = sizes[rng.integers(len(sizes))]
    offsets = multiscale_offsets(width, height, crop_width, crop_height)
    x0, y0 = offsets[rng.integers(len(offsets))]
    return View((x0, y0, crop_width, crop_height), (size, size), (0, 0), flip)


def resized_short_side(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) with the short side `short`, the long side truncated to an integer."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_view(width: int, height: int, *, size: int, resize: int, flip: bool = False) -> View:
    """Validation view: short side to `resize` (0 = `size`), then the center square."""
    scaled = resized_short_side(width, height, resize or size)
    # Parity: TSM: a half rounds to the even number.
    crop = (round((scaled[0] - size) / 2), round((scaled[1] - size) / 2))
    return View((0, 0, width, height), scaled, crop, flip)
