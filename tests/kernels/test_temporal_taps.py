"""temporal_taps: compiled operator against the reference, layouts, dtypes, messages."""

import itertools

import pytest
import torch
from torch import Tensor

import kernels
from kernels import _library, reference

needs_extension = pytest.mark.needs_extension
DEVICES = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[needs_extension, pytest.mark.needs_cuda]),
]
# Of the sum of absolute terms: two roundings of 16-bit types, fp32 and fp64 accumulation.
BOUND = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-19,
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}


def make(
    N: int,
    T: int,
    C: int,
    size: tuple[int, int],
    *,
    per_sample: bool = True,
    gated: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in channels_last, `offset` elements into its allocation, w and a; all require gradients."""
    generator = torch.Generator().manual_seed(N * 1000 + T * 100 + C)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    flat = torch.randn(offset + N * T * C * size[0] * size[1], generator=generator)
    x = flat.to(device, dtype)[offset:].view(N * T, *size, C).permute(0, 3, 1, 2)
    w = torch.randn((N, C, 3) if per_sample else (C, 3), generator=generator).to(device, wide)
    a = torch.rand(N, T, C, generator=generator).to(device, wide) if gated else None
    return x.requires_grad_(), w.requires_grad_(), None if a is None else a.requires_grad_()


def run(
    inputs: tuple[Tensor, Tensor, Tensor | None], num_segments: int, backend: str | None = None
) -> list[Tensor]:
    """y and the gradients of x, w and a for an incoming gradient that depends on the position."""
    y = kernels.temporal_taps(*inputs, num_segments=num_segments, backend=backend)
    grad = torch.linspace(-1, 2, y.numel(), device=y.device).to(y.dtype)
    grad = grad.view(y.shape).contiguous(memory_format=torch.channels_last)
    return [y, *torch.autograd.grad(y, [value for value in inputs if value is not None], grad)]


def expected_and_scale(
    inputs: tuple[Tensor, Tensor, Tensor | None], num_segments: int
) -> list[tuple[Tensor, Tensor]]:
    """Outputs in fp64, each with the sum of the absolute values of its terms."""
    exact = tuple(None if v is None else v.detach().double().requires_grad_() for v in inputs)
    absolute = tuple(None if v is None else v.detach().abs().requires_grad_() for v in exact)
    y = reference.temporal_taps(*exact, num_segments=num_segments)
    grad = torch.linspace(-1, 2, y.numel(), device=y.device).to(inputs[0].dtype).double()
    grad = grad.view(y.shape)
    y_scale = reference.temporal_taps(*absolute, num_segments=num_segments)
    present = [v for v in exact if v is not None]
    scale_present = [v for v in absolute if v is not None]
    return list(
        zip(
            [y, *torch.autograd.grad(y, present, grad)],
            [y_scale, *torch.autograd.grad(y_scale, scale_present, grad.abs())],
            strict=True,
        )
    )


def assert_close(
    actual: list[Tensor], inputs: tuple[Tensor, Tensor, Tensor | None], num_segments: int
) -> None:
    for value, (expected, scale) in zip(
        actual, expected_and_scale(inputs, num_segments), strict=True
    ):
        bound = BOUND[value.dtype] * scale
        if value.dtype == torch.float16:
            bound = bound + 2.0**-24  # fp16's smallest step
        assert ((value.double() - expected).abs() <= bound + 1e-300).all()


def test_package_is_ours() -> None:
    assert "temporal_taps" in kernels.__all__
    assert "kernels/__init__.py" in kernels.__file__ and hasattr(kernels, "temporal_taps")


def test_formula() -> None:
    """The reference against the formula written as loops."""
    N, T, C = 2, 3, 2
    x, w, a = (v.detach() for v in make(N, T, C, (1, 2)))
    y = torch.zeros(N, T, C, 1, 2, dtype=x.dtype)
    frames = x.reshape(N, T, C, 1, 2)
    for n, t, c, k in itertools.product(range(N), range(T), range(C), range(3)):
        if 0 <= t + k - 1 < T:
            y[n, t, c] += w[n, c, k] * a[n, t + k - 1, c] * frames[n, t + k - 1, c]
    actual = kernels.temporal_taps(x, w, a, num_segments=T, backend="reference")
    torch.testing.assert_close(actual, y.flatten(0, 1), rtol=0, atol=1e-14)


SHAPES = [
    # N, T, C, (H, W)
    (1, 1, 8, (1, 1)),
    (3, 2, 64, (7, 7)),
    (1, 8, 72, (7, 7)),
    (2, 16, 3, (5, 3)),
    (3, 9, 8, (4, 9)),
    (1, 8, 512, (1, 1)),
    (1, 2, 8, (56, 56)),
    (2, 4, 1, (3, 3)),
    (1, 2, 1536, (2, 2)),
]
FORMS = list(itertools.product([False, True], [False, True]))  # per_sample, gated


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple, dtype: torch.dtype, device: str) -> None:
    for per_sample, gated in FORMS:
        inputs = make(*shape, per_sample=per_sample, gated=gated, dtype=dtype, device=device)
        actual = run(inputs, shape[1])
        assert actual[0].is_contiguous(memory_format=torch.channels_last)
        assert [v.dtype for v in actual] == [
            dtype,
            dtype,
            *[v.dtype for v in inputs[1:] if v is not None],
        ]
        assert_close(actual, inputs, shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 8])
def test_misaligned_storage(offset: int, device: str) -> None:
    inputs = make(2, 4, 16, (3, 5), dtype=torch.float16, device=device, offset=offset)
    assert_close(run(inputs, 4), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_slice_of_the_batch(device: str) -> None:
    x, w, a = make(4, 4, 8, (3, 3), device=device)
    inputs = (x.detach()[4:12].requires_grad_(), w[1:3].detach(), a[1:3].detach())
    inputs[1].requires_grad_(), inputs[2].requires_grad_()
    assert_close(run(inputs, 4, "auto"), inputs, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_of_any_strides(device: str) -> None:
    x, w, a = make(2, 4, 8, (3, 3), device=device)
    w_strided = w.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    a_strided = a.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not w_strided.is_contiguous() and not a_strided.is_contiguous()
    assert all(map(torch.equal, run((x, w_strided, a_strided), 4), run((x, w, a), 4)))


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_taps_keep_no_activations(device: str) -> None:
    x, w, a = make(1, 2, 4, (2, 2), device=device)
    y = kernels.temporal_taps(x, w.detach(), a.detach(), num_segments=2)
    assert not any(t is not None and t.shape == x.shape for t in y.grad_fn.saved_tensors)


# Layouts, backends and messages.


def test_reference_keeps_the_layout() -> None:
    x, w, a = (v.detach() for v in make(2, 4, 8, (3, 3)))
    y = kernels.temporal_taps(x.contiguous(), w, a, num_segments=4, backend="reference")
    assert y.is_contiguous()


@needs_extension
def test_operator_refuses_a_slice_of_the_channels() -> None:
    x, w, a = (v.detach() for v in make(2, 4, 8, (3, 3)))
    with pytest.raises(ValueError, match="temporal_taps: x must be contiguous in channels_last"):
        torch.ops.accel_kernels.temporal_taps(x[:, ::2], w[:, ::2], a[..., ::2], 4)


@needs_extension
@pytest.mark.parametrize("size", [(1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_ambiguous_strides(size: tuple[int, int], channels: int) -> None:
    """H = W = 1 or C = 1: NCHW memory is channels_last memory as well, and is taken as it is."""
    x, w, a = make(1, 2, channels, size)
    nchw = x.detach().contiguous().requires_grad_()
    if nchw.is_contiguous(memory_format=torch.channels_last):
        assert all(map(torch.equal, run((nchw, w, a), 2, "cpp"), run((x, w, a), 2, "cpp")))
    else:
        assert size != (1, 1) and channels != 1


def test_library_says_why_it_cannot_be_loaded(tmp_path) -> None:
    assert "kernels._C is not built" in _library._load(tmp_path / "_C.so")
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded with torch" in _library._load(broken)


@needs_extension
def test_library_of_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _library.Path(_library.__file__).with_name("_C.so")
    monkeypatch.setattr(torch, "__version__", "1.13.0+cu117")
    assert "is built for torch" in _library._load(path)


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(1, 2, 4, (2, 2))
    monkeypatch.setenv("ACCEL_KERNELS", "fastest")
    with pytest.raises(ValueError, match=r"ACCEL_KERNELS must be one of auto, .*, got 'fastest'"):
        run(inputs, 2)
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'fast'"):
        run(inputs, 2, "fast")
    monkeypatch.setenv("ACCEL_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="ACCEL_KERNELS=cuda was asked for, but x is on 'cpu'"):
        run(inputs, 2)
    monkeypatch.setenv("ACCEL_KERNELS", "reference")
    compiled = torch.ops.accel_kernels if _library.AVAILABLE else None
    monkeypatch.setattr(torch.ops, "accel_kernels", None)  # the operator must not be looked up
    try:
        run(inputs, 2)
    finally:
        monkeypatch.setattr(torch.ops, "accel_kernels", compiled)


BAD_ARGUMENTS = {
    "rank": (lambda x, w, a: (x[0], w, a, 4), "x must be \\[N\\*T, C, H, W\\]"),
    "segments": (lambda x, w, a: (x, w, a, 3), "x must hold whole clips of num_segments = 3"),
    "zero": (lambda x, w, a: (x, w, a, 0), "x must hold whole clips of num_segments = 0"),
    "taps": (lambda x, w, a: (x, w[:, :4], a, 4), "w must be \\[C, 3\\] = \\[8, 3\\] or"),
    "gate": (lambda x, w, a: (x, w, a[:, :3], 4), "a must be \\[N, T, C\\] = \\[2, 4, 8\\]"),
    "half_taps": (lambda x, w, a: (x, w.half(), a, 4), "w must be .*, got"),
    "half_gate": (lambda x, w, a: (x, w, a.half(), 4), "a must be .*, got"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=needs_extension)])
def test_bad_arguments(name: str, direct: bool) -> None:
    """The front end and the operator itself both refuse, with the same words."""
    change, message = BAD_ARGUMENTS[name]
    x, w, a, num_segments = change(*(v.detach() for v in make(2, 4, 8, (3, 3))))
    with pytest.raises((ValueError, TypeError), match=f"^temporal_taps: {message}"):
        if direct:
            torch.ops.accel_kernels.temporal_taps(x, w, a, num_segments)
        else:
            kernels.temporal_taps(x, w, a, num_segments=num_segments)


@needs_extension
def test_operator_refuses_integers_and_strided_coefficients() -> None:
    x, w, a = (v.detach() for v in make(2, 4, 8, (3, 3)))
    operator = torch.ops.accel_kernels.temporal_taps
    with pytest.raises(TypeError, match="x must be float32, float64, float16 or bfloat16"):
        operator(x.int(), w.float(), a.float(), 4)
    with pytest.raises(ValueError, match="a must be contiguous"):
        operator(x, w, a.transpose(1, 2).contiguous().transpose(1, 2), 4)
    backward = torch.ops.accel_kernels.temporal_taps_backward
    with pytest.raises(ValueError, match="dw and da need x, got None"):
        backward(x, None, w, a, 4, [True, True, False])
    with pytest.raises(ValueError, match="asks for da, but a is None"):
        backward(x, x, w, None, 4, [True, True, True])
    with pytest.raises(ValueError, match="x must be like grad"):
        backward(x, x.float(), w, a, 4, [True, True, True])
