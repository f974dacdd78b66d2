"""Batches of micro-tubes: read, augment, stack, pad; the order and every draw are stateless."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.microtubes import Microtube, distinct_images, image_fractions, stacked
from pipelines.order import Purpose, epoch_order, train_positions
from pipelines.ssd_augment import SeededDraws, augment, plain_view
from pipelines.tube_data import Stream, TubeSet

Augmentation = Literal["ssd", "mirror", "none"]


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
        ValueError: fewer items than a step needs.
    """

    backend = "pillow"

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
        self._data, self._items, self._view, self._seed = data, items, view, seed
        self._share = {
            "rank": rank,
            "world_size": world_size,
            "micro_batch": micro_batch,
            "global_batch": global_batch,
        }
        self._batches = self.steps_per_epoch * global_batch // (micro_batch * world_size)
        self._device = device or torch.device("cpu")
        self._pool = ThreadPoolExecutor(threads, "accel-microtubes")
        self._ahead = 2 * threads

    @property
    def description(self) -> str:
        """For summaries."""
        streams = ", ".join(f"{name} x {stack}" for name, stack in self._view.streams)
        return f"{len(self._items)} micro-tubes of {streams}, Pillow and NumPy"

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

    def _on_device(self, batch: MicrotubeBatch) -> MicrotubeBatch:
        if self._device.type == "cpu":
            return batch
        return MicrotubeBatch(
            tuple(x.to(self._device, non_blocking=True) for x in batch.streams),
            batch.boxes.to(self._device, non_blocking=True),
            batch.labels.to(self._device, non_blocking=True),
        )

    def _batch(self, epoch: int, ids: Sequence[int]) -> MicrotubeBatch:
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


def read_images(
    data: TubeSet, item: Microtube, view: MicrotubeView
) -> tuple[np.ndarray, list[list[int]]]:
    """All images [n, H, W, 3] of an item, base stream first, and each stream's file numbers.

    Raises:
        MediaError: an image that cannot be used.
    """
    video = data.videos[item.video]
    numbers = [distinct_images(item.frames, video.num_frames, stack) for _, stack in view.streams]
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
