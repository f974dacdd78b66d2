"""build_loader(): batches of clips, decoded ahead in the background, in a reproducible order."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pipelines import decoders
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig, TestViews
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.decoders import Decoder, DecoderPlan, choose_decoder
from pipelines.errors import DataError, MediaError
from pipelines.media_index import index_videos
from pipelines.order import Split, train_positions, val_positions
from pipelines.prefetch import Batch, Prefetcher
from pipelines.shards import find_media_damage
from pipelines.source import Sample, SampleSource

__all__ = ["Batch", "Loader", "build_loader"]


def build_loader(
    dataset: Dataset,
    *,
    split: Split,
    sampling: SamplingConfig,
    augment: AugmentConfig,
    loader: LoaderConfig,
    seed: int,
    micro_batch: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    views: TestViews | None = None,
    ranges: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> "Loader":
    """Check every file of a split and build its loader.

    Args:
        dataset: of `pipelines.datasets.open_dataset`.
        split: "train": random frames, crops and flips, shuffled; "val": fixed, in list order.
        sampling, augment, loader: the configuration sections.
        seed: of every random draw of the run.
        micro_batch: videos per batch of this rank.
        global_batch: clips per optimizer step, a multiple of micro_batch x world_size; unused for
            "val".
        rank: of this process, 0-based.
        world_size: number of processes.
        device: of the clips and labels; None = CPU.
        views: "val": what is read of every video; None = the one center view.
        ranges: makes the context in which the upload to the device is launched ("upload").

    Raises:
        DataError: files cannot be used, are too short, or are fewer than one global batch.
        ValueError: batch sizes that do not divide, or a decoder that is not installed.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < {world_size}, got {rank}.")
    if micro_batch < 1 or (split == "train" and global_batch % (micro_batch * world_size)):
        raise ValueError(
            f"train.global_batch: expected a multiple of train.micro_batch x processes = "
            f"{micro_batch} x {world_size}, got {global_batch}."
        )
    videos = dataset.train if split == "train" else dataset.val
    if split == "train" and len(videos) < global_batch:
        raise DataError(
            f"the training set has {len(videos)} videos, fewer than one global batch "
            f"({global_batch}); lower train.global_batch and train.micro_batch, or add videos."
        )
    infos = index_videos(
        videos,
        cache_dir=dataset.cache_dir,
        threads=loader.resolved_threads(),
        progress=rank == 0,
        frame_name=dataset.frame_name,
    )
    source = SampleSource(
        videos,
        infos,
        split=split,
        sampling=sampling,
        augment=augment,
        seed=seed,
        num_classes=dataset.num_classes,
        views=views if split == "val" else None,
    )
    return Loader(
        source,
        split=split,
        augment=augment,
        loader=loader,
        micro_batch=micro_batch,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        device=device or torch.device("cpu"),
        ranges=ranges,
    )


class Loader:
    """Batches of one rank as a function of (epoch, start). Use from one thread."""

    def __init__(
        self,
        source: SampleSource,
        *,
        split: Split,
        augment: AugmentConfig,
        loader: LoaderConfig,
        micro_batch: int,
        global_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        ranges: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._source = source
        self._split = split
        self._config = loader
        self._micro_batch = micro_batch
        self._global_batch = global_batch
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._ranges = ranges
        self._threads = loader.resolved_threads()
        # Micro-batches decoded together: enough to keep every thread busy. Images are so quick to
        # decode that only 64 of them per thread outweigh the cost of one more group.
        videos = 2 * self._threads
        if source.infos.are_frames:
            videos = max(videos, 64 * self._threads // source.max_frames)
        if source.num_views > 1:  # all views of a video may take 100 MB
            videos = self._threads
        self._group = max(1, math.ceil(videos / micro_batch))
        self._plan = DecoderPlan(
            source=source,
            antialias=augment.antialias,
            threads=self._threads,
            max_samples=self._group * micro_batch,
            device=device,
            dali=decoders.dali_installed(),
        )
        remembered = source.infos.path.with_suffix(".decoder.json")
        self._backend, self.description = choose_decoder(self._plan, loader, remembered)
        self.description += f", {self._threads} threads"
        self.backend = f"{self._backend}, scaled by {'dali' if self._plan.dali else 'torch'}"
        self._state = _State()
        # Also runs at the interpreter's exit, before the threads would be torn down.
        self._finalizer = weakref.finalize(self, self._state.release)

    @property
    def num_views(self) -> int:
        """Views of each video in a batch (1 in training)."""
        return self._source.num_views

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this rank in one epoch."""
        if self._split == "train":
            per_step = self._global_batch // (self._micro_batch * self._world_size)
            return self.steps_per_epoch * per_step
        batches = math.ceil(len(self._source) / self._micro_batch)
        return len(range(self._rank, batches, self._world_size))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch (the incomplete last one is dropped); for "val", batches."""
        if self._split == "train":
            return len(self._source) // self._global_batch
        return self.batches_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches `start`, `start` + 1, ... of an epoch of this rank.

        They are the same whatever `start` is, so a run resumes at any batch. Decoding runs ahead in
        the background until the iterator is exhausted, closed or replaced by another one.
        """
        if epoch < 0 or not 0 <= start <= self.batches_per_epoch:
            raise ValueError(
                f"epoch: expected epoch >= 0 and 0 <= start <= {self.batches_per_epoch}, "
                f"got {epoch} and {start}."
            )
        self._state.stop()
        if self._state.decoder is None:
            self._state.decoder = self._plan.build(self._backend)
        length = max(1, math.ceil(self._config.prefetch / self._group))
        run = Prefetcher(self._groups(epoch, start), self._decode, length)
        self._state.run = run
        return self._iterate(run)

    def close(self) -> None:
        """End the background threads and release the decoder; the loader can be used again."""
        self._state.release()

    def samples(self, epoch: int, index: int) -> list[Sample]:
        """What micro-batch `index` of an epoch of this rank is made of; decodes nothing."""
        if self._split == "train":
            positions = train_positions(
                index,
                rank=self._rank,
                world_size=self._world_size,
                micro_batch=self._micro_batch,
                global_batch=self._global_batch,
            )
        else:
            positions = val_positions(
                index,
                rank=self._rank,
                world_size=self._world_size,
                micro_batch=self._micro_batch,
                num_samples=len(self._source),
            )
        return [self._source.sample(epoch, position) for position in positions]

    def _groups(self, epoch: int, start: int) -> Iterator[list[list[Sample]]]:
        end = self.batches_per_epoch
        for first in range(start, end, self._group):
            indices = range(first, min(first + self._group, end))
            yield [self.samples(epoch, index) for index in indices]

    def _decode(self, groups: Iterator[list[list[Sample]]]) -> Iterator[list[Batch]]:
        """The batches of each group; the next group is read while a group is finished."""
        decoder = self._state.decoder
        assert decoder is not None
        started: tuple[list[list[Sample]], list[Any]] | None = None
        for group in groups:
            submitted = decoder.submit([sample for batch in group for sample in batch])
            if started is not None:
                yield self._finish(decoder, *started)
            started = (group, submitted)
        if started is not None:
            yield self._finish(decoder, *started)

    def _finish(
        self, decoder: Decoder, group: list[list[Sample]], submitted: list[Any]
    ) -> list[Batch]:
        samples = [sample for batch in group for sample in batch]
        try:
            clips = decoder.finish(submitted)  # [N, crops, K * T * L, size, size, 3]
        except DataError:
            raise
        except RuntimeError as error:
            raise _name_culprit(samples, error) from error
        frames = clips.shape[2]
        shape = (self._source.num_views, frames // self._source.num_clips, *clips.shape[3:])
        clips = clips.reshape(-1, *shape)  # [N, crops * K, T * L, size, size, 3]
        labels = torch.tensor([sample.label for sample in samples])
        ids = torch.tensor([sample.sample_id for sample in samples])
        maps = [torch.from_numpy(s.colors) for s in samples if s.colors is not None]
        colors = torch.stack(maps) if maps else None  # [N, T * L, 3, 4]
        if self._device.type == "cuda":
            labels = labels.pin_memory()
            clips = clips if clips.is_cuda else clips.pin_memory()
            colors = colors.pin_memory() if colors is not None else None
        batches, first = [], 0
        for batch in group:
            own = slice(first, first + len(batch))
            first += len(batch)
            color = colors[own].flatten(0, 1) if colors is not None else None
            batches.append(Batch(clips[own].flatten(0, 1), labels[own], ids[own], color))
        return batches

    def _iterate(self, run: Prefetcher) -> Iterator[Batch]:
        try:
            while (batches := run.next_group(self._config.timeout_s)) is not None:
                for batch in batches:
                    with self._ranges("upload"):
                        clips = batch.clips.to(self._device, non_blocking=True)
                        labels = batch.labels.to(self._device, non_blocking=True)
                        colors = batch.colors
                        if colors is not None:
                            colors = colors.to(self._device, non_blocking=True)
                    yield Batch(clips, labels, batch.sample_ids, colors)
        except DataError:
            self._state.release()  # a DALI pipeline is not valid after an error
            raise
        finally:
            run.stop()


def _name_culprit(samples: Sequence[Sample], error: RuntimeError) -> DataError:
    """DALI fails for a whole group without naming the file: find it with PyAV or Pillow."""
    for sample in samples:
        try:
            find_media_damage(sample.path, sample.info)
            read_frames(sample)
        except MediaError as found:
            return found
    paths = ", ".join(str(sample.path) for sample in samples)
    reason = " ".join(str(error).split())[-300:]
    return DataError(f"DALI cannot decode one of {paths}: {reason}")


class _State:
    """What must be ended: the running epoch and the decoder."""

    def __init__(self) -> None:
        self.run: Prefetcher | None = None
        self.decoder: Decoder | None = None

    def stop(self) -> None:
        if self.run is not None and not self.run.stop():
            self.decoder = None
        self.run = None

    def release(self) -> None:
        self.stop()
        if self.decoder is not None:
            self.decoder.close()
            self.decoder = None
