"""Frame indices against the published code's values, and their invariants."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "tam_sampling.json").read_text())
PUBLISHED = json.loads((FOLDER / "published_sampling.json").read_text())


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


def published_test_cases(system: str) -> Iterator[tuple[dict[str, Any], int, Any]]:
    """(group, number of frames, stored frame numbers) of the deterministic samplers."""
    for group in PUBLISHED["test"][system]["groups"]:
        for num_frames in group["num_frames"]:
            stored = PUBLISHED["test"][system]["cases"][f"{group['key']}/{num_frames}"]
            yield group, num_frames, stored


def test_mas_views() -> None:
    for group, num_frames, stored in published_test_cases("mas"):
        segments = group["num_segments"]
        if group["phase"] == "val":
            if num_frames != segments:  # there every frame once, as in the test
                assert (segment_indices_center(num_frames, segments) + 1).tolist() == stored
        else:
            clips, twice = group["num_clips"], group["twice_sample"]
            views = segment_views(num_frames, segments, num_clips=clips, twice=twice)
            assert views.shape == (2 if twice else clips, segments)
            assert (views + 1).ravel().tolist() == stored, (group["key"], num_frames)
    with pytest.raises(ValueError, match="num_clips = 1 with twice, got 10"):
        segment_views(80, 8, num_clips=10, twice=True)


def test_neighbors_for_validation() -> None:
    for group, num_frames, stored in published_test_cases("msn_tdn"):
        starts = neighbor_starts_center(num_frames, group["num_segments"])
        assert (starts + 1).tolist() == stored["segments"], (group["key"], num_frames)
        assert (neighbor_indices(starts, num_frames) + 1).tolist() == stored["frames"]


def test_snippet_views() -> None:
    for group, num_frames, stored in published_test_cases("ams"):
        options = {"num_shifts": group["shift_val"], "twice": group["twice_sample"]}
        if num_frames in group["refused"]:
            with pytest.raises(ValueError, match=f"at least 3 frames, got {num_frames}"):
                snippet_starts_views(num_frames, group["num_segments"], **options)
            continue
        starts = snippet_starts_views(num_frames, group["num_segments"], **options)
        frames = snippet_indices(starts, num_frames)
        assert (frames + 1).ravel().tolist() == stored, (group["key"], num_frames)


class LegacyGenerator:
    """Draws of numpy's old global generator behind the interface of the new one."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        return self._state.randint(low, high, size=size)


def _draw(system: str, num_frames: int, num_segments: int, rng: Any) -> np.ndarray:
    """What the stored draws hold: frames, or the starts for "msn_tdn"."""
    if system == "mas":
        return segment_indices_train(num_frames, num_segments, rng)
    if system == "msn_tdn":
        return neighbor_starts_train(num_frames, num_segments, rng)
    return snippet_indices(snippet_starts_train(num_frames, num_segments, rng), num_frames)


def test_training_draws_follow_the_published_samplers() -> None:
    for group in PUBLISHED["train"]["groups"]:
        system, segments = group["system"], group["num_segments"]
        for num_frames in group["num_frames"]:
            stored = PUBLISHED["train"]["cases"][f"{group['key']}/{num_frames}"]
            seeded = stored["seeded"]
            rng = LegacyGenerator(seeded["numpy_seed"])
            draw = _draw(system, num_frames, segments, rng) + 1
            assert draw.tolist() == seeded["draw"], (group["key"], num_frames)
            generator = np.random.default_rng(num_frames)
            draws = np.stack([_draw(system, num_frames, segments, generator) for _ in range(200)])
            assert (draws.min(0) + 1 >= stored["min"]).all(), (group["key"], num_frames)
            assert (draws.max(0) + 1 <= stored["max"]).all(), (group["key"], num_frames)


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
