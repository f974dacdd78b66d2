"""ingest: compiled operators against the reference and the formula, layouts, PyTorch's parts."""

import warnings

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

needs_extension = pytest.mark.needs_extension
DEVICES = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[needs_extension, pytest.mark.needs_cuda]),
]
# Relative to the sum of absolute terms: one rounding of the type, a product fused or not.
BOUND = {
    torch.float64: 2.0**-48,
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
SHAPES = [
    # B, L, H, W, channels
    (2, 1, 7, 5, 3),
    (1, 1, 1, 1, 4),
    (3, 5, 4, 6, 15),
    (1, 3, 70, 65, 9),
    (2, 2, 3, 3, 8),
    (0, 5, 4, 4, 15),
]


def make(
    B: int, L: int, H: int, W: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames with all bytes, mean, std."""
    generator = torch.Generator().manual_seed(B + L + H)
    frames = torch.randint(256, (B * L, H, W, 3), generator=generator, dtype=torch.uint8)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return frames.to(device), mean.to(device, wide), std.to(device, wide)


def exact(frames: Tensor, mean: Tensor, std: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """[B, 3*L, H, W] in fp64, as the definition says, and the sums of absolute terms."""
    x = frames.double().div(255).permute(0, 3, 1, 2)  # [B*L, 3, H, W]
    mean, std = mean.double()[:, None, None], std.double()[:, None, None]
    shape = (len(frames) // L, 3 * L, *frames.shape[1:3])
    return ((x - mean) / std).reshape(shape), ((x + mean) / std).reshape(shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple, dtype: torch.dtype, device: str) -> None:
    B, L, H, W, channels = shape
    frames, mean, std = make(B, L, H, W, dtype, device)
    expected, scale = exact(frames, mean, std, L)
    for backend in ("auto", "reference"):
        y = kernels.ingest(
            frames, mean, std, dtype=dtype, frames_per_segment=L, channels=channels, backend=backend
        )
        assert y.dtype == dtype and y.shape == (B, channels, H, W)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert ((y[:, : 3 * L].double() - expected).abs() <= BOUND[dtype] * scale).all()
        assert not y[:, 3 * L :].any()
        if L > 1:
            d = kernels.ingest_differences(
                frames, std, dtype=dtype, frames_per_segment=L, backend=backend
            )
            steps = frames.unflatten(0, (B, L)).double().diff(dim=1).flatten(0, 1)
            difference, _ = exact(steps, 0 * mean, std, L - 1)
            assert d.dtype == dtype and d.shape == difference.shape
            assert d.is_contiguous(memory_format=torch.channels_last)
            # Relative to the difference itself: nothing cancels.
            assert ((d.double() - difference).abs() <= BOUND[dtype] * difference.abs()).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_same_bits_as_the_reference(dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without AVX2, PyTorch rounds twice where the operator rounds once")
    frames, mean, std = make(1, 2, 33, 64, dtype, device)
    arguments = {"dtype": dtype, "frames_per_segment": 2, "channels": 8}
    expected = reference.ingest(frames, mean, std, **arguments)
    assert torch.equal(kernels.ingest(frames, mean, std, **arguments), expected)
    del arguments["channels"]
    expected = reference.ingest_differences(frames, std, **arguments)
    assert torch.equal(kernels.ingest_differences(frames, std, **arguments), expected)


@needs_extension
def test_same_bits_with_any_number_of_threads() -> None:
    frames, mean, std = make(4, 5, 65, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = kernels.ingest(frames, mean, std, dtype=torch.float16, frames_per_segment=5)
            results.append(y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_extension
def test_frames_with_other_strides_go_to_the_reference_or_are_refused() -> None:
    frames, mean, std = make(2, 1, 4, 6)
    other = frames.permute(0, 2, 1, 3)
    with pytest.warns(RuntimeWarning, match="frames are not contiguous"):
        y = kernels.ingest(other, mean, std, dtype=torch.float32)
    straight = kernels.ingest(other.contiguous(), mean, std, dtype=torch.float32)
    torch.testing.assert_close(y, straight, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.ingest(other, mean, std, dtype=torch.float32)  # reported once
    with pytest.raises(RuntimeError, match="frames are not contiguous"):
        kernels.ingest(other, mean, std, dtype=torch.float32, backend="cpp")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"frames": torch.zeros(2, 4, 4, 3)}, ValueError, "uint8"),
        ({"frames": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, ValueError, r"\[B\*L, H, W, 3\]"),
        ({"frames_per_segment": 3}, ValueError, "whole segments"),
        ({"frames_per_segment": 0}, ValueError, "at least 1"),
        ({"channels": 2}, ValueError, "channels must be at least"),
        ({"mean": torch.zeros(4)}, ValueError, r"mean must be \[3\]"),
        ({"std": torch.ones(3, dtype=torch.float64)}, TypeError, "std must be torch.float32"),
        ({"dtype": torch.int32}, TypeError, "floating"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_wrong_arguments(change: dict, error: type, text: str) -> None:
    frames, mean, std = make(2, 1, 4, 4)
    arguments = {"frames": frames, "mean": mean, "std": std, "dtype": torch.float32, **change}
    with pytest.raises(error, match=text):
        kernels.ingest(**arguments)


def test_differences_need_two_frames() -> None:
    frames, _, std = make(2, 1, 4, 4)
    with pytest.raises(ValueError, match="at least 2"):
        kernels.ingest_differences(frames, std, dtype=torch.float32, frames_per_segment=1)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_follow_the_rules_of_pytorch(device: str) -> None:
    frames, mean, std = make(2, 5, 4, 6, device=device)
    ops = torch.ops.accel_kernels
    torch.library.opcheck(ops.ingest, (frames, mean, std, torch.float16, 5, 16))
    torch.library.opcheck(ops.ingest_differences, (frames, std, torch.float32, 5))


@needs_extension
def test_compiles_and_exports() -> None:
    frames, mean, std = make(2, 5, 4, 6)

    class Input(torch.nn.Module):
        def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
            y = kernels.ingest(frames, mean, std, dtype=torch.float32, frames_per_segment=5)
            return y, kernels.ingest_differences(
                frames, std, dtype=torch.float32, frames_per_segment=5
            )

    expected = Input()(frames)
    compiled = torch.compile(Input(), fullgraph=True, backend="aot_eager")(frames)
    exported = torch.export.export(Input(), (frames,)).module()(frames)
    for actual in (compiled, exported):
        assert all(map(torch.equal, actual, expected))
