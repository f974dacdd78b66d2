"""The 8732 prior boxes of SSD at 300 x 300 pixels."""

import itertools
import math

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
    """Priors [8732, 4] in cxcywh, float32, fractions of the image: by map, row, column, box.

    The boxes of a cell: the small square, the larger square, then for each aspect ratio the flat
    and the upright box.
    """
    rows = []
    for k, map_size in enumerate(MAP_SIZES):
        small = BOX_SIZES[k] / IMAGE_SIZE
        large = math.sqrt(small * BOX_SIZES[k + 1] / IMAGE_SIZE)
        sizes = [(small, small), (large, large)]
        for ratio in ASPECT_RATIOS[k]:
            root = math.sqrt(ratio)
            sizes += [(small * root, small / root), (small / root, small * root)]
        cells = IMAGE_SIZE / STEPS[k]
        for i, j in itertools.product(range(map_size), repeat=2):
            rows += [((j + 0.5) / cells, (i + 0.5) / cells, *size) for size in sizes]
    # Parity: SSD clamps the numbers of the center form, so that a prior may still leave the image;
    # boxes of checkpoints are relative to exactly these priors.
    return torch.tensor(rows, dtype=torch.float64).float().clamp(0, 1)
