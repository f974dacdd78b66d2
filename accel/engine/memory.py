"""Host memory of a training process."""

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees for the next one, instead of returning it to the system.

    By default glibc maps every large tensor anew and unmaps it when it is freed; the kernel then
    clears each page at its first use, for gigabytes in every step on a CPU. The process keeps its
    peak instead. Does nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
