"""Which frames of a video make a clip, as published systems choose them. Pure numbers, 0-based.

`segment_*` choose one frame of each of T equal segments (TSN; TANet, MAS-Net and AMS-Net use it),
`neighbor_*` the starts of five neighboring frames (TDN, MSN), `snippet_*` those of three frames
(AMS-Net's starred models); `dense_*` a window of 64 frames (I3D), `clip_*` clips of frames at a
fixed interval (mmaction: AMS-Net's and TANet's published rows). `*_train` draw at random, the
others are for validation and test, `*_views` with several clips of one video.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def segment_indices_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> Indices:
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
    return _one_per_segment(length, num_segments, rng)


def segment_indices_center(
    num_frames: int, num_segments: int, *, faithful: bool = False
) -> Indices:
    """The middle frame of each of `num_segments` equal segments.

    With tick = num_frames / num_segments, frame x is int(tick / 2 + tick x). A video with fewer
    frames than segments gives its first frame every time.

    Args:
        num_frames: N.
        num_segments: T.
        faithful: repeat the first frame also where N = T, as TAM and MAS-Net do when they validate
            during training. Otherwise every frame comes once, as in their one-clip tests.

    Returns:
        [num_segments] int64, strictly ascending if num_frames >= num_segments, else all 0.
    """
    if num_frames < num_segments or (faithful and num_frames == num_segments):
        return np.zeros(num_segments, np.int64)
    tick = num_frames / num_segments
    return _ticks(tick / 2.0, tick, num_segments)


def segment_views(
    num_frames: int, num_segments: int, *, num_clips: int = 1, twice: bool = False
) -> Indices:
    """The frames of uniform test clips, one per segment.

    With tick = num_frames / num_segments: one clip is int(tick / 2 + tick x); `twice` adds
    int(tick x); `num_clips` = M > 1 shifted clips are int(s_m + tick x), s_m = the integer parts of
    M numbers evenly spaced over [0, tick - 1] (TAM "uniform-M"; MAS-Net calls it dense sampling).

    Returns:
        [views, num_segments] int64, each row ascending; short videos repeat frames.

    Raises:
        ValueError: `twice` together with several clips.
    """
    if twice and num_clips > 1:
        raise ValueError(f"segment_views: expected num_clips = 1 with twice, got {num_clips}.")
    tick = num_frames / num_segments
    if num_clips > 1:
        # Videos shorter than T have a negative end; numpy's versions disagree on it: all 0 then.
        shifts = np.floor(np.linspace(0, max(tick - 1, 0.0), num_clips)).tolist()
    else:
        shifts = [tick / 2.0, 0.0] if twice else [tick / 2.0]
    return np.stack([_ticks(shift, tick, num_segments) for shift in shifts])


def neighbor_starts_train(
    num_frames: int, num_segments: int, rng: np.random.Generator, *, frames_per_segment: int = 5
) -> Indices:
    """The first frame of each segment's neighbors, at random (TDN, MSN).

    With L = frames_per_segment and d = floor((num_frames - L + 1) / num_segments): x d + U{0..d-1}
    if d > 0; else, with more frames than segments, sorted draws from U{0..num_frames-L}; else 0.

    Returns:
        [num_segments] int64, ascending.
    """
    length = (num_frames - frames_per_segment + 1) // num_segments
    if length > 0:
        return _one_per_segment(length, num_segments, rng)
    if num_frames <= num_segments:
        return np.zeros(num_segments, np.int64)
    return _sorted_draws(num_frames - frames_per_segment, num_segments, rng)


def neighbor_starts_center(
    num_frames: int, num_segments: int, *, frames_per_segment: int = 5
) -> Indices:
    """The first frame of each segment's neighbors, for validation (TDN, MSN).

    With L = frames_per_segment and tick = (num_frames - L + 1) / num_segments: int(tick / 2 + tick
    x) if num_frames > num_segments + L - 1, else 0.

    Returns:
        [num_segments] int64, ascending.
    """
    if num_frames <= num_segments + frames_per_segment - 1:
        return np.zeros(num_segments, np.int64)
    tick = (num_frames - frames_per_segment + 1) / num_segments
    return _ticks(tick / 2.0, tick, num_segments)


def neighbor_indices(starts: Indices, num_frames: int, *, frames_per_segment: int = 5) -> Indices:
    """`frames_per_segment` consecutive frames from each start; the video's last frame repeats.

    Returns:
        [..., T * L] int64 of starts [..., T]; the L frames of a segment adjoin.
    """
    frames = starts[..., None] + np.arange(frames_per_segment)  # [..., T, L]
    bounded: Indices = np.minimum(frames, num_frames - 1)
    return bounded.reshape(*starts.shape[:-1], -1)


def snippet_starts_train(
    num_frames: int, num_segments: int, rng: np.random.Generator, *, frames_per_segment: int = 3
) -> Indices:
    """The first frame of each segment's snippet, at random (AMS-Net).

    With L = frames_per_segment, T = num_segments, N = num_frames and d = floor(N / T):
    x d + U{0..d-1} if N >= T + L - 1; else sorted draws from U{0..N-L} if N > T; else the
    rounded x N / T if N < T; else 0.

    Returns:
        [num_segments] int64, ascending, in 0..num_frames (`snippet_indices` bounds them).
    """
    if num_frames >= num_segments + frames_per_segment - 1:
        # Parity: AMS-Net: the snippet's length is not subtracted, so the last one may reach
        # beyond the end.
        return _one_per_segment(num_frames // num_segments, num_segments, rng)
    if num_frames > num_segments:
        return _sorted_draws(num_frames - frames_per_segment, num_segments, rng)
    if num_frames < num_segments:
        return np.round(np.arange(num_segments) * num_frames / num_segments).astype(np.int64)
    # Parity: AMS-Net: as many frames as segments give the first snippet every time.
    return np.zeros(num_segments, np.int64)


def snippet_starts_views(
    num_frames: int,
    num_segments: int,
    *,
    num_shifts: int = 3,
    twice: bool = False,
    frames_per_segment: int = 3,
) -> Indices:
    """The first frames of the snippets of AMS-Net's test clips, one row per clip.

    With S = num_shifts, L = frames_per_segment, T = num_segments, N = num_frames, a = (N-L+1) / T:

    - N >= S T + L - 1: shifts s = 0, g, 2 g, ..; g = floor(a / S), plus 1 if
      (S-1) (g+1) < int(a). Rows int(s + a x); `twice` adds the rows int(s + a / 2 + a x).
    - N >= T + L - 1: S equal rows int(a / 2 + a x); `twice` adds S rows int(a x).
    - N >= T: S rows 0..T-1, with or without `twice`.
    - N >= L: S rows of 0..N-L, each repeated floor((T-L+1) / (N-L+1)) times, filled up with the
      largest; with or without `twice`.

    Returns:
        [S or 2 S, num_segments] int64. Row 0 is the one view of validation during training.

    Raises:
        ValueError: the video is shorter than one snippet.
    """
    last = num_frames - frames_per_segment  # the last start of a whole snippet
    positions = np.arange(num_segments)
    ticks = (last + 1) / num_segments
    if last + 1 >= num_segments * num_shifts:
        shift = int(ticks / num_shifts)
        if (num_shifts - 1) * (shift + 1) < int(ticks):
            shift += 1
        shifts = [float(shift * k) for k in range(num_shifts)]
        if twice:
            shifts += [start + ticks / 2.0 for start in shifts]
        return np.stack([_ticks(start, ticks, num_segments) for start in shifts])
    if last + 1 >= num_segments:
        # Parity: AMS-Net: the middles come first here, above the starts do.
        starts = [ticks / 2.0, 0.0] if twice else [ticks / 2.0]
        rows = np.stack([_ticks(start, ticks, num_segments) for start in starts])
        return np.repeat(rows, num_shifts, axis=0)
    if num_frames >= num_segments:
        row = positions
    elif last >= 0:
        repeats = (num_segments - frames_per_segment + 1) // (last + 1)
        row = np.minimum(positions // max(repeats, 1), last)
    else:
        raise ValueError(
            f"snippet_starts_views: expected at least {frames_per_segment} frames, got "
            f"{num_frames}."
        )
    return np.tile(row, (num_shifts, 1))


def snippet_indices(starts: Indices, num_frames: int, *, frames_per_segment: int = 3) -> Indices:
    """`frames_per_segment` consecutive frames from each start, within the video.

    Frames past the end become the last frame of the snippet that is not past it.

    Returns:
        [..., T * L] int64 of starts [..., T]; the L frames of a segment adjoin.
    """
    # Parity: AMS-Net: a snippet that begins past the end is the video's first frame.
    frames = clip_indices(starts, num_frames, clip_len=frames_per_segment, beyond="repeat_last")
    return frames.reshape(*starts.shape[:-1], -1)


def dense_start_train(num_frames: int, rng: np.random.Generator, *, span: int = 64) -> int:
    """First frame of a random window of `span` frames; 0 for a video that has only one."""
    positions = max(1, num_frames - span + 1)
    # Parity: TAM, mmaction: the last possible position is never drawn.
    return 0 if positions == 1 else int(rng.integers(0, positions - 1))


def dense_starts(
    num_frames: int, *, span: int = 64, num_clips: int = 1, lower_middle: bool = False
) -> Indices:
    """First frames of windows of `span` frames, evenly over all positions; of one: the middle.

    With P = max(1, num_frames - span + 1) positions: floor(P / 2) for one clip (floor((P - 1) / 2)
    with `lower_middle`: MAS-Net), else the integer parts of `num_clips` numbers evenly spaced over
    [0, P - 1].

    Returns:
        [num_clips] int64, ascending.
    """
    positions = max(1, num_frames - span + 1)
    if num_clips == 1:
        return np.array([(positions - lower_middle) // 2], np.int64)
    return np.linspace(0, positions - 1, num_clips).astype(np.int64)


def dense_indices(starts: Indices, num_frames: int, num_segments: int) -> Indices:
    """`num_segments` frames over 64 frames from each start; short videos begin anew.

    Returns:
        [..., num_segments] int64 of starts [...]: (start + x floor(64 / T)) mod num_frames.
    """
    steps = np.arange(num_segments) * (64 // num_segments)
    frames: Indices = (starts[..., None] + steps) % num_frames
    return frames


def clip_starts_train(
    num_frames: int, num_clips: int, rng: np.random.Generator, *, span: int = 1
) -> Indices:
    """First frames of `num_clips` clips at random (mmaction).

    With N = num_frames, K = num_clips, L = span (frames of a clip times their interval) and
    d = floor((N - L + 1) / K): k d + U{0..d-1} if d > 0; else sorted draws from U{0..N-L} if
    N > max(K, L); else the rounded k (N - L + 1) / K if d = 0; else 0.

    Returns:
        [num_clips] int64, ascending, in 0..num_frames (`clip_indices` bounds them).
    """
    free = num_frames - span + 1
    length = free // num_clips
    if length > 0:
        return _one_per_segment(length, num_clips, rng)
    if num_frames > max(num_clips, span):
        return _sorted_draws(num_frames - span, num_clips, rng)
    if length == 0:
        return np.round(np.arange(num_clips) * free / num_clips).astype(np.int64)
    return np.zeros(num_clips, np.int64)


def clip_starts_views(
    num_frames: int, num_clips: int, *, span: int = 1, twice: bool = False
) -> Indices:
    """First frames of `num_clips` test clips (mmaction 0.x; 1.x where span = 1).

    With a = (num_frames - span + 1) / num_clips: int(k a + a / 2), and `twice` adds int(k a); all 0
    for a video shorter than one clip.

    Returns:
        [num_clips or 2 num_clips] int64.
    """
    tick = max((num_frames - span + 1) / num_clips, 0.0)
    starts = [tick / 2.0, 0.0] if twice else [tick / 2.0]
    return np.concatenate([_ticks(start, tick, num_clips) for start in starts])


def clip_starts_spread(
    num_frames: int, num_clips: int, *, span: int, twice: bool = False
) -> Indices:
    """First frames of `num_clips` test clips, ends included (mmaction 1.x, several frames each).

    With M = max(num_frames - span, 0): the rounded k M / (K - 1); floor(M / 2) for one clip. `span`
    counts from a clip's first to its last frame, both included.

    Returns:
        [num_clips or 2 num_clips] int64; may lie beyond the end (`clip_indices` bounds them).
    """
    last = max(num_frames - span, 0)
    if num_clips == 1:
        return np.array([last // 2], np.int64)
    # Parity: mmaction 1.x: `twice` goes on with the same step, beyond the end.
    count = 2 * num_clips if twice else num_clips
    return np.round(np.arange(count) * (last / (num_clips - 1))).astype(np.int64)


def clip_indices(
    starts: Indices,
    num_frames: int,
    *,
    clip_len: int = 1,
    interval: int = 1,
    beyond: Literal["loop", "repeat_last"] = "loop",
) -> Indices:
    """`clip_len` frames from each start, `interval` apart.

    Frames beyond the end: the video begins anew ("loop"), or the clip's last frame that is not
    beyond the end comes again ("repeat_last"; the video's first frame if there is none).

    Returns:
        [..., clip_len] int64 of starts [...].
    """
    frames: Indices = starts[..., None] + np.arange(clip_len) * interval
    if beyond == "loop":
        frames %= num_frames
        return frames
    inside = np.where(frames < num_frames, frames, 0)
    return np.where(frames < num_frames, frames, inside.max(-1, keepdims=True))


def _one_per_segment(length: int, num_segments: int, rng: np.random.Generator) -> Indices:
    """x length + U{0..length-1}, independently per segment."""
    return np.arange(num_segments) * length + rng.integers(0, length, size=num_segments)


def _sorted_draws(last: int, num_segments: int, rng: np.random.Generator) -> Indices:
    """`num_segments` sorted draws from U{0..last}."""
    return np.sort(rng.integers(0, max(last, 0) + 1, size=num_segments))


def _ticks(start: float, tick: float, num_segments: int) -> Indices:
    """int(start + tick x), in the published order of operations."""
    return np.array([int(start + tick * x) for x in range(num_segments)], np.int64)
