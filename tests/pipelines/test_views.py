"""Several views of a video, and every way to cut and color a training clip, on both paths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import decoders
from pipelines.clips import ClipSampler
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig, TestViews
from pipelines.datasets import Dataset
from pipelines.fallback import apply_views, read_frames
from pipelines.geometry import View, resized_short_side
from pipelines.loader import Loader, build_loader
from pipelines.media import MediaInfo
from pipelines.sampling import segment_views
from pipelines.source import Sample, Steps

DECODERS = [
    pytest.param("dali", marks=pytest.mark.needs_dali_video),
    pytest.param("pyav", marks=pytest.mark.needs_dali),
    "torch",
]
HMDB = Path(__file__).parents[1] / "data" / "hmdb51"
Window = tuple[int, int, int, int]
MMACTION = {"convention": "mmaction", "antialias": False}


def open_loader(dataset: Dataset, split: str, decoder: str, **changes: Any) -> Loader:
    arguments = {
        "sampling": SamplingConfig(num_segments=4),
        "loader": LoaderConfig(threads=2, decoder="pyav" if decoder == "torch" else decoder),
        "seed": 3,
        "micro_batch": 2,
        "global_batch": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        if decoder == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(dataset, split=split, **{**arguments, **changes})


@pytest.fixture
def hmdb(make_dataset: Callable[..., Dataset]) -> Dataset:
    return make_dataset(sorted(HMDB.glob("*.webm")))


def compare(loader: Loader, epoch: int, size: int, antialias: bool, decoder: str) -> None:
    for index, batch in enumerate(loader.epoch(epoch)):
        samples = loader.samples(epoch, index)
        clips = batch.clips.unflatten(0, (len(samples), loader.num_views))
        assert batch.labels.shape == batch.sample_ids.shape == (len(samples),)
        for sample, views in zip(samples, clips.numpy(), strict=True):
            cut = apply_views(read_frames(sample), sample.views, size=size, antialias=antialias)
            expected = np.stack(cut).reshape(views.shape)  # crop-major, then clips
            difference = np.abs(views.astype(int) - expected)
            assert difference.mean() < {"dali": 2.0, "pyav": 0.5, "torch": 1e-9}[decoder]
            assert decoder != "pyav" or np.quantile(difference, 0.99) <= 2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("clips", "crops", "size", "augment"),
    [(2, 3, 64, {}), (3, 3, 64, MMACTION), (1, 10, 56, {}), (10, 1, 56, MMACTION)],
)
def test_views_of_a_video(
    hmdb: Dataset, decoder: str, clips: int, crops: Any, size: int, augment: dict[str, Any]
) -> None:
    settings = AugmentConfig(size=56, resize=64, **augment)
    views = TestViews(num_clips=clips, num_crops=crops, size=size)
    loader = open_loader(hmdb, "val", decoder, augment=settings, views=views)
    assert loader.num_views == clips * crops
    compare(loader, 0, size, settings.antialias, decoder)
    assert next(iter(loader.epoch(0))).clips.shape == (2 * clips * crops, 4, size, size, 3)
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("crop", ["multiscale", "random_resized"])
@pytest.mark.parametrize("train_resize", [0, 80])
def test_training_crops(hmdb: Dataset, decoder: str, crop: Any, train_resize: int) -> None:
    settings = AugmentConfig(size=56, resize=64, crop=crop, train_resize=train_resize, **MMACTION)
    loader = open_loader(hmdb, "train", decoder, augment=settings)
    compare(loader, 1, 56, False, decoder)
    loader.close()


def test_jitter_comes_with_the_batch_and_is_resumed(hmdb: Dataset) -> None:
    augment = AugmentConfig(size=32, resize=32, color_jitter="amsnet")
    sampling = SamplingConfig(num_segments=4, kind="neighbors", frames_per_segment=5)
    loader = open_loader(
        hmdb, "train", "torch", augment=augment, sampling=sampling, micro_batch=1, global_batch=1
    )
    whole = list(loader.epoch(4))
    assert all(batch.colors is not None for batch in whole)
    colors = torch.stack([batch.colors for batch in whole if batch.colors is not None])
    assert colors.shape == (len(whole), 20, 3, 4)
    assert len(torch.unique(colors.flatten(1), dim=0)) == len(whole)
    rest = list(loader.epoch(4, start=2))
    assert torch.equal(rest[0].colors, whole[2].colors) and torch.equal(
        rest[0].clips, whole[2].clips
    )
    validation = open_loader(hmdb, "val", "torch", augment=augment)
    assert next(iter(validation.epoch(0))).colors is None
    loader.close()
    validation.close()


@pytest.mark.parametrize(
    ("sampling", "length"),
    [
        ({"kind": "dense"}, 8),
        ({"kind": "clip", "frame_interval": 4}, 8),
        ({"kind": "segments", "short_videos": "spread"}, 8),
        ({"kind": "segments", "short_videos": "first_frame"}, 8),
        ({"kind": "neighbors", "short_videos": "first_frame"}, 40),
        ({"kind": "snippets", "short_videos": "first_frame"}, 24),
    ],
)
def test_every_kind_gives_clips_within_the_video(sampling: dict[str, Any], length: int) -> None:
    config = SamplingConfig(num_segments=8, **sampling)
    for num_frames in (3, 5, 8, 9, 10, 26, 63, 64, 65, 300):
        rng = np.random.default_rng(num_frames)
        for _ in range(20):
            clip = ClipSampler(config).train(num_frames, rng)
            assert clip.shape == (length,) and 0 <= clip.min() and clip.max() < num_frames
        for clips in (1, 3, 6):
            rows = ClipSampler(config, num_clips=clips, seed=1).test(num_frames, 7)
            assert rows.shape == (clips, length) and 0 <= rows.min() and rows.max() < num_frames
    again = ClipSampler(config, num_clips=6, seed=1).test(300, 7)
    assert np.array_equal(again, rows)


def test_two_clips_are_twice_or_shifted() -> None:
    for rule, expected in (
        ("twice", segment_views(40, 8, twice=True)),
        ("shifted", segment_views(40, 8, num_clips=2)),
    ):
        config = SamplingConfig(num_segments=8, two_clips=rule)  # type: ignore[arg-type]
        assert np.array_equal(ClipSampler(config, num_clips=2).test(40, 0), expected)


GOLDEN = Path(__file__).parents[1] / "golden" / "sampling"
RESIZES = [
    step
    for step in json.loads((GOLDEN / "transforms_pixels.json").read_text())["case"]["args"]["steps"]
    if step["op"] in ("resize_short", "crop_resize")
]


@pytest.mark.needs_dali
@pytest.mark.parametrize("step", RESIZES, ids=lambda step: step["array"])
def test_dali_scales_like_the_published_libraries(step: dict[str, Any]) -> None:
    from pipelines.dali_video import DaliVideo

    stored, params = np.load(GOLDEN / "transforms_pixels.npz"), step["params"]
    image, expected = stored[step["input"]], stored[step["array"]].astype(int)
    pil = params["backend"] == "pil_bilinear"
    height, width = image.shape[:2]
    whole = step["op"] == "resize_short"
    resized, window = (width, height), (0, 0, width, height)
    if whole:
        convention = "tsm" if pil else "mmaction"
        resized = resized_short_side(width, height, params["short"], convention)
        window = (0, 0, *resized)
    else:
        x0, y0, x1, y1 = params["box"]
        window = (x0, y0, x1 - x0, y1 - y0)

    def frames(sample: Sample, window: Window | None = None) -> np.ndarray:
        x, y, w, h = window or (0, 0, width, height)
        cut: np.ndarray = np.ascontiguousarray(image[None, y : y + h, x : x + w])
        return cut

    decoder = DaliVideo(
        max_samples=1,
        max_frames=1,
        threads=1,
        size=28,
        antialias=pil,
        read_frames=frames,
        steps=Steps(
            resize=whole, crop=not whole, scale=not whole, flip=False, repeat=False, num_views=1
        ),
    )
    info = MediaInfo.__new__(MediaInfo)  # not looked at: the frames are given
    view = View(resized, window, flip=False)
    sample = Sample(0, Path("x"), np.zeros(1, np.int64), (view,), 0, info)
    ((frame,),) = decoder.finish(decoder.submit([sample]))[0].numpy()[:, :1]
    difference = np.abs(frame.astype(int) - expected)
    decoder.close()
    assert difference[2:-2, 2:-2].max() <= 1 and difference.mean() < 0.3
    # DALI's filter takes the border pixel again beyond the border, PIL's ends there.
    assert difference.max() <= (8 if pil else 1)


def test_clips_without_a_rule_are_refused() -> None:
    config = SamplingConfig(kind="snippets", frames_per_segment=3)
    with pytest.raises(ValueError, match=r"expected 1, 3 or 6 .* got 2"):
        ClipSampler(config, num_clips=2)
