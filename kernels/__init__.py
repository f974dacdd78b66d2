"""Temporal operators: plain PyTorch references, C++ twins and CUDA kernels behind one call each."""

from kernels.deform_conv import deform_conv
from kernels.temporal_taps import temporal_taps

__all__ = ["deform_conv", "temporal_taps"]
