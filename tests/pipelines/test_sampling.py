"""Frame indices against the published code's values, and their invariants."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sampling import segment_indices_center, segment_indices_train

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
