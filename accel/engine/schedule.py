"""Learning-rate factors as pure functions of the iteration: nothing to store but the counter."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the training and the course of the learning rate."""

    epochs: int = 50
    """Passes over the training set, >= 1."""
    iterations: int = 0
    """constant, step: > 0: optimizer steps of the training instead of epochs; milestones are
    iterations then (AMTNet, ROAD)."""
    kind: Literal["constant", "step", "cosine", "onecycle"] = "step"
    """constant | step (x gamma at milestones) | cosine | onecycle (by iteration)."""
    per: Literal["epoch", "iteration"] = "epoch"
    """cosine and warm-up: how often the rate changes."""
    milestones: tuple[int, ...] = ()
    """step: epochs, or iterations (see there), 0-based and increasing, at whose start the rate is
    multiplied by gamma."""
    gamma: float = 0.1
    """step: factor at each milestone, in (0, 1]."""
    factors: tuple[float, ...] = ()
    """step: factor on optim.lr from each milestone on, in (0, 1]; empty = powers of gamma."""
    warmup_epochs: int = 0
    """Not onecycle: epochs w spent rising linearly to optim.lr, >= 0. Per epoch (TAM, MAS-Net): the
    factor of epoch e is (e + 1) / w, and the schedule is that of e afterwards. Per iteration (TDN,
    MSN): from start_factor, and cosine spans the epochs after it."""
    warmup_fraction: float = 0.3
    """onecycle: share of all iterations spent rising to optim.lr, in (0, 1)."""
    start_factor: float = 0.04
    """onecycle, warm-up per iteration: factor of the first iteration, in (0, 1]."""
    final_factor: float = 0.0001
    """onecycle: factor of the last iteration; cosine: factor at its end; in [0, 1]."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs: must be >= 1, got {self.epochs}.")
        if list(self.milestones) != sorted(set(self.milestones)) or any(
            m < 1 for m in self.milestones
        ):
            raise ValueError(
                f"schedule.milestones: must be increasing epochs >= 1, got {list(self.milestones)}."
            )
        if self.milestones and self.kind != "step":
            raise ValueError(
                f"schedule.milestones: only used by schedule.kind step, got kind {self.kind}."
            )
        if self.iterations < 0:
            raise ValueError(
                f"schedule.iterations: must be >= 0 (0 = epochs), got {self.iterations}."
            )
        if self.iterations and (self.kind not in ("constant", "step") or self.warmup_epochs):
            raise ValueError(
                "schedule.iterations: needs schedule.kind constant or step without warm-up, got "
                f"{self.kind} and schedule.warmup_epochs {self.warmup_epochs}."
            )
        unit = "iterations" if self.iterations else "epochs"
        if self.milestones and self.milestones[-1] >= getattr(self, unit):
            raise ValueError(
                f"schedule.milestones: must lie before schedule.{unit} = {getattr(self, unit)}, "
                f"got {self.milestones[-1]}."
            )
        if self.factors and len(self.factors) != len(self.milestones):
            raise ValueError(
                f"schedule.factors: must be empty or one per milestone ({len(self.milestones)}), "
                f"got {len(self.factors)}."
            )
        if not all(0 < factor <= 1 for factor in self.factors):
            raise ValueError(f"schedule.factors: must be in (0, 1], got {list(self.factors)}.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"schedule.gamma: must be in (0, 1], got {self.gamma}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs: must be in 0..{self.epochs - 1} (schedule.epochs - 1), "
                f"got {self.warmup_epochs}."
            )
        if self.warmup_epochs and self.kind == "onecycle":
            raise ValueError(
                "schedule.warmup_epochs: must be 0 with schedule.kind onecycle, whose rise is "
                f"schedule.warmup_fraction, got {self.warmup_epochs}."
            )
        if not 0 < self.warmup_fraction < 1:
            raise ValueError(
                f"schedule.warmup_fraction: must be in (0, 1), got {self.warmup_fraction}."
            )
        if not 0 < self.start_factor <= 1:
            raise ValueError(f"schedule.start_factor: must be in (0, 1], got {self.start_factor}.")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"schedule.final_factor: must be in [0, 1], got {self.final_factor}.")


def lr_factor(config: ScheduleConfig, iteration: int, steps_per_epoch: int) -> float:
    """Factor on `optim.lr` for one optimizer step.

    constant: 1. step: gamma ** (milestones passed), or the factor of the last one passed.
    cosine: half cosine from 1 down to final_factor, by epoch or iteration.
    onecycle: half cosine from start_factor up to 1 at warmup_fraction of all iterations, then half
    cosine down to final_factor at the last one.
    A warm-up of `warmup_epochs` comes first.

    Args:
        iteration: 0-based, global.
        steps_per_epoch: optimizer steps of an epoch, >= 1.
    """
    epoch = iteration // steps_per_epoch
    warmup = config.warmup_epochs * (steps_per_epoch if config.per == "iteration" else 1)
    if warmup and config.per == "iteration":
        if iteration <= warmup:
            return config.start_factor + (1.0 - config.start_factor) * iteration / warmup
    elif epoch < warmup:
        return (epoch + 1) / warmup
    if config.kind == "constant":
        return 1.0
    if config.kind == "step":
        now = iteration if config.iterations else epoch
        passed = sum(now >= milestone for milestone in config.milestones)
        if config.factors:
            return (1.0, *config.factors)[passed]
        return config.gamma**passed
    if config.kind == "cosine" and config.per == "epoch":
        # Parity: TAM, MAS-Net: the half cosine spans all epochs, those of the warm-up included.
        return _half_cosine(1.0, config.final_factor, epoch / config.epochs)
    if config.kind == "cosine":
        span = (config.epochs - config.warmup_epochs) * steps_per_epoch
        return _half_cosine(1.0, config.final_factor, (iteration - warmup) / span)
    last = max(config.epochs * steps_per_epoch - 1, 1)
    peak = config.warmup_fraction * last
    if iteration < peak:
        return _half_cosine(config.start_factor, 1.0, iteration / peak)
    return _half_cosine(1.0, config.final_factor, min((iteration - peak) / (last - peak), 1.0))


def _half_cosine(start: float, end: float, position: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * position))
