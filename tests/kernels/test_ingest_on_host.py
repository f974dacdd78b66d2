"""ingest: the CUDA kernel compiled as C++ and run on the host (see host_cuda.h)."""

import ctypes
from collections.abc import Callable

import pytest
import torch

from kernels import reference

pytestmark = pytest.mark.needs_nvcc

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc DType
# Relative to the result or, for float32 and float64, to the sum of absolute terms.
BOUND = {
    torch.float32: 2.0**-22,
    torch.float64: 2.0**-50,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


class Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "B", "L", "P", "channels", "differences")),
        *((name, ctypes.c_void_p) for name in ("frames", "mean", "std", "out")),
    ]


@pytest.fixture(scope="module")
def device(build_for_host: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build_for_host("ingest")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    # B, L, P, channels, offset of frames and out in their allocations
    "sizes",
    [
        *((2, 1, 35, 3, 0), (2, 1, 6000, 3, 0), (2, 1, 2000, 3, 1)),  # 6000 pixels: several blocks
        *((1, 1, 600, 4, 0), (1, 3, 7, 16, 0)),
        *((3, 5, 24, 15, 0), (2, 5, 11, 15, 1), (3, 5, 600, 15, 0)),
    ],
    ids=str,
)
def test_kernels_match_reference(device: ctypes.CDLL, dtype: torch.dtype, sizes: tuple) -> None:
    B, L, P, channels, offset = sizes
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(256, (offset + B * L * P * 3,), generator=generator, dtype=torch.uint8)
    frames = stored[offset:].view(B * L, P, 1, 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean = torch.rand(3, generator=generator).to(wide)
    std = torch.rand(3, generator=generator).to(wide) + 0.1

    def run(columns: int, differences: bool, reverse: bool) -> torch.Tensor:
        out = torch.full((offset + B * P * columns,), torch.nan, dtype=dtype)[offset:]
        params = Params(
            *(DTYPES[dtype], B, L, P, columns, int(differences), frames.data_ptr()),
            *(None if differences else mean.data_ptr(), std.data_ptr(), out.data_ptr()),
        )
        device.host_cuda_reverse(int(reverse))
        assert device.accel_ingest(ctypes.byref(params), None) == 0
        return out.view(B, P, 1, columns).permute(0, 3, 1, 2)

    exact = {"dtype": torch.float64, "frames_per_segment": L}
    scale = reference.ingest(frames, -mean.double(), std.double(), **exact, channels=channels)
    y = run(channels, differences=False, reverse=False)
    expected = reference.ingest(frames, mean.double(), std.double(), **exact, channels=channels)
    assert ((y.double() - expected).abs() <= BOUND[dtype] * scale).all()
    assert torch.equal(y, run(channels, differences=False, reverse=True))
    if L > 1:
        d = run(3 * (L - 1), differences=True, reverse=False)
        expected = reference.ingest_differences(frames, std.double(), **exact)
        assert ((d.double() - expected).abs() <= BOUND[dtype] * expected.abs()).all()
