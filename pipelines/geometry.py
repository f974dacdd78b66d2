"""Where a clip is cut from its frames. Pure numbers; x runs right, y down, (0, 0) is top left.

Published code comes in two conventions that differ by a pixel here and there: "tsm" (torchvision on
PIL images: TAM, MAS-Net, TDN, MSN) and "mmaction" (mmcv on OpenCV images: TANet's published rows,
AMS-Net).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Convention = Literal["tsm", "mmaction"]
NumCrops = Literal[1, 3, 10]


@dataclass(frozen=True)
class View:
    """How all frames of one clip become squares: scale, cut, scale to the square, mirror."""

    resized: tuple[int, int]
    """(width, height) the whole decoded frame is scaled to first, px."""

    window: tuple[int, int, int, int]
    """(x0, y0, width, height) cut from the scaled frame and scaled to the square, px."""

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
    return View((width, height), (x0, y0, crop_width, crop_height), flip)


def random_resized_view(
    width: int,
    height: int,
    *,
    flip: bool,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> View:
    """Training view of AMS-Net (mmaction): a window of random area and aspect, at a random place.

    Of ten candidates, sides round(sqrt(A r)) x round(sqrt(A / r)) with the share A / (width height)
    uniform in `area` and r log-uniform in `aspect`, the first that fits; if none does, the centered
    square of the short side.
    """
    ratios = np.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1]), size=10))
    areas = rng.uniform(area[0], area[1], size=10) * width * height
    sides = np.stack([np.round(np.sqrt(areas * ratios)), np.round(np.sqrt(areas / ratios))], axis=1)
    for crop_width, crop_height in np.maximum(sides, 1).astype(int).tolist():
        if crop_width <= width and crop_height <= height:
            x0 = int(rng.integers(0, width - crop_width + 1))
            y0 = int(rng.integers(0, height - crop_height + 1))
            return View((width, height), (x0, y0, crop_width, crop_height), flip)
    short = min(width, height)
    window = ((width - short) // 2, (height - short) // 2, short, short)
    return View((width, height), window, flip)


def resized_short_side(
    width: int, height: int, short: int, convention: Convention = "tsm"
) -> tuple[int, int]:
    """(width, height) with the short side `short`, the long side truncated ("tsm") or rounded."""
    scale = short / min(width, height)
    if convention == "mmaction":
        return int(width * scale + 0.5), int(height * scale + 0.5)
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_place(
    width: int, height: int, size: int, convention: Convention = "tsm"
) -> tuple[int, int]:
    """(x0, y0) of the center square: a half rounds to the even number ("tsm") or down."""
    if convention == "mmaction":
        return (width - size) // 2, (height - size) // 2
    return round((width - size) / 2), round((height - size) / 2)


def three_places(
    width: int, height: int, size: int, convention: Convention = "tsm"
) -> list[tuple[int, int]]:
    """(x0, y0) of three squares: first end, last end, middle.

    "tsm": along the width, whatever the format, with ends as of `multiscale_offsets`. "mmaction":
    along the longer side.

    Raises:
        ValueError: "mmaction" and a square that is as long as neither side.
    """
    if convention == "tsm":
        # Parity: TSM: all three are the same for an upright video.
        step_x, step_y = (width - size) // 4, (height - size) // 4
        return [(0, 2 * step_y), (4 * step_x, 2 * step_y), (2 * step_x, 2 * step_y)]
    if size == height:
        step = (width - size) // 2
        return [(0, 0), (2 * step, 0), (step, 0)]
    if size == width:
        step = (height - size) // 2
        return [(0, 0), (0, 2 * step), (0, step)]
    raise ValueError(
        f"three_places: expected squares as long as a side of the {width} x {height} px frame, got "
        f"{size} px."
    )


def five_places(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """(x0, y0) of the squares in the corners and the middle, in steps of quarters."""
    return multiscale_offsets(width, height, size, size)[:5]


def evaluation_views(
    width: int,
    height: int,
    *,
    size: int,
    resize: int,
    num_crops: NumCrops = 1,
    convention: Convention = "tsm",
) -> tuple[View, ...]:
    """Views of validation and test: short side to `resize` (0 = `size`), then squares of `size`.

    Args:
        width, height: of the decoded frame, px.
        size: side of the squares, px.
        resize: short side of the scaled frame, px, >= size.
        num_crops: 1 = the center; 3 = both ends and the middle of the long side; 10 = corners and
            center, each followed by its mirror image.
        convention: whose rounding.

    Raises:
        ValueError: three crops of "mmaction" that are smaller than the short side.
    """
    resized = resized_short_side(width, height, resize or size, convention)
    if num_crops == 1:
        places = [center_place(*resized, size, convention)]
    elif num_crops == 3:
        places = three_places(*resized, size, convention)
    else:
        places = five_places(*resized, size)
    flips = (False, True) if num_crops == 10 else (False,)
    return tuple(View(resized, (x, y, size, size), flip) for x, y in places for flip in flips)
