"""build_loader(): batches of clips, decoded ahead in the background, in a reproducible order."""

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines import decoders
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig, TestViews
from pipelines.datasets import Dataset
from pipelines.decode import DecodeCounts
from pipelines.decoders import DecoderPlan, choose_decoder
from pipelines.errors import DataError, HangError
from pipelines.harmful import find_hanging, leave_out_harmful, note
from pipelines.in_flight import InFlight
from pipelines.media import MediaInfo
from pipelines.media_index import index_path, index_videos
from pipelines.order import Split, train_positions, val_positions
from pipelines.prefetch import Batch, Prefetcher
from pipelines.quarantine import Quarantine
from pipelines.recovery import GroupDecoder, Submitted
from pipelines.source import Sample, SampleSource

__all__ = ["Batch", "Loader", "build_loader"]
_SCALED_BY = ", scaled by "  # part of `Loader.backend`, which checkpoints hold


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
    quarantine: Quarantine | None = None,
    trained_with: str = "",
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
        quarantine: of the split; None = one without a file.
        trained_with: `Loader.backend` of another run, which decodes and scales here too where that
            is possible and `loader` forces no other decoder.

    Raises:
        DataError: more files cannot be used than `dataset` tolerates, files are too short, or fewer
            than one global batch.
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
    if quarantine is None:
        quarantine = Quarantine(videos, split=split, max_bad_fraction=dataset.max_bad_fraction)
    index = index_path(videos, dataset.cache_dir, dataset.frame_name)
    found = leave_out_harmful(index, videos, timeout_s=loader.timeout_s)
    infos = index_videos(
        videos,
        cache_dir=dataset.cache_dir,
        threads=loader.resolved_threads(),
        progress=rank == 0,
        frame_name=dataset.frame_name,
        tolerated=quarantine.tolerated,
        timeout_s=loader.timeout_s,
    )
    infos.problems.update(found)
    quarantine.add_all(infos.problems.items())
    source = SampleSource(
        videos,
        infos,
        split=split,
        sampling=sampling,
        augment=augment,
        seed=seed,
        num_classes=dataset.num_classes,
        views=views if split == "val" else None,
        bad=quarantine,
    )
    return Loader(
        source,
        quarantine=quarantine,
        split=split,
        augment=augment,
        loader=loader,
        micro_batch=micro_batch,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        device=device or torch.device("cpu"),
        ranges=ranges,
        trained_with=trained_with,
    )


class Loader:
    """Batches of one rank as a function of (epoch, start). Use from one thread.

    A video that turns out to be unreadable goes into the quarantine. In training another one stands
    in for it; in validation its batch has one sample less and names it (`Batch.missing`).
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        quarantine: Quarantine,
        split: Split,
        augment: AugmentConfig,
        loader: LoaderConfig,
        micro_batch: int,
        global_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        ranges: Callable[[str], AbstractContextManager[object]] = nullcontext,
        trained_with: str = "",
    ) -> None:
        self._source = source
        self.quarantine = quarantine
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
        earlier, _, scaler = trained_with.partition(_SCALED_BY)
        torch_scales = scaler == "torch" and loader.decoder in ("auto", earlier)
        in_flight = InFlight(source.infos.path.parent, source.infos.path.stem)
        self._state = _State(in_flight)
        # Also runs at the interpreter's exit, before the threads would be torn down.
        self._finalizer = weakref.finalize(self, self._state.release)
        self._plan = DecoderPlan(
            source=source,
            antialias=augment.antialias,
            threads=self._threads,
            max_samples=self._group * micro_batch,
            device=device,
            dali=decoders.dali_installed() and not torch_scales,
            counts=DecodeCounts(),
            in_flight=in_flight,
        )
        remembered = source.infos.path.with_suffix(".decoder.json")
        self._backend, self.description = choose_decoder(self._plan, loader, remembered, earlier)
        self.description += f", {self._threads} threads"
        self._cut = self._backend != "pyav"  # DALI takes files, PyAV packets
        self._whole_files = source.infos.whole_files(cut=self._cut)
        self._whole_clips = 0
        if self._whole_files:
            named = "; ".join(f"{count} {reason}" for reason, count in self._whole_files.items())
            total = sum(self._whole_files.values())
            text = f"; {total} of {len(source)} videos are decoded from the start of their file"
            self.description += f"{text} ({named})"
        self.backend = f"{self._backend}{_SCALED_BY}{'dali' if self._plan.dali else 'torch'}"

    @property
    def num_views(self) -> int:
        """Views of each video in a batch (1 in training)."""
        return self._source.num_views

    @property
    def decoded_whole(self) -> dict[str, Any]:
        """What is decoded from the start of its file, not from a keyframe.

        `files` of the split for each reason; `clips` so far of these files; `unexpected_clips` so
        far of other files, whose packets did not give the frames that their container promised.
        """
        unexpected = self._plan.counts["unexpected"] if self._plan.counts else 0
        return {
            "files": self._whole_files,
            "clips": self._whole_clips,
            "unexpected_clips": unexpected,
        }

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """[videos] of the whole split, unusable ones included."""
        return self._source.videos.labels

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
        if self._state.decoder is not None:
            self._state.decoder.unread.clear()  # each evaluation tries them again
        return self._iterate(self._start(epoch, start), epoch, start)

    def _start(self, epoch: int, start: int) -> Prefetcher:
        if self._state.decoder is None:
            build = functools.partial(self._plan.build, self._backend)
            settings = self._plan.settings(self._backend)
            reading = functools.partial(note, self._plan.in_flight, settings)
            self._state.decoder = GroupDecoder(build, self.quarantine, reading)
        length = max(1, math.ceil(self._config.prefetch / self._group))
        decoder = self._state.decoder
        run = Prefetcher(self._decode(decoder, epoch, start), length, decoder.in_flight)
        self._state.run = run
        return run

    def close(self) -> None:
        """End the background threads and release the decoder; the loader can be used again."""
        self._state.release()

    def samples(self, epoch: int, index: int) -> list[Sample]:
        """What micro-batch `index` of an epoch of this rank is made of; decodes nothing.

        Validation: without the videos that the index could not take, or that could not be read in
        this epoch. What an earlier one could not read is tried again: storage may have come back.
        """
        positions = self._positions(index)
        if self._split == "val":
            unread = self._state.decoder.unread if self._state.decoder is not None else set()
            problems = self._source.infos.problems
            positions = [k for k in positions if k not in unread and k not in problems]
        return [self._source.sample(epoch, position) for position in positions]

    def videos_of_step(self, epoch: int, step: int) -> list[str]:
        """The training videos of an optimizer step on all ranks."""
        places = range(step * self._global_batch, (step + 1) * self._global_batch)
        return [str(self._source.sample(epoch, place).path) for place in places]

    def _positions(self, index: int) -> Sequence[int]:
        if self._split == "train":
            return train_positions(
                index,
                rank=self._rank,
                world_size=self._world_size,
                micro_batch=self._micro_batch,
                global_batch=self._global_batch,
            )
        return val_positions(
            index,
            rank=self._rank,
            world_size=self._world_size,
            micro_batch=self._micro_batch,
            num_samples=len(self._source),
        )

    def _decode(self, decoder: GroupDecoder, epoch: int, start: int) -> Iterator[list[Batch]]:
        """The batches of each group; the next group is read while a group is finished."""
        started: tuple[range, Submitted] | None = None
        end = self.batches_per_epoch
        for first in range(start, end, self._group):
            indices = range(first, min(first + self._group, end))
            submitted = decoder.submit(functools.partial(self._group_samples, epoch, indices))
            if started is not None:
                yield self._finish(decoder, *started)
            started = (indices, submitted)
        if started is not None:
            yield self._finish(decoder, *started)

    def _group_samples(self, epoch: int, indices: range) -> list[list[Sample]]:
        return [self.samples(epoch, index) for index in indices]

    def _finish(self, decoder: GroupDecoder, indices: range, submitted: Submitted) -> list[Batch]:
        group, clips = decoder.finish(submitted)  # [N, crops, K * T * L, size, size, 3]
        samples = [sample for batch in group for sample in batch]
        size, frames = self._source.size, self._source.max_frames
        if clips is None:
            clips = torch.empty(0, 1, frames, size, size, 3, dtype=torch.uint8)
        shape = (self._source.num_views, frames // self._source.num_clips, size, size, 3)
        clips = clips.reshape(len(samples), *shape)  # [N, crops * K, T * L, size, size, 3]
        self._whole_clips += sum(self._is_whole(sample.info) for sample in samples)
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        ids = torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64)
        maps = [torch.from_numpy(s.colors) for s in samples if s.colors is not None]
        colors = torch.stack(maps) if maps else None  # [N, T * L, 3, 4]
        if self._device.type == "cuda":
            labels = labels.pin_memory()
            clips = clips if clips.is_cuda else clips.pin_memory()
            colors = colors.pin_memory() if colors is not None else None
        batches, first = [], 0
        for index, batch in zip(indices, group, strict=True):
            own = slice(first, first + len(batch))
            first += len(batch)
            color = colors[own].flatten(0, 1) if colors is not None else None
            missing: tuple[int, ...] = ()
            if self._split == "val":
                present = {sample.sample_id for sample in batch}
                missing = tuple(k for k in self._positions(index) if k not in present)
            batches.append(Batch(clips[own].flatten(0, 1), labels[own], ids[own], color, missing))
        return batches

    def _is_whole(self, info: MediaInfo) -> bool:
        known = info.packets is not None
        return info.kind.whole_reason(packets_known=known, cut=self._cut) is not None

    def _iterate(self, run: Prefetcher, epoch: int, index: int) -> Iterator[Batch]:
        try:
            while True:
                try:
                    batches = run.next_group(self._config.timeout_s)
                except HangError:
                    if not self._leave_out_hanging():
                        raise
                    run = self._start(epoch, index)
                    continue
                if batches is None:
                    return
                for batch in batches:
                    with self._ranges("upload"):
                        clips = batch.clips.to(self._device, non_blocking=True)
                        if batch.clips.is_cuda:  # decoded there, on another stream
                            clips.record_stream(torch.cuda.current_stream(self._device))
                        labels = batch.labels.to(self._device, non_blocking=True)
                        colors = batch.colors
                        if colors is not None:
                            colors = colors.to(self._device, non_blocking=True)
                    index += 1
                    yield Batch(clips, labels, batch.sample_ids, colors, batch.missing)
        except DataError:
            self._state.release()  # a DALI pipeline is not valid after an error
            raise
        finally:
            run.stop()

    def _leave_out_hanging(self) -> bool:
        """Give up the decoder; whether single videos are known now to be what held it."""
        content = self._plan.in_flight.content if self._plan.in_flight else None
        self._state.stop()
        infos, timeout_s = self._source.infos, self._config.timeout_s
        found = find_hanging(content, self._source.videos, infos, timeout_s=timeout_s)
        infos.problems.update(found)
        self.quarantine.add_all(found.items())
        return bool(found)


class _State:
    """What must be ended: the running epoch, the decoder, and the note of what it reads."""

    def __init__(self, in_flight: InFlight) -> None:
        self.run: Prefetcher | None = None
        self.decoder: GroupDecoder | None = None
        self._in_flight = in_flight

    def stop(self) -> None:
        if self.run is not None and not self.run.stop() and self.decoder is not None:
            self.decoder.close()  # its thread hangs in it
            self.decoder = None
        if self.decoder is not None:
            self.decoder.forget()
        self.run = None

    def release(self) -> None:
        self.stop()
        if self.decoder is not None:
            self.decoder.close()
            self.decoder = None
        self._in_flight.remove()
