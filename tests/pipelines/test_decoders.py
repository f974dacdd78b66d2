"""The choice of a decoder by measurement, remembered and checked."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import decoders
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decoders import DecoderPlan, measure
from pipelines.loader import Loader, build_loader
from pipelines.media import probe
from pipelines.source import Sample

MakeVideo = Callable[..., Path]
MakeDataset = Callable[[Sequence[Path]], Dataset]
pytestmark = pytest.mark.needs_dali_video


def open_loader(dataset: Dataset, decoder: str = "auto") -> Loader:
    return build_loader(
        dataset,
        split="val",
        sampling=SamplingConfig(num_segments=4),
        augment=AugmentConfig(size=32, resize=32),
        loader=LoaderConfig(decoder=decoder, threads=1),  # type: ignore[arg-type]
        seed=3,
        micro_batch=2,
        global_batch=2,
    )


@pytest.fixture
def dataset(make_video: MakeVideo, make_dataset: MakeDataset) -> Dataset:
    return make_dataset([make_video(f"{k}.webm", video=k) for k in range(6)])


def test_the_fastest_is_kept_and_remembered(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "measured" not in open_loader(dataset).description  # too small to matter
    monkeypatch.setattr(decoders, "_FEWEST_VIDEOS", 4)
    rates = {"pyav": 30.0, "dali": 40.0}
    calls = []

    def fake(
        plan: DecoderPlan, names: list[str], timeout_s: float
    ) -> tuple[dict[str, float], dict[str, str]]:
        calls.append(names)
        return rates, {}

    monkeypatch.setattr(decoders, "measure", fake)
    first = open_loader(dataset)
    assert first.description == (
        "DALI decodes on the CPU (measured: 40 clips/s; pyav 30), 1 threads"
    )
    rates = {"pyav": 50.0, "dali": 40.0}
    assert open_loader(dataset).description == first.description and len(calls) == 1
    (cache,) = tmp_path.rglob("*.decoder.json")
    content = json.loads(cache.read_text())
    cache.write_text(json.dumps(content | {"facts": {"versions": "others"}}))
    assert "PyAV decodes, DALI scales (measured: 50" in open_loader(dataset).description
    cache.write_text("{")
    open_loader(dataset)
    assert calls == [["dali", "pyav"]] * 3
    assert "measured" not in open_loader(dataset, "dali").description
    assert len(calls) == 3


def test_every_decoder_is_measured_and_checked(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(dataset)
    monkeypatch.setattr(decoders, "_MEASURE_S", 0.1)
    rates, failed = measure(loader._plan, ["dali", "pyav"])
    assert rates.keys() == {"dali", "pyav"} and min(rates.values()) > 0 and not failed

    build = DecoderPlan.build

    class Wrong:
        def __init__(self, inner: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.inner, self.change, self.close = inner, change, inner.close

        def submit(self, samples: Sequence[Sample]) -> Any:
            return self.inner.submit(samples)

        def finish(self, submitted: Any) -> torch.Tensor:
            return self.change(self.inner.finish(submitted))

    def fail(clips: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no driver\nhere")

    for change, reason in ((lambda clips: clips.flip(2), "differ by"), (fail, "no driver here")):
        monkeypatch.setattr(
            DecoderPlan,
            "build",
            lambda plan, name, change=change: (
                Wrong(build(plan, name), change) if name == "dali" else build(plan, name)
            ),
        )
        rates, failed = measure(loader._plan, ["dali", "pyav"])
        assert rates.keys() == {"pyav"} and reason in failed["dali"]


def test_a_disturbed_turn_does_not_decide(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(dataset)
    # Start; may a turn begin, pyav, dali; may another one, pyav, dali; too late for a third.
    times = iter([0.0, 0.1, 0.2, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.8, 2.0])
    monkeypatch.setattr(decoders, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    rates, _ = measure(loader._plan, ["dali", "pyav"])
    assert rates["pyav"] == pytest.approx(2 * rates["dali"]) and list(times) == []


def test_decoders_that_cannot_read_the_set(
    dataset: Dataset, make_video: MakeVideo, make_dataset: MakeDataset
) -> None:
    with pytest.raises(ValueError, match=r"'dali_gpu': there is no GPU; pass --loader\.decoder"):
        open_loader(dataset, "dali_gpu")
    mixed = make_dataset([make_video("a.webm"), make_video("b.mp4", codec="libx264")])
    assert "(DALI does not decode h264 on the CPU)" in open_loader(mixed).description


@pytest.mark.needs_dali_video
def test_dali_is_not_chosen_for_colors_that_it_does_not_know(
    make_video: MakeVideo, make_dataset: MakeDataset
) -> None:
    """Its matrix is always that of BT.601: as fast as PyAV, but in other colors."""
    paths = [make_video(f"{k}.webm", options={"colorspace": "bt709"} if k else {}) for k in (0, 1)]
    assert [probe(path).kind.color_space for path in paths] == [2, 1]
    dataset = make_dataset(paths)
    wrong = "DALI shows BT.709 as if it were BT.601, which accel data prepare writes"
    assert f"PyAV decodes, DALI scales ({wrong})" in open_loader(dataset).description
    forced = open_loader(dataset, "dali").description
    assert f"DALI decodes on the CPU (loader.decoder=dali; {wrong})" in forced
    known = open_loader(make_dataset(paths[:1])).description
    assert "DALI decodes on the CPU, " in known


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_what_is_decoded_from_its_start_is_counted(
    make_video: MakeVideo, make_dataset: MakeDataset, decoder: str
) -> None:
    paths = [make_video(f"{k}.avi", codec="mpeg4", options={"bf": "1"}) for k in range(3)]
    paths += [make_video(f"{k}.ts", codec="libx264") for k in range(2)]
    paths += [make_video(f"{k}.webm") for k in range(2)]
    loader = open_loader(make_dataset(paths), decoder)
    reasons = {
        "mpeg4: packets alone do not give the same pixels": 3,
        "h264 in mpegts: packets are not found one by one": 2,
    }
    assert "; 5 of 7 videos are decoded from the start of their file (" in loader.description
    assert loader.decoded_whole == {"files": reasons, "clips": 0, "unexpected_clips": 0}
    for _ in range(2):
        list(loader.epoch(0))
    assert loader.decoded_whole == {"files": reasons, "clips": 10, "unexpected_clips": 0}
    good = open_loader(make_dataset(paths[-2:]), decoder)
    list(good.epoch(0))
    assert "from the start" not in good.description
    assert good.decoded_whole == {"files": {}, "clips": 0, "unexpected_clips": 0}


def test_what_dali_cannot_be_given_in_parts_is_counted(
    make_video: MakeVideo, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.media.can_hold", lambda *_: False)
    loader = open_loader(make_dataset([make_video(f"{k}.webm") for k in range(3)]), "dali")
    list(loader.epoch(0))
    (reason,) = loader.decoded_whole["files"]
    assert "open GOPs or irregular packets" in reason and loader.decoded_whole["clips"] == 3
