"""Batches: order, resume, ranks, pixels, failures, threads."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import decoders
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.errors import DataError, MediaError
from pipelines.fallback import apply_views
from pipelines.loader import Batch, Loader, build_loader

MakeVideo = Callable[..., Path]
MakeDataset = Callable[[Sequence[Path]], Dataset]
# dali: DALI decodes and scales; pyav: PyAV decodes, DALI scales; torch: without DALI.
DECODERS = [
    pytest.param("dali", marks=pytest.mark.needs_dali_video),
    pytest.param("pyav", marks=pytest.mark.needs_dali),
    "torch",
]
HMDB = Path(__file__).parents[1] / "data" / "hmdb51"


def open_loader(dataset: Dataset, split: str = "train", **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "sampling": SamplingConfig(num_segments=4),
        "augment": AugmentConfig(size=32, resize=32),
        "seed": 3,
        "micro_batch": 2,
        "global_batch": 4,
    }
    options = {"threads": 2, "timeout_s": 60.0}
    options |= {
        key: changes.pop(key) for key in ("decoder", "timeout_s", "prefetch") if key in changes
    }
    without_dali = options.get("decoder") == "torch"
    if without_dali:
        options["decoder"] = "pyav"
    arguments |= {"loader": LoaderConfig(**options)} | changes
    with pytest.MonkeyPatch.context() as patch:
        if without_dali:
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(dataset, split=split, **arguments)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in vars(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.fixture
def dataset(make_video: MakeVideo, make_dataset: MakeDataset) -> Dataset:
    """Eleven VP9 clips of 6..16 frames."""
    return make_dataset([make_video(f"{k}.webm", num_frames=6 + k, video=k) for k in range(11)])


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_batches(dataset: Dataset, decoder: str) -> None:
    loader = open_loader(dataset, decoder=decoder)
    assert (loader.steps_per_epoch, loader.batches_per_epoch) == (2, 4)
    batches = list(loader.epoch(0))
    assert len(batches) == 4
    for batch in batches:
        assert batch.clips.shape == (2, 4, 32, 32, 3) and batch.clips.dtype == torch.uint8
        assert batch.labels.tolist() == [k % 3 for k in batch.sample_ids.tolist()]
        images = batch.clips.flatten(0, 1).permute(0, 3, 1, 2)
        assert images.is_contiguous(memory_format=torch.channels_last)
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert len(set(ids)) == 8
    assert ids != torch.cat([batch.sample_ids for batch in loader.epoch(1)]).tolist()
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_validation_gives_the_center_frames(dataset: Dataset, decoder: str) -> None:
    square = AugmentConfig(size=64, resize=64)  # of 96 x 64: the middle columns
    loader = open_loader(dataset, "val", decoder=decoder, augment=square, micro_batch=4)
    assert loader.batches_per_epoch == 3
    batches = list(loader.epoch(0))
    assert [len(batch.labels) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(11))
    for batch in batches:
        samples = loader.samples(0, batches.index(batch))
        for sample, clip in zip(samples, batch.clips, strict=True):
            expected = read_frames(sample)[:, :, 16:80]
            assert np.abs(clip.numpy().astype(int) - expected).mean() < 1.0
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("antialias", [True, False])
def test_pixels_equal_the_reference(
    make_dataset: MakeDataset, decoder: str, antialias: bool
) -> None:
    dataset = make_dataset(sorted(HMDB.glob("*.webm")))
    augment = AugmentConfig(size=56, resize=64, antialias=antialias)
    for split in ("train", "val"):
        loader = open_loader(
            dataset, split, decoder=decoder, augment=augment, micro_batch=4, global_batch=4
        )
        (batch,) = loader.epoch(5)
        for sample, clip in zip(loader.samples(5, 0), batch.clips, strict=True):
            (expected,) = apply_views(
                read_frames(sample), sample.views, size=56, antialias=antialias
            )
            difference = np.abs(clip.numpy().astype(int) - expected)
            # DALI converts colors with another rounding than FFmpeg's RGB output; when it shrinks,
            # pixels at the border differ from torch's (and PIL's) by a few levels.
            assert difference.mean() < {"dali": 2.0, "pyav": 0.5, "torch": 1e-9}[decoder]
            assert decoder != "pyav" or np.quantile(difference, 0.99) <= 2
        loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_crop_window_and_flip_are_exact(
    make_video: MakeVideo, make_dataset: MakeDataset, decoder: str
) -> None:
    paths = [make_video(f"{k}.webm", num_frames=8, video=0xAA) for k in range(4)]
    augment = AugmentConfig(size=48, scales=(0.75,), flip=True)  # 48 of 64 px: cut, never scaled
    loader = open_loader(make_dataset(paths), decoder=decoder, augment=augment, micro_batch=4)
    seen = set()
    for epoch in range(6):
        (batch,) = loader.epoch(epoch)
        for sample, clip in zip(loader.samples(epoch, 0), batch.clips, strict=True):
            x0, y0, width, height = sample.views[0].window
            assert (width, height) == (48, 48)
            expected = read_frames(sample)[:, y0 : y0 + 48, x0 : x0 + 48]
            expected = expected[:, :, ::-1] if sample.views[0].flip else expected
            assert np.abs(clip.numpy().astype(int) - expected).max() <= 4
            seen.add((x0, y0, sample.views[0].flip))
    assert len(seen) > 8
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_resume_gives_the_same_batches(dataset: Dataset, decoder: str) -> None:
    whole = list(open_loader(dataset, decoder=decoder).epoch(2))
    loader = open_loader(dataset, decoder=decoder, prefetch=1)
    for start in (1, 3, 0, 4, 2):
        rest = list(loader.epoch(2, start=start))
        assert len(rest) == 4 - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))
    for bad in (-1, 5):
        with pytest.raises(ValueError, match="start"):
            loader.epoch(2, start=bad)
    loader.close()


def test_steps_do_not_depend_on_the_number_of_ranks(dataset: Dataset) -> None:
    def steps(world_size: int, micro_batch: int) -> list[dict[int, tuple[int, ...]]]:
        """Per optimizer step: sample id -> frames, window, flip and label."""
        loaders = [
            open_loader(
                dataset, rank=rank, world_size=world_size, micro_batch=micro_batch, decoder="torch"
            )
            for rank in range(world_size)
        ]
        per_step = loaders[0].batches_per_epoch // loaders[0].steps_per_epoch
        result: list[dict[int, tuple[int, ...]]] = [{} for _ in range(loaders[0].steps_per_epoch)]
        for loader in loaders:
            for index in range(loader.batches_per_epoch):
                for sample in loader.samples(1, index):
                    (view,) = sample.views
                    facts = (*sample.frame_indices.tolist(), *view.window, view.flip)
                    assert sample.sample_id not in result[index // per_step]
                    result[index // per_step][sample.sample_id] = (*facts, sample.label)
        return result

    expected = steps(1, 4)
    assert [len(step) for step in expected] == [4, 4]
    assert steps(1, 2) == steps(2, 2) == steps(4, 1) == steps(2, 1) == expected


def test_validation_is_complete_over_ranks(dataset: Dataset) -> None:
    for world_size in (2, 3, 12):
        loaders = [
            open_loader(dataset, "val", rank=rank, world_size=world_size, decoder="torch")
            for rank in range(world_size)
        ]
        ids = [
            k for loader in loaders for batch in loader.epoch(0) for k in batch.sample_ids.tolist()
        ]
        assert sorted(ids) == list(range(11))


def test_validation_batches_are_the_same_for_any_number_of_ranks(dataset: Dataset) -> None:
    def batches(world_size: int) -> set[tuple[int, ...]]:
        loaders = [
            open_loader(dataset, "val", rank=rank, world_size=world_size, decoder="torch")
            for rank in range(world_size)
        ]
        return {
            tuple(sample.sample_id for sample in loader.samples(0, index))
            for loader in loaders
            for index in range(loader.batches_per_epoch)
        }

    assert batches(1) == batches(2) == batches(3) == batches(7)


def test_flip_exchanges_labels(dataset: Dataset) -> None:
    augment = AugmentConfig(size=32, resize=32, flip_label_pairs=("0-2",))
    loader = open_loader(dataset, augment=augment, decoder="torch")
    swapped = {0: 2, 2: 0, 1: 1}
    samples = [s for epoch in range(3) for k in range(4) for s in loader.samples(epoch, k)]
    for sample in samples:
        label = sample.sample_id % 3
        assert sample.label == (swapped[label] if sample.views[0].flip else label)
    assert {sample.views[0].flip for sample in samples} == {False, True}
    with pytest.raises(ValueError, match="below the number of classes"):
        open_loader(dataset, augment=AugmentConfig(flip_label_pairs=("0-3",)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_short_videos(make_video: MakeVideo, make_dataset: MakeDataset, decoder: str) -> None:
    paths = [make_video(f"{k}.webm", num_frames=3 + 5 * (k % 2)) for k in range(4)]
    dataset = make_dataset(paths)
    with pytest.raises(DataError, match=r"2 of 4 videos have fewer frames .* = 4: .*0\.webm \(3\)"):
        open_loader(dataset, decoder=decoder)
    first_frame = SamplingConfig(num_segments=4, short_videos="first_frame")
    for split in ("train", "val"):
        loader = open_loader(dataset, split, sampling=first_frame, decoder=decoder)
        for batch in loader.epoch(0):
            for sample_id, clip in zip(batch.sample_ids.tolist(), batch.clips, strict=True):
                still = all(torch.equal(clip[0], frame) for frame in clip)
                assert still == (sample_id % 2 == 0)
        loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("kind", "length"), [("neighbors", 5), ("snippets", 3)])
def test_frames_of_a_segment_adjoin(
    make_video: MakeVideo,
    make_dataset: MakeDataset,
    decoder: str,
    kind: str,
    length: int,
) -> None:
    paths = [make_video(f"{k}.webm", num_frames=6 + 5 * k, video=k) for k in range(4)]
    dataset = make_dataset(paths)
    for split in ("train", "val"):
        loader = open_loader(
            dataset,
            split,
            decoder=decoder,
            sampling=SamplingConfig(num_segments=4, kind=kind),
            augment=AugmentConfig(size=64, resize=64, crop="center", flip=False),
            micro_batch=4,
        )
        (batch,) = loader.epoch(1)
        assert batch.clips.shape == (4, 4 * length, 64, 64, 3)
        for sample, clip in zip(loader.samples(1, 0), batch.clips, strict=True):
            assert sample.frame_indices.shape == (4 * length,)
            columns = read_frames(sample)[:, :, 16:80]
            assert np.abs(clip.numpy().astype(int) - columns).mean() < 1.0
            steps = np.diff(sample.frame_indices.reshape(4, length), axis=1)
            assert steps.max() == 1 and steps.min() >= 0
        loader.close()


def test_videos_shorter_than_a_snippet(make_video: MakeVideo, make_dataset: MakeDataset) -> None:
    dataset = make_dataset([make_video(f"{k}.webm", num_frames=2 + k) for k in range(4)])
    sampling = SamplingConfig(num_segments=4, kind="snippets", short_videos="first_frame")
    with pytest.raises(DataError, match=r"1 of 4 videos have fewer frames than a snippet = 3"):
        open_loader(dataset, sampling=sampling)


def test_set_smaller_than_one_global_batch(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"11 videos, fewer than one global batch \(12\)"):
        open_loader(dataset, global_batch=12)
    with pytest.raises(ValueError, match=r"train\.global_batch: expected a multiple"):
        open_loader(dataset, global_batch=4, world_size=3)


@pytest.mark.needs_dali_video
def test_decoder_is_chosen_and_named(
    dataset: Dataset,
    make_video: MakeVideo,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h264 = make_dataset([make_video(f"{k}.mp4", codec="libx264") for k in range(4)])
    assert "h264" in open_loader(h264).description
    monkeypatch.setattr(decoders, "dali_installed", lambda: True)
    assert open_loader(dataset).description.startswith("DALI decodes")
    with pytest.raises(MediaError, match=r"0\.mp4: DALI does not decode h264 on the CPU"):
        open_loader(h264, decoder="dali")
    monkeypatch.setattr(decoders, "dali_installed", lambda: False)
    assert open_loader(dataset).description.startswith(
        "PyAV decodes, torch scales (DALI is not installed)"
    )
    with pytest.raises(ValueError, match=r"loader\.decoder: 'dali': DALI is not installed"):
        open_loader(dataset, decoder="dali")
    with pytest.raises(ValueError, match=r"'dali_gpu': DALI is not installed"):
        open_loader(dataset, decoder="dali_gpu")


def damage_payload(path: Path) -> None:
    """Overwrite the second half of the packets' bytes but keep size and container."""
    import av

    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    for packet in packets[len(packets) // 2 :]:
        content = content.replace(packet, bytes(len(packet)))
    path.write_bytes(content)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "fault", [damage_payload, Path.unlink, lambda path: path.write_bytes(b"x")]
)
def test_file_damaged_during_the_run_is_named(
    dataset: Dataset, decoder: str, fault: Callable[[Path], object]
) -> None:
    loader = open_loader(dataset, "val", decoder=decoder)
    good = list(loader.epoch(0))
    path = dataset.val[7].path
    content = path.read_bytes()
    fault(path)
    with pytest.raises(MediaError, match=r"7\.webm"):
        list(loader.epoch(0))
    path.write_bytes(content)
    assert all(same(a, b) for a, b in zip(loader.epoch(0), good, strict=True))
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_thread_is_left(dataset: Dataset, decoder: str) -> None:
    before = set(threading.enumerate())
    loader = open_loader(dataset, decoder=decoder, prefetch=1)
    for _ in range(3):
        for batch in loader.epoch(0):
            assert batch is not None
            break
    unused = loader.epoch(1)
    assert set(threading.enumerate()) - before
    assert len(list(loader.epoch(2))) == 4  # replaces the unused iterator
    assert list(unused) == []
    loader.close()
    assert len(list(loader.epoch(0))) == 4  # can be used again
    del loader  # without close()
    gc.collect()
    deadline = time.monotonic() + 5  # the pool's threads end on their own
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_hanging_decoder_is_an_error(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    loader = open_loader(dataset, "val", decoder="torch", timeout_s=0.3)
    monkeypatch.setattr("pipelines.fallback.read_frames", lambda sample, **_: released.wait(30))
    monkeypatch.setattr("pipelines.prefetch.JOIN_TIMEOUT_S", 0.1)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DataError, match=r"timeout_s = 0\.3 s; decoding samples 0 \(.*0\.webm\)"),
    ):
        list(loader.epoch(0))
    assert "does not end" in caplog.text
    released.set()
    monkeypatch.undo()
    assert len(list(loader.epoch(0))) == 6
    loader.close()
