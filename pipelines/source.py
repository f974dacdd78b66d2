"""SampleSource: what to read for a place in an epoch, and every random draw; stateless."""

import functools
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.annotations import VideoSet
from pipelines.clips import ClipSampler
from pipelines.color import draw_jitter
from pipelines.config import AugmentConfig, SamplingConfig, TestViews, label_pairs
from pipelines.errors import DataError, MediaError
from pipelines.geometry import (
    NumCrops,
    View,
    evaluation_views,
    multiscale_view,
    random_resized_view,
    resized_short_side,
)
from pipelines.index_file import MediaIndex
from pipelines.media import MediaInfo
from pipelines.order import Purpose, Split, epoch_order, generator

_MOST_DRAWS = 10_000  # of a replacement


@dataclass(frozen=True)
class Sample:
    """What is read of one video: a training clip, or all its test clips."""

    sample_id: int
    """Index into the records of the split."""

    path: Path
    frame_indices: npt.NDArray[np.int64]
    """[K * T * L], 0-based, clip after clip; the L frames of a segment adjoin and ascend."""

    views: tuple[View, ...]
    """How the frames are cut, one view per crop; all scale the whole frame alike."""

    label: int
    """After the label exchange of a flip."""

    info: MediaInfo

    colors: npt.NDArray[np.float32] | None = None
    """[K * T * L, 3, 4] maps of the frames' colors (`pipelines.color`); None = as they are."""


@dataclass(frozen=True)
class Steps:
    """Which steps from decoded frames to views some sample of a split needs."""

    resize: bool
    """Scale the whole frame."""

    crop: bool
    """Cut a window that is not the whole frame."""

    scale: bool
    """Scale the window."""

    flip: bool
    repeat: bool
    """Name a frame twice."""

    num_views: int
    """Views of each sample."""


class SampleSource:
    """Samples as a pure function of (epoch, position), for a fixed seed and configuration."""

    def __init__(
        self,
        videos: VideoSet,
        infos: MediaIndex,
        *,
        split: Split,
        sampling: SamplingConfig,
        augment: AugmentConfig,
        seed: int,
        num_classes: int,
        views: TestViews | None = None,
        bad: Container[int] = (),
    ) -> None:
        self.videos = videos
        self.infos = infos
        self.size = augment.size
        """Height and width of the clips, px."""
        self.num_clips = 1
        self._num_crops: NumCrops = 1
        if views is not None:
            self.size = views.size or augment.size
            self.num_clips, self._num_crops = views.num_clips, views.num_crops
        self.bad = bad
        """Ids of videos that cannot be used; the answer may change as more are found."""
        self._training = split == "train"
        self._clips = ClipSampler(sampling, num_clips=self.num_clips, seed=seed)
        self._augment = augment
        self._seed = seed
        self._flipped_label = label_pairs(augment.flip_label_pairs)
        _refuse_short_videos(videos, infos, sampling, self._clips.shortest)
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
        """The sample at a position of the epoch's order; validation keeps the list's order.

        In training another video stands in for a bad one (`_replacement`).
        """
        drawn_id = int(self._order(epoch)[position]) if self._training else position
        sample_id = self._replacement(epoch, drawn_id) if self._training else position
        record, info = self.videos[sample_id], self.infos[sample_id]
        if not self._training:
            clips = self._clips.test(info.num_frames, sample_id)  # [K, T * L]
            views = self._test_views(info)
            return Sample(sample_id, record.path, clips.reshape(-1), views, record.label, info)
        frames_rng = generator(self._seed, Purpose.FRAMES, epoch, drawn_id)
        indices = self._clips.train(info.num_frames, frames_rng)
        view = self._train_view(info, generator(self._seed, Purpose.VIEW, epoch, drawn_id))
        label = self._flipped_label.get(record.label, record.label) if view.flip else record.label
        colors = None
        if self._augment.color_jitter != "none":
            rng = generator(self._seed, Purpose.COLOR, epoch, drawn_id)
            colors = draw_jitter(len(indices), rng)
        return Sample(sample_id, record.path, indices, (view,), label, info, colors)

    def _replacement(self, epoch: int, sample_id: int) -> int:
        """The video itself, or the first good one of a random sequence that is its own.

        Depends on (seed, epoch, sample id) and on which files are bad, not on when or by whom that
        was found. Its clip is drawn with the numbers of the bad one, so it is not the clip that the
        video has at its own place in the epoch.
        """
        if sample_id not in self.bad:
            return sample_id
        rng = generator(self._seed, Purpose.REPLACEMENT, epoch, sample_id)
        for _ in range(_MOST_DRAWS):
            candidate = int(rng.integers(len(self.videos)))
            if candidate not in self.bad:
                return candidate
        path = self.videos[sample_id].path
        raise MediaError(path, "cannot be used, and hardly any video of its set can.")

    @property
    def max_frames(self) -> int:
        """Most different frames of a sample."""
        return self.num_clips * self._clips.num_frames

    @property
    def num_views(self) -> int:
        """Views of each video: clips x crops (of ten crops, five are mirrored)."""
        return self.num_clips * self._num_crops

    @property
    def steps(self) -> Steps:
        """What a decoder has to do for the samples of this source."""
        augment, square = self._augment, (self.size, self.size)
        random_window = self._training and augment.crop != "center"
        short = augment.train_resize if random_window else augment.resize or self.size
        resized = {size: self._resized(size, short) for size in self.infos.sizes}
        return Steps(
            resize=any(size != to for size, to in resized.items()),
            crop=random_window or any(to != square for to in resized.values()),
            scale=random_window,
            flip=augment.flip if self._training else self._num_crops == 10,
            repeat=self._clips.may_repeat_frames,
            num_views=self._num_crops,
        )

    def _resized(self, size: tuple[int, int], short: int) -> tuple[int, int]:
        return resized_short_side(*size, short, self._augment.convention) if short else size

    def _test_views(self, info: MediaInfo) -> tuple[View, ...]:
        augment = self._augment
        return evaluation_views(
            info.width,
            info.height,
            size=self.size,
            resize=augment.resize,
            num_crops=self._num_crops,
            convention=augment.convention,
        )

    def _train_view(self, info: MediaInfo, rng: np.random.Generator) -> View:
        augment = self._augment
        flip = augment.flip and bool(rng.random() < 0.5)
        if augment.crop == "center":
            return replace(self._test_views(info)[0], flip=flip)
        width, height = self._resized((info.width, info.height), augment.train_resize)
        if augment.crop == "random_resized":
            return random_resized_view(
                width,
                height,
                flip=flip,
                rng=rng,
                area=augment.crop_area,
                aspect=augment.crop_aspect,
            )
        return multiscale_view(
            width, height, size=self.size, scales=augment.scales, flip=flip, rng=rng
        )


def _refuse_short_videos(
    videos: VideoSet, infos: MediaIndex, sampling: SamplingConfig, needed: int
) -> None:
    if sampling.short_videos == "error":
        what = f"sampling.num_segments = {sampling.num_segments}"
        remedy = "lower sampling.num_segments, or pass --sampling.short_videos=first_frame"
    else:
        what, remedy = f"a snippet = {needed}", "or choose another sampling.kind"
    short = [
        f"{videos[index].path} ({infos.num_frames[index]})"
        for index in np.flatnonzero((infos.num_frames < needed) & (infos.num_frames > 0)).tolist()
    ]
    if short:
        raise DataError(
            f"{len(short)} of {len(infos)} videos have fewer frames than {what}: "
            f"{', '.join(short[:3])}{', ...' if len(short) > 3 else ''}. Remove them, {remedy}."
        )
