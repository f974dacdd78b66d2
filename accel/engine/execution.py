"""How the operators of a step reach the device: one by one, as a CUDA graph, or compiled."""

import logging
from collections.abc import Callable, Mapping

import torch

from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.graphs import WARM_UP_STEPS, DeviceGraphs, Graphs
from accel.engine.rehearsal import Rehearsal
from accel.engine.step import Execution, TrainStep

logger = logging.getLogger(__name__)

WAYS: tuple[Execution, ...] = ("eager", "graph", "compile", "graph+compile")
WORTHWHILE = 0.95
"""Another way than "eager" is chosen when its step takes at most this share of the time."""


class Launcher:
    """Decides how the steps of a run are launched.

    Args:
        recipe: says what is wanted, `train.execution`.
        device: of the run.
        world: this process among all.
        accumulation: micro-batches per step.
    """

    def __init__(self, recipe: Recipe, device: torch.device, world: World, accumulation: int):
        self._wanted = recipe.train.execution
        self._obstacles = {way: obstacle(way, recipe, device, world, accumulation) for way in WAYS}
        self._device = device
        way: Execution = "graph" if self._wanted == "auto" else self._wanted
        graphs = "graph" in way and self._obstacles[way] is None
        self.graphs: Graphs | None = DeviceGraphs(device) if graphs else None

    def settle(
        self, step: TrainStep, rehearse: Callable[[], Rehearsal], stored: str | None
    ) -> None:
        """Choose, tell the step, and say in one line why it is not what was asked for.

        Args:
            step: of the run.
            rehearse: makes what tries and times steps; called when needed.
            stored: what the run that is continued did; "auto" does it again, for the same bits.
        """
        wanted = self._wanted
        if wanted == "auto":
            known = next((way for way in WAYS if way == stored), None)
            if known is None:
                known = self._measured(step, rehearse)
            wanted = known
        if reason := self._obstacles[wanted] or self._failure(step, rehearse, wanted):
            logger.warning("train.execution %s: steps run eagerly, because %s.", wanted, reason)
            wanted = "eager"
        step.launch(wanted, self.graphs)

    def _failure(
        self, step: TrainStep, rehearse: Callable[[], Rehearsal], way: Execution
    ) -> str | None:
        """Why a network cannot be compiled; graphs tell by themselves."""
        if "compile" not in way:
            return None
        step.launch("compile", None)
        rehearsal = rehearse()
        try:
            with rehearsal.untouched():
                rehearsal.run(1)
        except RuntimeError as error:
            return _one_line(error)
        return None

    def _measured(self, step: TrainStep, rehearse: Callable[[], Rehearsal]) -> Execution:
        times: dict[Execution, float] = {}
        problems: dict[Execution, str] = {}
        excluded = {
            way: self._obstacles[way] or not_worth_timing(way, self._device) for way in WAYS
        }
        ways = [way for way in WAYS if excluded[way] is None]
        if len(ways) > 1:
            compiling = " (compiling takes minutes)" if "compile" in ways else ""
            logger.info("train.execution auto: timing %s%s.", ", ".join(ways), compiling)
            rehearsal = rehearse()
            for way in ways:
                replay = step.launch(way, self.graphs)
                try:
                    times[way] = rehearsal.seconds_per_step(WARM_UP_STEPS + 2)
                except RuntimeError as error:
                    problems[way] = _one_line(error)
                if replay is not None and replay.problem is not None:  # it has fallen back
                    times.pop(way, None)
                    problems[way] = replay.problem
        problems |= {way: reason for way, reason in excluded.items() if reason is not None}
        chosen = fastest(times)
        logger.info("train.execution auto: %s", account(chosen, times, problems))
        return chosen


def obstacle(
    way: Execution, recipe: Recipe, device: torch.device, world: World, accumulation: int
) -> str | None:
    """Why the steps of a run cannot be launched in some way; None: nothing known."""
    if way == "eager":
        return None
    if recipe.detection.network != "none":
        return "a detector's steps run eagerly only"
    if recipe.log.profile != "none":
        return "log.profile marks the parts of a step, which are not to be seen otherwise"
    if "graph" in way and device.type != "cuda":
        return f"CUDA graphs need a GPU, this run is on {device.type}"
    if "graph" in way and recipe.optim.implementation == "apex":
        return "apex takes learning rates from the host"
    if world.size > 1:
        if recipe.train.execution == "auto":
            return "auto measures single processes only"
        if "compile" in way:
            return "compiled steps are for single processes"
        if accumulation > 1:
            return "several processes exchange gradients in the last of several micro-batches only"
    if "compile" in way and recipe.train.checkpoint_activations != "none":
        return "train.checkpoint_activations cannot be compiled"
    return None


def not_worth_timing(way: Execution, device: torch.device) -> str | None:
    """Why "auto" leaves out a way that would be possible; None: it is timed."""
    if "compile" in way and device.type == "cpu":
        return "compiling for a CPU takes minutes, so it must be asked for by name"
    return None


def fastest(times: Mapping[Execution, float]) -> Execution:
    """The way with the shortest step, "eager" unless the gain is worthwhile."""
    best: Execution = "eager"
    limit = times.get("eager", float("inf")) * WORTHWHILE
    for way, seconds in times.items():
        if way != "eager" and seconds <= limit:
            best, limit = way, seconds
    return best


def account(
    chosen: Execution, times: Mapping[Execution, float], problems: Mapping[Execution, str]
) -> str:
    """One line: the choice, the steps that were measured, and what could not be."""
    parts = [f"{way} {seconds * 1e3:.1f} ms" for way, seconds in times.items()]
    text: str = chosen
    if "eager" in times and chosen in times:
        text += f", {times['eager'] / times[chosen]:.2f} x the rate of eager"
    if parts:
        text += f" (measured: {', '.join(parts)})"
    reasons: dict[str, list[str]] = {}
    for way, reason in problems.items():
        reasons.setdefault(reason, []).append(way)
    return "; ".join([text, *(f"not {', '.join(ways)}: {r}" for r, ways in reasons.items())]) + "."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
