"""The sections reject impossible values by their full key."""

from pathlib import Path

import pytest

from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig, label_pairs


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (DataConfig, {"num_classes": -1}, "data.num_classes"),
        (DataConfig, {"val_fraction": 1.0}, "data.val_fraction"),
        (DataConfig, {"train_list": "a.txt"}, "data.val_list"),
        (DataConfig, {"val_list": "a.txt"}, "data.train_list"),
        (DataConfig, {"generate": "motion8", "root": "/x"}, "data.root"),
        (DataConfig, {"mean": (0.5, 0.5)}, "data.mean"),
        (DataConfig, {"mean": (0.5, 0.5, float("nan"))}, "data.mean"),
        (DataConfig, {"mean": (123.0, 117.0, 104.0)}, "data.mean"),
        (DataConfig, {"std": (0.2, 0.0, 0.2)}, "data.std"),
        (SamplingConfig, {"num_segments": 0}, "sampling.num_segments"),
        (SamplingConfig, {"frames_per_segment": -1}, "sampling.frames_per_segment"),
        (
            SamplingConfig,
            {"kind": "segments", "frames_per_segment": 5},
            "sampling.frames_per_segment",
        ),
        (
            SamplingConfig,
            {"kind": "neighbors", "frames_per_segment": 1},
            "sampling.frames_per_segment",
        ),
        (AugmentConfig, {"size": 4}, "augment.size"),
        (AugmentConfig, {"resize": 100}, "augment.resize"),
        (AugmentConfig, {"scales": ()}, "augment.scales"),
        (AugmentConfig, {"scales": (0.7, 1.0)}, "augment.scales"),
        (AugmentConfig, {"scales": (1.1,)}, "augment.scales"),
        (AugmentConfig, {"flip_label_pairs": ("3",)}, "augment.flip_label_pairs"),
        (AugmentConfig, {"flip_label_pairs": ("3-3",)}, "augment.flip_label_pairs"),
        (AugmentConfig, {"flip_label_pairs": ("1-2", "2-3")}, "augment.flip_label_pairs"),
        (LoaderConfig, {"threads": -1}, "loader.threads"),
        (LoaderConfig, {"prefetch": 0}, "loader.prefetch"),
        (LoaderConfig, {"timeout_s": float("inf")}, "loader.timeout_s"),
    ],
)
def test_bad_values_are_named(section: type, values: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.") + ": expected .* got "):
        section(**values)


def test_label_pairs() -> None:
    assert label_pairs(["86-87", "1-0"]) == {86: 87, 87: 86, 1: 0, 0: 1}


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("ACCEL_CACHE", raising=False)
    assert DataConfig().resolved_cache_dir() == Path("/xdg/accel")
    monkeypatch.setenv("ACCEL_CACHE", "/own")
    assert DataConfig().resolved_cache_dir() == Path("/own")
    assert DataConfig(cache_dir="/given").resolved_cache_dir() == Path("/given")


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert LoaderConfig().resolved_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert LoaderConfig().resolved_threads() == 2
    assert LoaderConfig(threads=5).resolved_threads() == 5


def test_sampling_takes_what_the_model_needs() -> None:
    needed = SamplingConfig(kind="neighbors", frames_per_segment=5)
    assert SamplingConfig().resolved("neighbors", 5) == needed
    assert needed.resolved("neighbors", 5) == needed
    with pytest.raises(ValueError, match=r"sampling\.kind: expected 'neighbors', which .* 'auto'"):
        SamplingConfig(kind="segments").resolved("neighbors", 5)
    with pytest.raises(ValueError, match=r"sampling\.frames_per_segment: expected 1, .* got 5"):
        SamplingConfig(frames_per_segment=5).resolved("segments", 1)
