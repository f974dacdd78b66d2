"""Frame indices against TAM's published values, and their invariants.

The tables of all systems are golden cases: tests/parity/families_sampling.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sampling import (
    neighbor_indices,
    neighbor_starts_center,
    neighbor_starts_train,
    segment_indices_center,
    segment_indices_train,
    segment_views,
    snippet_indices,
    snippet_starts_train,
    snippet_starts_views,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tam_sampling.json").read_text())


def test_center_matches_published_validation() -> None:
    for key, frame_numbers in GOLDEN["validation"].items():
        _, segments, frames = key.split("/")
        num_segments, num_frames = int(segments), int(frames)
        if num_frames != num_segments:  # there the one-clip test rule is used, below
            indices = segment_indices_center(num_frames, num_segments)
            assert (indices + 1).tolist() == frame_numbers, key


def test_center_matches_published_one_clip_test() -> None:
    for key, frame_numbers in GOLDEN["test"].items():
        _, segments, frames = key.split("/")
        if int(frames) >= int(segments):
            indices = segment_indices_center(int(frames), int(segments))
            assert (indices + 1).tolist() == frame_numbers, key


def test_train_covers_the_published_ranges() -> None:
    for key, limits in GOLDEN["train"].items():
        num_segments, num_frames = map(int, key.split("/"))
        rng = np.random.default_rng(0)
        draws = np.stack([segment_indices_train(num_frames, num_segments, rng) for _ in range(800)])
        assert (draws.min(0) + 1 >= limits["min"]).all() and (
            draws.max(0) + 1 <= limits["max"]
        ).all()
        if num_frames // num_segments <= 8:
            assert (draws.min(0) + 1).tolist() == limits["min"], key
            assert (draws.max(0) + 1).tolist() == limits["max"], key


@given(st.integers(1, 500), st.integers(1, 32), st.integers(0, 99))
def test_indices_are_frames_in_order(num_frames: int, num_segments: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for indices in (
        segment_indices_train(num_frames, num_segments, rng),
        segment_indices_center(num_frames, num_segments),
    ):
        assert indices.dtype == np.int64 and indices.shape == (num_segments,)
        assert indices.min() >= 0 and indices.max() < num_frames
        if num_frames >= num_segments:
            assert (np.diff(indices) > 0).all()
        else:
            assert (indices == 0).all()


def test_impossible_views_are_refused() -> None:
    with pytest.raises(ValueError, match="num_clips = 1 with twice, got 10"):
        segment_views(80, 8, num_clips=10, twice=True)
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        snippet_starts_views(2, 8)


@given(st.integers(3, 400), st.integers(1, 32), st.integers(2, 9), st.integers(0, 99))
def test_neighbors_and_snippets_stay_inside(
    num_frames: int, num_segments: int, length: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    options = {"frames_per_segment": length}
    starts = neighbor_starts_train(num_frames, num_segments, rng, **options)
    neighbors = [starts, neighbor_starts_center(num_frames, num_segments, **options)]
    snippets = [snippet_starts_train(num_frames, num_segments, rng, **options)]
    if num_frames >= length:
        snippets += list(snippet_starts_views(num_frames, num_segments, **options))
    clips = [neighbor_indices(row, num_frames, **options) for row in neighbors]
    clips += [snippet_indices(row, num_frames, **options) for row in snippets]
    for clip in clips:
        assert clip.dtype == np.int64 and clip.shape == (num_segments * length,)
        assert clip.min() >= 0 and clip.max() < num_frames
        steps = np.diff(clip.reshape(num_segments, length), axis=1)
        assert set(steps.ravel().tolist()) <= {0, 1}
