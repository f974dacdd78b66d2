"""Batches of micro-tubes: read, augment, stack, pad; the order and every draw are stateless."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.microtubes import Microtube, distinct_images, image_fractions, stacked
from pipelines.order import Purpose, epoch_order, train_positions
from pipelines.ssd_augment import SeededDraws, SSDView, augment, draw_view, plain_view
from pipelines.tube_data import Stream, TubeSet

if TYPE_CHECKING:
    from pipelines.dali_microtubes import DaliViews

Augmentation = Literal["ssd", "mirror", "none"]
PixelBackend = Literal["numpy", "dali"]


@dataclass(frozen=True, eq=False)
class MicrotubeBatch:
    """N micro-tubes of T frames."""

    streams: tuple[Tensor, ...]
    """Per stream [N*T, 3*F, S, S] float32, RGB bytes minus means, channels_last, on the device."""

    boxes: Tensor
    """[N, G, T, 4] float32, ltrb, fractions of the image; zeros behind the last action."""

    labels: Tensor
    """[N, G] int64; -1 behind the last action."""


@dataclass(frozen=True, kw_only=True)
class MicrotubeView:
    """What of a micro-tube the network sees."""

    streams: tuple[tuple[Stream, int], ...] = (("rgb", 1),)
    """(stream, images in the stack of a frame), base first."""

    size: int = 300
    """Pixels of a side."""

    augmentation: Augmentation = "ssd"
    """Of training: all of SSD's, mirroring alone, or nothing."""

    pixels: PixelBackend = "numpy"
    """What decodes and augments: Pillow and NumPy, or a DALI graph (SSD's augmentation only)."""


class MicrotubeLoader:
    """Training batches of one process.

    Args:
        data: the set.
        items: its training micro-tubes.
        view: what the network sees.
        seed: of order and augmentation.
        micro_batch: N.
        global_batch: micro-tubes of one optimizer step over all processes.
        rank, world_size: of this process.
        device: where the tensors go.
        threads: that read images, >= 1; the data does not depend on it.

    Raises:
        ValueError: fewer items than a step needs; DALI for another augmentation than SSD's.
    """

    def __init__(
        self,
        data: TubeSet,
        items: Sequence[Microtube],
        view: MicrotubeView,
        *,
        seed: int,
        micro_batch: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        threads: int = 1,
    ) -> None:
        self.steps_per_epoch = len(items) // global_batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"train.global_batch: {global_batch} micro-tubes per step, but the set has "
                f"{len(items)}."
            )
        if view.pixels == "dali" and view.augmentation != "ssd":
            raise ValueError(
                f"detection.pixels: dali needs detection.augmentation ssd, got {view.augmentation}."
            )
        self.backend = "dali" if view.pixels == "dali" else "pillow"
        self._data, self._items, self._view, self._seed = data, items, view, seed
        self._share = {
            "rank": rank,
            "world_size": world_size,
            "micro_batch": micro_batch,
            "global_batch": global_batch,
        }
        self._batches = self.steps_per_epoch * global_batch // (micro_batch * world_size)
        self._device = device or torch.device("cpu")
        self._dali: DaliViews | None = None
        self._dali_lock = Lock()
        if view.pixels == "dali":
            from pipelines.dali_microtubes import DaliViews

            frames = len(items[0].frames)
            images = micro_batch * frames * sum(stack for _, stack in view.streams)
            self._dali = DaliViews(max_images=images, size=view.size, threads=threads)
        self._pool = ThreadPoolExecutor(threads, "accel-microtubes")
        self._ahead = 2 * threads

    @property
    def description(self) -> str:
        """For summaries."""
        streams = ", ".join(f"{name} x {stack}" for name, stack in self._view.streams)
        tools = "DALI" if self._dali is not None else "Pillow and NumPy"
        return f"{len(self._items)} micro-tubes of {streams}, {tools}"

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[MicrotubeBatch]:
        """The micro-batches of an epoch from `start` on, read ahead.

        Raises:
            MediaError: an image that cannot be used.
        """
        order = epoch_order(len(self._items), self._seed, epoch)
        waiting: list[Future[MicrotubeBatch]] = []
        upcoming = iter(range(start, self._batches))
        try:
            while True:
                for index in upcoming:
                    positions = train_positions(index, **self._share)
                    waiting.append(self._pool.submit(self._batch, epoch, order[positions].tolist()))
                    if len(waiting) > self._ahead:
                        break
                if not waiting:
                    return
                yield self._on_device(waiting.pop(0).result())
        finally:
            for future in waiting:
                future.cancel()

    def videos_of_step(self, epoch: int, step: int) -> list[str]:
        """The videos of the micro-tubes of an optimizer step on all ranks."""
        size = self._share["global_batch"]
        ids = epoch_order(len(self._items), self._seed, epoch)[step * size : (step + 1) * size]
        return [self._data.videos[self._items[i].video].name for i in ids.tolist()]

    def _on_device(self, batch: MicrotubeBatch) -> MicrotubeBatch:
        if self._device.type == "cpu":
            return batch
        return MicrotubeBatch(
            tuple(x.to(self._device, non_blocking=True) for x in batch.streams),
            batch.boxes.to(self._device, non_blocking=True),
            batch.labels.to(self._device, non_blocking=True),
        )

    def _batch(self, epoch: int, ids: Sequence[int]) -> MicrotubeBatch:
        if self._dali is not None:
            samples = self._dali_samples(self._dali, epoch, ids)
        else:
            samples = [self._sample(epoch, i) for i in ids]
        most = max(len(labels) for _, _, labels in samples)
        frames = len(self._items[ids[0]].frames)
        boxes = torch.zeros(len(samples), most, frames, 4)
        labels = torch.full((len(samples), most), -1)
        for i, (_, own_boxes, own_labels) in enumerate(samples):
            boxes[i, : len(own_labels)] = torch.from_numpy(own_boxes)
            labels[i, : len(own_labels)] = torch.from_numpy(own_labels)
        streams = tuple(
            torch.from_numpy(np.concatenate([inputs[k] for inputs, _, _ in samples])).contiguous(
                memory_format=torch.channels_last
            )
            for k in range(len(self._view.streams))
        )
        return MicrotubeBatch(streams, boxes, labels)

    def _dali_samples(
        self, views: DaliViews, epoch: int, ids: Sequence[int]
    ) -> list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
        """As `_sample`, for all items of a batch in one run of the graph."""
        files: list[np.ndarray] = []
        drawn: list[SSDView] = []
        numbers, found = [], []
        for index in ids:
            item = self._items[index]
            video = self._data.videos[item.video]
            own = stream_numbers(item, video.num_frames, self._view)
            numbers.append(own)
            before, size = len(files), (0, 0)
            for (stream, _), wanted in zip(self._view.streams, own, strict=True):
                encoded, size = self._data.encoded(stream, video, wanted)
                files += encoded
            width, height = size
            boxes = image_fractions(item.boxes, width=width, height=height)
            draws = SeededDraws(self._seed, int(Purpose.VIEW), epoch, index)
            view, boxes, labels = draw_view(height, width, boxes, item.labels, draws)
            drawn += [view] * (len(files) - before)
            found.append((boxes, labels))
        try:
            with self._dali_lock:
                pixels = views(files, drawn)
        except RuntimeError:
            for index in ids:  # names the file
                read_images(self._data, self._items[index], self._view)
            raise
        samples, first = [], 0
        for index, own, (boxes, labels) in zip(ids, numbers, found, strict=True):
            count = sum(map(len, own))
            part = pixels[first : first + count]
            first += count
            inputs = stream_inputs(self._data, self._items[index], self._view, part, own)
            samples.append((inputs, boxes, labels))
        return samples

    def _sample(self, epoch: int, index: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Inputs of the streams [T, 3*F, S, S], boxes [M, T, 4] and labels [M] of one item."""
        item = self._items[index]
        images, numbers = read_images(self._data, item, self._view)
        height, width = images.shape[1:3]
        boxes, labels = image_fractions(item.boxes, width=width, height=height), item.labels
        draws = SeededDraws(self._seed, int(Purpose.VIEW), epoch, index)
        if self._view.augmentation == "ssd":
            pixels, boxes, labels = augment(images, boxes, labels, draws, size=self._view.size)
        else:
            pixels = plain_view(images, size=self._view.size)
            if self._view.augmentation == "mirror" and draws.integer(2):
                pixels = pixels[:, :, ::-1]
                boxes = np.stack(
                    [1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], axis=-1
                )
        return stream_inputs(self._data, item, self._view, pixels, numbers), boxes, labels


def stream_numbers(item: Microtube, num_frames: int, view: MicrotubeView) -> list[list[int]]:
    """File numbers of the images that each stream needs for an item."""
    return [distinct_images(item.frames, num_frames, stack) for _, stack in view.streams]


def read_images(
    data: TubeSet, item: Microtube, view: MicrotubeView
) -> tuple[np.ndarray, list[list[int]]]:
    """All images [n, H, W, 3] of an item, base stream first, and each stream's file numbers.

    Raises:
        MediaError: an image that cannot be used.
    """
    video = data.videos[item.video]
    numbers = stream_numbers(item, video.num_frames, view)
    parts = [
        data.read(stream, video, own)
        for (stream, _), own in zip(view.streams, numbers, strict=True)
    ]
    return np.concatenate(parts), numbers


def stream_inputs(
    data: TubeSet,
    item: Microtube,
    view: MicrotubeView,
    pixels: np.ndarray,
    numbers: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """The inputs [T, 3*F, S, S] of the streams from the pixels of all images of an item."""
    num_frames = data.videos[item.video].num_frames
    inputs, first = [], 0
    for (_, stack), own in zip(view.streams, numbers, strict=True):
        part = pixels[first : first + len(own)]
        inputs.append(stacked(part, own, item.frames, num_frames, stack))
        first += len(own)
    return inputs
