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
from pipelines.sampling import segment_indices_center, segment_indices_train


@dataclass(frozen=True)
class Sample:
    """One clip to be read."""

    sample_id: int
    """Index into the records of the split."""

    path: Path
    frame_indices: npt.NDArray[np.int64]
    """[T], 0-based, ascending."""

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
        self._augment = augment
        self._seed = seed
        self._flipped_label = label_pairs(augment.flip_label_pairs)
        if sampling.short_videos == "error":
            _refuse_short_videos(videos, infos, sampling.num_segments)
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
            indices = segment_indices_train(info.num_frames, self._num_segments, frames_rng)
            view = self._train_view(info, generator(self._seed, Purpose.VIEW, epoch, sample_id))
            if view.flip:
                label = self._flipped_label.get(label, label)
        else:
            indices = segment_indices_center(info.num_frames, self._num_segments)
            view = self._center_view(info)
        return Sample(sample_id, record.path, indices, view, label, info)

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


def _refuse_short_videos(videos: VideoSet, infos: Sequence[MediaInfo], num_segments: int) -> None:
    short = [
        f"{record.path} ({info.num_frames})"
        for record, info in zip(videos.records, infos, strict=True)
        if info.num_frames < num_segments
    ]
    if short:
        raise DataError(
            f"{len(short)} of {len(infos)} videos have fewer frames than sampling.num_segments = "
            f"{num_segments}: {', '.join(short[:3])}{', ...' if len(short) > 3 else ''}. Remove "
            "them, lower sampling.num_segments, or pass --sampling.short_videos=first_frame."
        )
