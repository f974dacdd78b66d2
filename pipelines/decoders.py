"""Who decodes: what can decode a set of videos, and which of them is fastest here.

"auto" lets every decoder that can read the set read the same clips once the run starts, checks them
against each other, and keeps the fastest. The outcome is remembered beside the media index, so that
every rank decodes alike; a run that goes on from a checkpoint takes the decoder named there.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.cache import locked, replace_bytes
from pipelines.config import LoaderConfig
from pipelines.dali_video import video_operator
from pipelines.decode import DecodeCounts
from pipelines.decoder_settings import Decoder, DecoderSettings
from pipelines.errors import DataError, HangError, MediaError
from pipelines.harmful import note
from pipelines.in_flight import InFlight
from pipelines.source import Sample, SampleSource

_LOG = logging.getLogger(__name__)
_MEASURE_S = 2.0
"""Of turns of all decoders; the fastest one counts, as other work disturbs now one, now another."""
_FEWEST_VIDEOS = 64
"""Smaller sets are not measured: their epochs take less than a measurement is worth."""
_MOST_DIFFERENCE = 12.0
"""Mean difference of two decoders, grey levels, above which one of them returns other frames.
Rounding gives below 2, BT.601 instead of BT.709 below 10."""


@dataclass(frozen=True)
class DecoderPlan:
    """What is to be decoded, and how."""

    source: SampleSource
    antialias: bool
    threads: int
    max_samples: int
    device: torch.device
    dali: bool
    """Whether DALI is installed."""

    counts: DecodeCounts | None = None
    """Gets how PyAV read each clip."""

    in_flight: InFlight | None = None
    """Gets what is being decoded."""

    def settings(self, name: str) -> DecoderSettings:
        """Of the decoder `name`: "dali", "dali_gpu" or "pyav"."""
        source = self.source
        return DecoderSettings(
            name=name,
            dali=self.dali,
            size=source.size,
            antialias=self.antialias,
            threads=self.threads,
            max_samples=self.max_samples,
            max_frames=source.max_frames,
            images=source.infos.are_frames,
            device_id=(self.device.index or 0) if name == "dali_gpu" else None,
            steps=source.steps,
        )

    def build(self, name: str) -> Decoder:
        """The decoder `name`."""
        return self.settings(name).build(self.counts)

    def problems(self) -> dict[str, tuple[Path | None, str]]:
        """Decoders that cannot read the set: name -> (a file, reason)."""
        found: dict[str, tuple[Path | None, str]] = {}
        if not self.dali:
            found = dict.fromkeys(("dali", "dali_gpu"), (None, "DALI is not installed"))
        elif not self.source.infos.are_frames and video_operator() is None:
            lacking = (None, "this version of DALI does not decode video by frame index")
            found = dict.fromkeys(("dali", "dali_gpu"), lacking)
        for kind, index in self.source.infos.kinds:
            path = self.source.videos[index].path
            for name, problem in (
                ("dali", kind.dali_cpu_problem),
                ("dali_gpu", kind.dali_gpu_problem),
            ):
                if problem:
                    found.setdefault(name, (path, problem))
        if self.device.type != "cuda":
            found.setdefault("dali_gpu", (None, "there is no GPU"))
        return found


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported; does not import it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        return False


def choose_decoder(
    plan: DecoderPlan, config: LoaderConfig, cache: Path, trained_with: str = ""
) -> tuple[str, str]:
    """(name, one line that says who decodes and why).

    Args:
        plan: what a decoder would be built from.
        config: `decoder` forces one.
        cache: file that remembers measurements.
        trained_with: the decoder that is taken without a measurement if it can read the set.

    Raises:
        MediaError, ValueError: the forced decoder cannot read the set.
    """
    problems = plan.problems()
    colors = next((wrong for kind, _ in plan.source.infos.kinds if (wrong := kind.dali_colors)), "")
    folders = plan.source.infos.are_frames
    titles = {
        "dali": "DALI decodes on the CPU",
        "dali_gpu": f"{'nvJPEG' if folders else 'NVDEC'} decodes through DALI",
        "pyav": f"{'Pillow' if folders else 'PyAV'} decodes",
    }
    titles["pyav"] += f", {'DALI' if plan.dali else 'torch'} scales"

    def line(name: str, why: str = "") -> str:
        reasons = [why] * bool(why) + [colors] * bool(colors and name != "pyav")
        return titles[name] + (f" ({'; '.join(reasons)})" if reasons else "")

    if config.decoder != "auto":
        if config.decoder in problems:
            path, reason = problems[config.decoder]
            advice = "pass --loader.decoder=pyav or auto"
            if path is None:
                raise ValueError(f"loader.decoder: {config.decoder!r}: {reason}; {advice}.")
            raise MediaError(path, f"{reason}; {advice}.")
        return config.decoder, line(config.decoder, f"loader.decoder={config.decoder}")
    names = [name for name in ("dali", "dali_gpu", "pyav") if name not in problems]
    if trained_with in names:
        return trained_with, line(trained_with, "as the checkpoint says")
    if colors and "dali" in names:  # PyAV is about as fast; a GPU's decoder is another matter
        names.remove("dali")
        problems["dali"] = (None, colors)
    if names == ["pyav"]:
        return "pyav", line("pyav", problems["dali"][1])
    if len(plan.source) < _FEWEST_VIDEOS:
        return names[0], line(names[0])
    rates, failed = _measured(plan, names, cache, config.timeout_s)
    best = max(rates, key=lambda name: rates[name])
    facts = [f"{rates[best]:.0f} clips/s"]
    facts += [f"{name} {rate:.0f}" for name, rate in rates.items() if name != best]
    facts += [f"{name}: {reason}" for name, reason in failed.items()]
    return best, line(best, f"measured: {'; '.join(facts)}")


def _measured(
    plan: DecoderPlan, names: list[str], cache: Path, timeout_s: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Clips/s of each decoder, or why it is out; from the cache where nothing has changed."""
    facts = {
        "decoders": names,
        "threads": plan.threads,
        "size": plan.source.size,
        "frames": plan.source.max_frames,
        "device": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu",
        "versions": _versions(),
    }
    with locked(cache.with_suffix(".lock")):
        try:
            known = json.loads(cache.read_text(encoding="utf-8"))
            if known["facts"] == facts and set(known["rates"]) <= set(names) and known["rates"]:
                return known["rates"], known["failed"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        try:
            rates, failed = measure(plan, names, timeout_s)
        except BaseException:  # some video hangs, and somebody may have lost patience
            if plan.in_flight is not None:
                plan.in_flight.keep()
            raise
        note(plan.in_flight, plan.settings(names[0]), ())
        content = {"facts": facts, "rates": rates, "failed": failed}
        try:
            replace_bytes(cache, [json.dumps(content).encode()])
        except OSError as error:
            _LOG.warning("%s: the measurement cannot be kept (%s)", cache, error)
        return rates, failed


def _versions() -> dict[str, str]:
    names = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"] in ("av", "pillow")
        or str(distribution.metadata["Name"]).startswith("nvidia-dali")
    }
    return dict(sorted(names.items()))


def measure(
    plan: DecoderPlan, names: Sequence[str], timeout_s: float = 300.0
) -> tuple[dict[str, float], dict[str, str]]:
    """Clips/s of each decoder on the same samples, and the reasons of those that do not work.

    Each is built and warmed up by one group, whose clips must be those of "pyav". Then they take
    turns of three groups.
    """
    source = plan.source
    step = max(1, len(source) // (4 * plan.max_samples))
    spread = itertools.islice(itertools.count(0, step), 4 * len(source))
    good = (k % len(source) for k in spread if k % len(source) not in source.bad)
    count = min(plan.max_samples, len(source))
    picked = [source.sample(0, k) for k in itertools.islice(good, 4 * count)]
    groups = [picked[first : first + count] for first in range(0, len(picked), count)]
    rates: dict[str, float] = {}
    failed: dict[str, str] = {}
    working: dict[str, Decoder] = {}
    reference: torch.Tensor | None = None

    def read(name: str, decoder: Decoder, groups: Sequence[list[Sample]]) -> torch.Tensor:
        """The clips of the last group."""
        note(plan.in_flight, plan.settings(name), picked)
        submitted = [decoder.submit(group) for group in groups]
        waiting = wait(itertools.chain(*submitted), timeout_s).not_done
        if waiting:
            named = ", ".join(f"{sample.sample_id} ({sample.path})" for sample in picked)
            raise HangError(
                f"{len(waiting)} clips are not read within loader.timeout_s = {timeout_s:g} s, of "
                f"samples {named}. Check the storage; the same command looks at each alone."
            )
        clips = [decoder.finish(each) for each in submitted][-1]
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        return clips

    with contextlib.ExitStack() as stack:
        for name in sorted(names, key=lambda name: name != "pyav"):
            try:
                decoder = plan.build(name)
                stack.callback(decoder.close)
                clips = read(name, decoder, groups[:1]).cpu()
            except HangError:
                raise
            except (DataError, RuntimeError) as error:
                failed[name] = _reason(error)
                continue
            if reference is None:
                reference = clips
            difference = (clips.float() - reference.float()).abs().mean().item()
            if clips.shape != reference.shape or difference > _MOST_DIFFERENCE:
                failed[name] = f"its frames differ by {difference:.0f} levels"
            else:
                working[name] = decoder
        end = time.perf_counter() + _MEASURE_S
        while working and time.perf_counter() < end:
            for name, decoder in list(working.items()):
                start = time.perf_counter()
                try:
                    read(name, decoder, groups[1:])
                except HangError:
                    raise
                except (DataError, RuntimeError) as error:
                    failed[name] = _reason(error)
                    rates.pop(name, None)
                    del working[name]
                else:
                    rate = (len(picked) - count) / (time.perf_counter() - start)
                    rates[name] = max(rate, rates.get(name, 0.0))
    if not rates:  # the first batch will say what is wrong
        rates["pyav"] = 0.0
    return rates, failed


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[-120:]
