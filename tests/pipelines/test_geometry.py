"""Crop windows against the published code's values."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.geometry import (
    center_view,
    multiscale_offsets,
    multiscale_sizes,
    multiscale_view,
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
        view = center_view(case["w"], case["h"], size=224, resize=256)
        assert view.window == (0, 0, case["w"], case["h"])
        assert list(view.crop) == case["center224"][:2], case


@given(st.integers(16, 700), st.integers(16, 700), st.integers(8, 256), st.integers(0, 999))
def test_views_lie_inside_the_frame(width: int, height: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    view = multiscale_view(width, height, size=size, scales=SCALES, flip=False, rng=rng)
    x0, y0, w, h = view.window
    assert 0 <= x0 and 0 <= y0 and w >= 1 and h >= 1 and x0 + w <= width and y0 + h <= height
    assert view.scaled == (size, size) and view.crop == (0, 0)
    centered = center_view(width, height, size=size, resize=size + 32)
    assert 0 <= centered.crop[0] <= centered.scaled[0] - size
    assert 0 <= centered.crop[1] <= centered.scaled[1] - size
