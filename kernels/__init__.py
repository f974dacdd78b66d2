"""Temporal operators: plain PyTorch references, C++ twins and CUDA kernels behind one call each."""

from kernels.bn_act import bn_act
from kernels.branch_fuse import branch_fuse
from kernels.deform_conv import deform_conv
from kernels.diff_gate_shift import diff_gate_shift
from kernels.ingest import ingest, ingest_differences
from kernels.mas_fuse import mas_fuse
from kernels.nms import nms
from kernels.temporal_taps import temporal_taps

__all__ = [
    "bn_act",
    "branch_fuse",
    "deform_conv",
    "diff_gate_shift",
    "ingest",
    "ingest_differences",
    "mas_fuse",
    "nms",
    "temporal_taps",
]
