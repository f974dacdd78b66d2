"""The prior boxes of SSD: 8732 at 300 x 300 pixels."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE_SIZE = 300
MAP_SIZES = (38, 19, 10, 5, 3, 1)
STEPS = (8, 16, 32, 64, 100, 300)
"""Pixels between the cells of each map."""

BOX_SIZES = (30, 60, 111, 162, 213, 264, 315)
"""Pixels: map k has boxes of size k, and of the geometric mean of sizes k and k + 1."""

ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
"""Width to height; each also upright."""

BOXES_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)


def ssd300_priors() -> Tensor:
    """Priors [8732, 4] of the published networks; see `ssd_priors`."""
    return ssd_priors(MAP_SIZES, cells=[IMAGE_SIZE / step for step in STEPS])


def ssd_priors(
    map_sizes: Sequence[int], cells: Sequence[float] | None = None, *, scale: float = 1.0
) -> Tensor:
    """Priors [P, 4] in cxcywh, float32, fractions of the image: by map, row, column, box.

    The boxes of a cell: the small square, the larger square, then for each aspect ratio the flat
    and the upright box.

    Args:
        map_sizes: cells along the side of each map, at most six.
        cells: how many of them the image holds; None: the same. (The published steps are powers of
            two that do not divide 300.)
        scale: the boxes are so many times as large as the published ones, > 0.
    """
    rows = []
    for k, map_size in enumerate(map_sizes):
        small = scale * BOX_SIZES[k] / IMAGE_SIZE
        large = math.sqrt(small * scale * BOX_SIZES[k + 1] / IMAGE_SIZE)
        sizes = [(small, small), (large, large)]
        for ratio in ASPECT_RATIOS[k]:
            root = math.sqrt(ratio)
            sizes += [(small * root, small / root), (small / root, small * root)]
        side = cells[k] if cells is not None else map_size
        for i, j in itertools.product(range(map_size), repeat=2):
            rows += [((j + 0.5) / side, (i + 0.5) / side, *size) for size in sizes]
    # Parity: SSD clamps the numbers of the center form, so that a prior may still leave the image;
    # boxes of checkpoints are relative to exactly these priors.
    return torch.tensor(rows, dtype=torch.float64).float().clamp(0, 1)
