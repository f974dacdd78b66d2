"""From the `sampling` section to frame indices: which rule of `sampling` a clip follows."""

import numpy as np

from pipelines.config import SamplingConfig
from pipelines.order import Purpose, generator
from pipelines.sampling import (
    Indices,
    clip_indices,
    clip_starts_train,
    clip_starts_views,
    dense_indices,
    dense_start_train,
    dense_starts,
    neighbor_indices,
    neighbor_starts_center,
    neighbor_starts_train,
    segment_indices_center,
    segment_indices_train,
    segment_views,
    snippet_indices,
    snippet_starts_train,
    snippet_starts_views,
)

_FRAMES_PER_SEGMENT = {"neighbors": 5, "snippets": 3}  # others: 1


class ClipSampler:
    """Frame indices of training and test clips, as a sampling section says.

    Args:
        sampling: the section; "auto" means "segments".
        num_clips: test clips of a video.
        seed: of the one test rule that is random.

    Raises:
        ValueError: the kind of sampling has no test rule for so many clips.
    """

    def __init__(self, sampling: SamplingConfig, *, num_clips: int = 1, seed: int = 0) -> None:
        self._config = sampling
        self._kind = "segments" if sampling.kind == "auto" else sampling.kind
        self._segments = sampling.num_segments
        self._length = sampling.frames_per_segment or _FRAMES_PER_SEGMENT.get(self._kind, 1)
        self._num_clips = num_clips
        self._seed = seed
        if num_clips < 1 or (self._kind == "snippets" and num_clips not in (1, 3, 6)):
            allowed = "1, 3 or 6" if self._kind == "snippets" else "at least 1"
            raise ValueError(
                f"number of clips: expected {allowed} with sampling.kind {self._kind!r}, got "
                f"{num_clips}."
            )

    @property
    def may_repeat_frames(self) -> bool:
        """Whether the clips of a video may name a frame twice."""
        plain = self._kind == "segments" and self._config.short_videos == "error"
        return not plain or self._num_clips > 1

    @property
    def num_frames(self) -> int:
        """Frame indices of one clip."""
        return self._segments * self._length

    @property
    def shortest(self) -> int:
        """The fewest frames a video must have."""
        if self._kind == "snippets" and self._config.short_videos != "error":
            return self._length
        return self._segments if self._config.short_videos == "error" else 1

    def train(self, num_frames: int, rng: np.random.Generator) -> Indices:
        """[T * L] frame indices of a random training clip."""
        segments, length = self._segments, self._length
        if self._kind == "segments" and self._config.short_videos == "spread":
            return clip_indices(clip_starts_train(num_frames, segments, rng), num_frames).reshape(
                -1
            )
        if self._kind == "segments":
            return segment_indices_train(num_frames, segments, rng)
        if self._kind == "dense":
            start = dense_start_train(num_frames, rng)
            return dense_indices(np.array(start), num_frames, segments)
        if self._kind == "clip":
            starts = clip_starts_train(num_frames, 1, rng, span=self._span)
            return self._clip_frames(starts, num_frames).reshape(-1)
        if self._kind == "neighbors":
            starts = neighbor_starts_train(num_frames, segments, rng, frames_per_segment=length)
            return neighbor_indices(starts, num_frames, frames_per_segment=length)
        starts = snippet_starts_train(num_frames, segments, rng, frames_per_segment=length)
        return snippet_indices(starts, num_frames, frames_per_segment=length)

    def test(self, num_frames: int, sample_id: int) -> Indices:
        """[clips, T * L] frame indices of a video's test clips; those of validation if one."""
        segments, length, clips = self._segments, self._length, self._num_clips
        if self._kind == "segments":
            return self._segment_clips(num_frames)
        if self._kind == "dense":
            starts = dense_starts(num_frames, num_clips=clips)
            return dense_indices(starts, num_frames, segments)
        if self._kind == "clip":
            starts = clip_starts_views(num_frames, clips, span=self._span)
            return self._clip_frames(starts, num_frames)
        if self._kind == "neighbors":
            starts = self._neighbor_starts(num_frames, sample_id)
            return neighbor_indices(starts, num_frames, frames_per_segment=length)
        starts = snippet_starts_views(
            num_frames, segments, twice=clips == 6, frames_per_segment=length
        )
        if clips == 1:
            starts = starts[:1]
        elif len(starts) < clips:  # short videos have three clips: each twice, the same average
            starts = np.tile(starts, (clips // len(starts), 1))
        return snippet_indices(starts, num_frames, frames_per_segment=length)

    @property
    def _span(self) -> int:
        return self._segments * self._config.frame_interval

    def _clip_frames(self, starts: Indices, num_frames: int) -> Indices:
        interval = self._config.frame_interval
        return clip_indices(starts, num_frames, clip_len=self._segments, interval=interval)

    def _segment_clips(self, num_frames: int) -> Indices:
        twice = self._num_clips == 2 and self._config.two_clips == "twice"
        if self._num_clips == 1 and self._config.short_videos != "spread":
            return segment_indices_center(num_frames, self._segments)[None]
        clips = 1 if twice else self._num_clips
        return segment_views(num_frames, self._segments, num_clips=clips, twice=twice)

    def _neighbor_starts(self, num_frames: int, sample_id: int) -> Indices:
        segments, length = self._segments, self._length
        if self._num_clips == 1:
            start = neighbor_starts_center(num_frames, segments, frames_per_segment=length)
            return start[None]
        # Parity: TDN, MSN: their several test clips are random training clips.
        rows = [
            neighbor_starts_train(
                num_frames,
                segments,
                generator(self._seed, Purpose.TEST_FRAMES, clip, sample_id),
                frames_per_segment=length,
            )
            for clip in range(self._num_clips)
        ]
        return np.stack(rows)
