"""Seeds by purpose: every random draw of a run is a pure function of (seed, purpose, counters)."""

import os
import random
import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one purpose, e.g. ("dropout", iteration, micro_step)."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int, purpose: str, *counters: int) -> None:
    """Seed Python's, NumPy's and torch's global generators for what follows.

    Called before the model is built and before every forward pass: dropout then depends on the
    iteration alone, and a resumed run needs no stored generator state.
    """
    value = derive_seed(seed, purpose, *counters)
    random.seed(value)
    np.random.seed(value % 2**32)
    # torch.manual_seed would also write down a stack trace for every device that is not in use.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)


def set_deterministic(enabled: bool) -> None:
    """Switch deterministic algorithms on or off: bit equality on one device type and version."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
