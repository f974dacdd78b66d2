"""Temporal operators: plain PyTorch references, C++ twins and CUDA kernels behind one call each."""

from kernels.temporal_taps import temporal_taps

__all__ = ["temporal_taps"]
