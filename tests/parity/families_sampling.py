"""Frame numbers of every published sampler: tables of test clips, ranges and draws in training."""

from typing import Any

import numpy as np
from comparison import Family, Results
from goldens import Case, CaseError

from pipelines import sampling

TABLE_ARGS = frozenset("groups key_template start_index store system".split())
# System -> the kinds of sampling it has.
SYSTEMS = {
    "tam": ("segment", "uniform", "dense"),
    "mas": ("segment", "uniform", "dense"),
    "msn_tdn": ("segment",),
    "ams": ("segment", "snippet", "clip", "dense"),
    "mmaction2": ("segment", "clip", "dense"),
}


class LegacyGenerator:
    """Draws of numpy's old global generator behind the interface of the new one."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def integers(self, low: int, high: int, size: int | None = None) -> Any:
        return self._state.randint(low, high, size=size)


def view_frames(system: str, group: dict[str, Any], num_frames: int) -> Any:
    """0-based frames of all test clips of a video, in the form of the stored entry."""
    kind, segments, clips = (group[key] for key in ("sampling", "num_segments", "num_clips"))
    twice = group["twice_sample"]
    if kind == "dense":
        starts = sampling.dense_starts(
            num_frames,
            span=_dense_span(system, group),
            num_clips=clips,
            lower_middle=system == "mas",
        )
        return sampling.dense_indices(starts, num_frames, segments)
    if system in ("tam", "mas"):
        if group["phase"] == "val":
            return sampling.segment_indices_center(num_frames, segments, faithful=True)
        return sampling.segment_views(num_frames, segments, num_clips=clips, twice=twice)
    if system == "msn_tdn":
        starts = sampling.neighbor_starts_center(num_frames, segments)
        return {"segments": starts, "frames": sampling.neighbor_indices(starts, num_frames)}
    if kind == "snippet":
        starts = sampling.snippet_starts_views(
            num_frames, segments, num_shifts=group["shift_val"], twice=twice
        )
        return sampling.snippet_indices(starts, num_frames)
    length, interval = group["clip_len"], group["frame_interval"]
    if kind == "clip" and system == "mmaction2":
        span = (length - 1) * interval + 1
        starts = sampling.clip_starts_spread(num_frames, clips, span=span, twice=twice)
    else:
        count = segments if kind == "segment" else clips
        starts = sampling.clip_starts_views(num_frames, count, span=length * interval, twice=twice)
    return _clips(starts, num_frames, group)


def train_frames(group: dict[str, Any], num_frames: int, rng: Any) -> Any:
    """0-based frames (or starts, as the entry has them) of one training clip."""
    system, kind, segments = (group[key] for key in ("system", "sampling", "num_segments"))
    if kind == "dense":
        start = sampling.dense_start_train(num_frames, rng, span=_dense_span(system, group))
        return sampling.dense_indices(np.array(start), num_frames, segments)
    if system in ("tam", "mas"):
        return sampling.segment_indices_train(num_frames, segments, rng)
    if system == "msn_tdn":
        return sampling.neighbor_starts_train(num_frames, segments, rng)
    if kind == "snippet":
        starts = sampling.snippet_starts_train(num_frames, segments, rng)
        return sampling.snippet_indices(starts, num_frames)
    count = segments if kind == "segment" else group["num_clips"]
    span = group["clip_len"] * group["frame_interval"]
    return _clips(sampling.clip_starts_train(num_frames, count, rng, span=span), num_frames, group)


def _dense_span(system: str, group: dict[str, Any]) -> int:
    """Frames of the window: TAM's ends with the last step, the others' is 64 long."""
    segments: int = group["num_segments"]
    return segments * (64 // segments) if system == "tam" else 64


def _clips(starts: np.ndarray, num_frames: int, group: dict[str, Any]) -> np.ndarray:
    return sampling.clip_indices(
        starts,
        num_frames,
        clip_len=group["clip_len"],
        interval=group["frame_interval"],
        beyond=group["out_of_bound"],
    )


def _numbers(value: Any, start_index: int) -> Any:
    """Frame indices as the tables hold them: flat lists of numbers from `start_index`."""
    if isinstance(value, dict):
        return {key: _numbers(indices, start_index) for key, indices in value.items()}
    return (np.asarray(value) + start_index).ravel().tolist()


def _check_group(system: str, group: dict[str, Any]) -> None:
    """Refuse what no sampler here stands for."""
    expected = {"snippet": 3, "segment": 5 if group["value"] == "segments_and_frames" else 1}
    if (
        group["sampling"] not in SYSTEMS.get(system, ())
        or group["frames_per_segment"] != expected.get(group["sampling"], 1)
        or group["value"] not in ("frames", "segments_and_frames", "segment_starts")
    ):
        raise CaseError(f"group {group['key']!r} is not known for {system!r}")


def run_tables(case: Case) -> Results:
    """Deterministic samplers: every entry, exactly."""
    args, results, arrays = case.args, Results(), case.arrays()
    for group in args["groups"]:
        _check_group(args["system"], group)
        for num_frames in group["num_frames"]:
            name = args["key_template"].format(key=group["key"], num_frames=num_frames)
            if num_frames in group["refused"]:
                results.expect(name, _refused(args["system"], group, num_frames), True)
                continue
            frames = view_frames(args["system"], group, num_frames)
            numbers = _numbers(frames, args["start_index"])
            if args["store"] == "npz":
                results.compared.add(name)
                results.expect(name, numbers, arrays[name].ravel().tolist())
            else:
                results.expect(name, numbers, case.content["cases"][name])
    return results


def _refused(system: str, group: dict[str, Any], num_frames: int) -> bool:
    try:
        view_frames(system, group, num_frames)
    except ValueError:
        return True
    return False


def run_draws(case: Case) -> Results:
    """Random samplers, fed with numpy's old generator: a draw, then the range of many more."""
    args, results = case.args, Results()
    for group in args["groups"]:
        _check_group(group["system"], group)
        for num_frames in group["num_frames"]:
            name = args["key_template"].format(key=group["key"], num_frames=num_frames)
            stored = case.content["cases"][name]
            rng = LegacyGenerator(stored["seeded"]["numpy_seed"])
            first, *more = (
                _numbers(train_frames(group, num_frames, rng), args["start_index"])
                for _ in range(1 + args["draws"])
            )
            results.expect(f"{name}: draw", first, stored["seeded"]["draw"])
            draws = np.array(more)
            results.expect(f"{name}: min", draws.min(0).tolist(), stored["min"])
            results.expect(f"{name}: max", draws.max(0).tolist(), stored["max"])
            ascending = bool((np.diff(draws, axis=1) >= 0).all())
            results.expect(f"{name}: sorted", ascending, stored["always_sorted"])
            shifts = draws - draws[:, :1] - (draws[:1] - draws[:1, :1])
            results.expect(f"{name}: shift", not shifts.any(), stored["common_shift_only"])
    return results


FAMILIES = {
    "sampling.test_indices": Family(run_tables, TABLE_ARGS),
    "masnet.frame_indices": Family(run_tables, TABLE_ARGS),
    "amsnet.frame_indices": Family(run_tables, TABLE_ARGS),
    "sampling.train_indices": Family(
        run_draws, frozenset("draws groups key_template seed_rule start_index store".split())
    ),
}
