"""Crop windows against the published code's values."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.geometry import (
    evaluation_views,
    multiscale_offsets,
    multiscale_sizes,
    multiscale_view,
    random_resized_view,
    resized_short_side,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tam_sampling.json").read_text())
SCALES = (1.0, 0.875, 0.75, 0.66)


def test_multiscale_candidates_match_the_published_crop() -> None:
    for case in GOLDEN["multiscale"]:
        width, height = case["w"], case["h"]
        sizes = multiscale_sizes(width, height, 224, SCALES)
        assert [list(size) for size in sizes] == [size for size, _ in case["candidates"]]
        for size, offsets in case["candidates"]:
            assert [list(xy) for xy in multiscale_offsets(width, height, *size)] == offsets


def test_center_crop_matches_the_published_rounding() -> None:
    for case in GOLDEN["crops"]:
        assert list(resized_short_side(case["w"], case["h"], 256)) == case["resized"]
        (view,) = evaluation_views(case["w"], case["h"], size=224, resize=256)
        assert list(view.resized) == case["resized"]
        assert list(view.window[:2]) == case["center224"][:2], case


@given(st.integers(16, 700), st.integers(16, 700), st.integers(8, 256), st.integers(0, 999))
def test_views_lie_inside_the_frame(width: int, height: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    view = multiscale_view(width, height, size=size, scales=SCALES, flip=False, rng=rng)
    x0, y0, w, h = view.window
    assert 0 <= x0 and 0 <= y0 and w >= 1 and h >= 1 and x0 + w <= width and y0 + h <= height
    assert view.resized == (width, height)
    view = random_resized_view(width, height, flip=False, rng=rng)
    x0, y0, w, h = view.window
    assert 0 <= x0 and 0 <= y0 and w >= 1 and h >= 1 and x0 + w <= width and y0 + h <= height
    for crops in (1, 3, 10):
        views = evaluation_views(width, height, size=size, resize=size + 32, num_crops=crops)
        assert len(views) == crops
        for view in views:
            x0, y0, w, h = view.window
            assert w == h == size
            assert 0 <= x0 <= view.resized[0] - size and 0 <= y0 <= view.resized[1] - size


def test_random_resized_windows_have_the_published_areas_and_aspects() -> None:
    rng = np.random.default_rng(0)
    windows = np.array(
        [random_resized_view(320, 240, flip=False, rng=rng).window for _ in range(4000)]
    )
    area = windows[:, 2] * windows[:, 3] / (320 * 240)
    aspect = windows[:, 2] / windows[:, 3]
    assert 0.075 < area.min() < 0.1 and 0.98 < area.max() <= 1.001
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.36
    # Log-uniform: as many below 1 as above (windows that do not fit are mostly upright here).
    small = area < 0.5
    assert abs(np.log(aspect[small]).mean()) < 0.02
    assert windows[:, 0].min() == windows[:, 1].min() == 0
    assert (windows[:, 0] + windows[:, 2]).max() == 320


def test_a_window_that_never_fits_is_the_centered_square() -> None:
    rng = np.random.default_rng(0)
    view = random_resized_view(400, 8, flip=False, rng=rng, area=(0.9, 1.0))
    assert view.window == (196, 0, 8, 8)
