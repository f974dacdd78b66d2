"""nms: the CUDA kernel compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
from collections.abc import Callable

import pytest
import torch

from kernels import reference

pytestmark = pytest.mark.needs_nvcc


class Nms(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("sets", ctypes.c_int64),
        ("boxes_per_set", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("boxes", "candidates")),
        ("iou_threshold", ctypes.c_double),
        ("keep", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("nms")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1), (2, 64), (2, 65), (4, 200), (2, 257), (1, 512)], ids=str)
def test_kernel_matches_reference(
    device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    S, K = sizes
    generator = torch.Generator().manual_seed(K)
    corner = torch.rand(S, K, 2, generator=generator, dtype=dtype)
    boxes = torch.cat([corner, corner + 0.4 * torch.rand(S, K, 2, generator=generator)], dim=-1)
    boxes = boxes.to(dtype)
    boxes[:, ::17, 2:] = boxes[:, ::17, :2]  # without area
    candidates = torch.tensor([K, 0, K // 2, K + 9][:S])
    expected = reference.nms(boxes, candidates, iou_threshold=0.3)
    for reverse in (0, 1):
        keep = torch.ones(S, K, dtype=torch.bool)
        params = Nms(
            0 if dtype == torch.float32 else 1,
            *(S, K, boxes.data_ptr(), candidates.data_ptr(), 0.3, keep.data_ptr()),
        )
        device.host_cuda_reverse(reverse)
        assert device.accel_nms(ctypes.byref(params), None) == 0
        device.host_cuda_reverse(0)
        assert torch.equal(keep, expected)
    assert expected[0].sum() < K or K == 1
