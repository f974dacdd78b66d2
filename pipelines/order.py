"""Epoch order, its division among ranks, and random generators: pure functions.

Nothing here has state, so the place in an epoch is one number, and neither the number of ranks nor
of threads nor an interruption changes which samples make up an optimizer step.
"""

from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "val"]


class Purpose(IntEnum):
    """What a random generator is for; part of its seed, so the numbers are fixed."""

    ORDER = 1
    FRAMES = 2
    VIEW = 3
    COLOR = 4
    TEST_FRAMES = 5
    REPLACEMENT = 6


def generator(
    seed: int, purpose: Purpose, epoch: int, sample_id: int | None = None
) -> np.random.Generator:
    """Random generator that depends on its arguments alone."""
    key = (int(purpose), epoch) if sample_id is None else (int(purpose), epoch, sample_id)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def epoch_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Permutation of the sample ids for one training epoch, [num_samples] int64."""
    return generator(seed, Purpose.ORDER, epoch).permutation(num_samples)


def train_positions(
    index: int, *, rank: int, world_size: int, micro_batch: int, global_batch: int
) -> range:
    """Positions in the epoch's order of micro-batch `index` (0-based, of one epoch) of a rank.

    Optimizer step s uses positions s G .. (s + 1) G - 1 (G = `global_batch`); its micro-batch j on
    rank r those from s G + (j world_size + r) M (M = `micro_batch`).
    """
    per_step = global_batch // (micro_batch * world_size)
    step, micro = divmod(index, per_step)
    first = step * global_batch + (micro * world_size + rank) * micro_batch
    return range(first, first + micro_batch)


def val_positions(
    index: int, *, rank: int, world_size: int, micro_batch: int, num_samples: int
) -> range:
    """Positions of validation batch `index` of a rank: every sample once over all ranks.

    The split is cut into batches in list order and these are dealt out in turn, so a batch holds
    the same samples, and gives the same bits, for any number of ranks. The last one may be short.
    """
    first = (index * world_size + rank) * micro_batch
    return range(first, min(first + micro_batch, num_samples))
