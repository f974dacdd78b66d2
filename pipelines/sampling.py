"""Which frames of a video make a clip: TSN segments. Pure numbers, 0-based."""

import numpy as np
import numpy.typing as npt


def segment_indices_train(
    num_frames: int, num_segments: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """One random frame of each of `num_segments` equal segments.

    With d = floor(num_frames / num_segments), frame x is x d + U{0..d-1}, independently per
    segment; the last `num_frames mod num_segments` frames are never used. A video with fewer frames
    than segments gives its first frame every time.

    Returns:
        [num_segments] int64, strictly ascending if num_frames >= num_segments, else all 0.
    """
    length = num_frames // num_segments
    if length == 0:
        # Parity: TSN: short videos are one still frame; published lists rarely contain any.
        return np.zeros(num_segments, np.int64)
    return np.arange(num_segments) * length + rng.integers(0, length, size=num_segments)


def segment_indices_center(num_frames: int, num_segments: int) -> npt.NDArray[np.int64]:
    """The middle frame of each of `num_segments` equal segments.

    With tick = num_frames / num_segments, frame x is int(tick / 2 + tick x). A video with fewer
    frames than segments gives its first frame every time.

    Returns:
        [num_segments] int64, strictly ascending if num_frames >= num_segments, else all 0.
    """
    if num_frames < num_segments:
        return np.zeros(num_segments, np.int64)
    tick = num_frames / num_segments
    # Parity: TAM: num_frames == num_segments gives every frame once, as its one-clip test does; its
    # validation during training repeats frame 0 there.
    return np.array([int(tick / 2.0 + tick * x) for x in range(num_segments)], np.int64)
