"""Every operator in plain PyTorch: the specification that kernels and C++ twins are tested against.

Any device, any floating dtype, any strides, differentiable any number of times. Arguments are those
of the public functions, which check them.
"""

from torch import Tensor


def temporal_taps(x: Tensor, w: Tensor, a: Tensor | None = None, *, num_segments: int) -> Tensor:
    """See `kernels.temporal_taps`. Computes in w's dtype, rounds once to x's."""
    batch = x.shape[0] // num_segments
    z = x.reshape(batch, num_segments, *x.shape[1:]).to(w.dtype)  # [N, T, C, H, W]
    if a is not None:
        z = z * a[..., None, None]
    first, middle, last = (
        w[..., k][..., None, :, None, None] for k in range(3)
    )  # [N?, 1, C, 1, 1]
    y: Tensor = z * middle
    y[:, 1:] += z[:, :-1] * first
    y[:, :-1] += z[:, 1:] * last
    return y.to(x.dtype).flatten(0, 1)  # [N*T, C, H, W]
