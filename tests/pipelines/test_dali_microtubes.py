"""SSD's augmentation in a DALI graph against the same in NumPy."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.errors import MediaError
from pipelines.microtube_loader import MicrotubeLoader, MicrotubeView
from pipelines.microtubes import list_microtubes
from pipelines.moving_objects import generate_moving_objects
from pipelines.ssd_augment import SeededDraws, apply_view, draw_view
from pipelines.tube_data import open_tube_set

pytestmark = pytest.mark.needs_dali
SIZE = 64


def _image(seed):
    """A JPEG and what Pillow makes of it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    pixels = np.asarray(Image.open(file))[..., ::-1]
    return np.frombuffer(file.getvalue(), dtype=np.uint8), pixels


@pytest.fixture(scope="module")
def dali_views():
    from pipelines.dali_microtubes import DaliViews

    return DaliViews(max_images=8, size=SIZE, threads=1)


def _view(seed):
    boxes = np.float32([[[0.2, 0.2, 0.7, 0.8]] * 2])
    return draw_view(70, 90, boxes, np.array([1]), SeededDraws(seed))[0]


@pytest.mark.parametrize("first", range(0, 32, 8))
def test_random_views_are_the_same(dali_views, first) -> None:
    images = [_image(seed) for seed in range(first, first + 8)]
    views = [_view(seed) for seed in range(first, first + 8)]
    found = dali_views([encoded for encoded, _ in images], views)
    for own, (_, pixels), view in zip(found, images, views, strict=True):
        np.testing.assert_allclose(own, apply_view(pixels[None], view, size=SIZE)[0], atol=0.05)


def test_fewer_images_and_one_draw_for_all_of_them(dali_views) -> None:
    images, view = [_image(seed) for seed in range(3)], _view(5)
    found = dali_views([encoded for encoded, _ in images], [view] * 3)
    stacked = np.stack([pixels for _, pixels in images])
    np.testing.assert_allclose(found, apply_view(stacked, view, size=SIZE), atol=0.05)


def test_the_cases_are_of_every_kind() -> None:
    views = [_view(seed) for seed in range(32)]
    assert (
        {view.mirror for view in views} == {view.contrast_first for view in views} == {True, False}
    )
    assert len({view.channels for view in views}) > 3
    assert any(view.offset != (0, 0) for view in views)
    assert any(view.window[:2] != (0, 0) for view in views)
    assert any(view.hue for view in views) and any(view.saturation != 1 for view in views)


def test_the_loaders_give_the_same_batches(tmp_path) -> None:
    root = generate_moving_objects(tmp_path, num_train=3, num_test=3)
    data = open_tube_set(root, "moving_objects")
    items, _ = list_microtubes(data.videos, dataset=data.rules, training=data.training)
    batches = {}
    for pixels in ("numpy", "dali"):
        view = MicrotubeView(streams=(("rgb", 3),), size=SIZE, pixels=pixels)
        loader = MicrotubeLoader(data, items, view, seed=1, micro_batch=3, global_batch=6)
        batches[pixels] = list(zip(range(4), loader.epoch(0), strict=False))
        loader.close()
    for (_, ours), (_, theirs) in zip(batches["dali"], batches["numpy"], strict=True):
        assert ours.streams[0].shape == (6, 9, SIZE, SIZE)
        torch.testing.assert_close(ours.streams[0], theirs.streams[0], atol=0.05, rtol=0)
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.labels, theirs.labels)
    damaged = data.folder("rgb", data.videos[items[0].video])
    for number in range(1, 25):
        (damaged / f"{number:05d}.jpg").write_bytes(b"no image")
    loader = MicrotubeLoader(data, items, view, seed=1, micro_batch=6, global_batch=6)
    with pytest.raises(MediaError, match=r"\.jpg: cannot be read as an image"):
        list(loader.epoch(0))
    loader.close()
    mirror = MicrotubeView(augmentation="mirror", pixels="dali")
    with pytest.raises(ValueError, match=r"detection\.pixels: dali needs"):
        MicrotubeLoader(data, items, mirror, seed=1, micro_batch=3, global_batch=6)
