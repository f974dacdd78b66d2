"""SampleSource: what to read for a place in an epoch, and every random draw; stateless."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.annotations import VideoSet
from pipelines.config import AugmentConfig, SamplingConfig, label_pairs
from pipelines.errors import DataError
from pipelines.geometry import View, center_view, multiscale_view
from pipelines.media import MediaInfo
from pipelines.order import Purpose, Split, epoch_order, generator
from pipelines.sampling import (
    Indices,
    neighbor_indices,
    neighbor_starts_center,
    neighbor_starts_train,
    segment_indices_center,
    segment_indices_train,
    snippet_indices,
    snippet_starts_train,
    snippet_starts_views,
)

_FRAMES_PER_SEGMENT = {"segments": 1, "neighbors": 5, "snippets": 3}


@dataclass(frozen=True)
class Sample:
    """One clip to be read."""

    sample_id: int
    """Index into the records of the split."""

    path: Path
    frame_indices: npt.NDArray[np.int64]
    """[T * L], 0-based; the L frames of a segment adjoin and ascend."""

    view: View
    label: int
    """After the label exchange of a flip."""

    info: MediaInfo


class SampleSource:
    """Samples as a pure function of (epoch, position), for a fixed seed and configuration."""

    def __init__(
        self,
        videos: VideoSet,
        infos: Sequence[MediaInfo],
        *,
        split: Split,
        sampling: SamplingConfig,
        augment: AugmentConfig,
        seed: int,
        num_classes: int,
    ) -> None:
        self.videos = videos
        self.infos = infos
        self._training = split == "train"
        self._num_segments = sampling.num_segments
        self._kind = "segments" if sampling.kind == "auto" else sampling.kind
        self._frames_per_segment = sampling.frames_per_segment or _FRAMES_PER_SEGMENT[self._kind]
        self.may_repeat_frames = self._kind != "segments" or sampling.short_videos != "error"
        """Whether a clip may name a frame twice."""
        self._augment = augment
        self._seed = seed
        self._flipped_label = label_pairs(augment.flip_label_pairs)
        _refuse_short_videos(videos, infos, sampling, self._kind, self._frames_per_segment)
        beyond = [label for label in self._flipped_label if label >= num_classes]
        if beyond:
            raise ValueError(
                f"augment.flip_label_pairs: expected labels below the number of classes "
                f"({num_classes}), got {max(beyond)}."
            )
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, len(videos), seed)
        )

    def __len__(self) -> int:
        return len(self.videos)

    def sample(self, epoch: int, position: int) -> Sample:
        """The sample at a position of the epoch's order; validation keeps the list's order."""
        sample_id = int(self._order(epoch)[position]) if self._training else position
        record, info = self.videos.records[sample_id], self.infos[sample_id]
        label = record.label
        if self._training:
            frames_rng = generator(self._seed, Purpose.FRAMES, epoch, sample_id)
            indices = self._indices(info.num_frames, frames_rng)
            view = self._train_view(info, generator(self._seed, Purpose.VIEW, epoch, sample_id))
            if view.flip:
                label = self._flipped_label.get(label, label)
        else:
            indices = self._indices(info.num_frames, None)
            view = self._center_view(info)
        return Sample(sample_id, record.path, indices, view, label, info)

    def _indices(self, num_frames: int, rng: np.random.Generator | None) -> Indices:
        """[T * L] frame indices: random ones, or without `rng` those of validation."""
        segments, length = self._num_segments, self._frames_per_segment
        if self._kind == "segments":
            if rng is None:
                return segment_indices_center(num_frames, segments)
            return segment_indices_train(num_frames, segments, rng)
        if self._kind == "neighbors":
            if rng is None:
                starts = neighbor_starts_center(num_frames, segments, frames_per_segment=length)
            else:
                starts = neighbor_starts_train(num_frames, segments, rng, frames_per_segment=length)
            return neighbor_indices(starts, num_frames, frames_per_segment=length)
        if rng is None:
            starts = snippet_starts_views(num_frames, segments, frames_per_segment=length)[0]
        else:
            starts = snippet_starts_train(num_frames, segments, rng, frames_per_segment=length)
        return snippet_indices(starts, num_frames, frames_per_segment=length)

    def _center_view(self, info: MediaInfo, *, flip: bool = False) -> View:
        augment = self._augment
        return center_view(
            info.width, info.height, size=augment.size, resize=augment.resize, flip=flip
        )

    def _train_view(self, info: MediaInfo, rng: np.random.Generator) -> View:
        augment = self._augment
        flip = augment.flip and bool(rng.random() < 0.5)
        if augment.crop == "center":
            return self._center_view(info, flip=flip)
        return multiscale_view(
            info.width, info.height, size=augment.size, scales=augment.scales, flip=flip, rng=rng
        )


def _refuse_short_videos(
    videos: VideoSet,
    infos: Sequence[MediaInfo],
    sampling: SamplingConfig,
    kind: str,
    frames_per_segment: int,
) -> None:
    if sampling.short_videos == "error":
        needed, what = sampling.num_segments, f"sampling.num_segments = {sampling.num_segments}"
        remedy = "lower sampling.num_segments, or pass --sampling.short_videos=first_frame"
    elif kind == "snippets":
        needed, what = frames_per_segment, f"a snippet = {frames_per_segment}"
        remedy = "or choose another sampling.kind"
    else:
        return
    short = [
        f"{record.path} ({info.num_frames})"
        for record, info in zip(videos.records, infos, strict=True)
        if info.num_frames < needed
    ]
    if short:
        raise DataError(
            f"{len(short)} of {len(infos)} videos have fewer frames than {what}: "
            f"{', '.join(short[:3])}{', ...' if len(short) > 3 else ''}. Remove them, {remedy}."
        )
