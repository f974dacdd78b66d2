"""Reads step metrics one step late, writes them down, and refuses non-finite ones."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.engine.journal import Journal, Progress
from accel.engine.timing import Readback
from accel.errors import DivergedError

MAX_SKIPPED_IN_A_ROW = 20
MIN_LOSS_SCALE = 2.0**-10
_RECENT_STEPS = 50


class StepRecorder:
    """The journal and progress line of the optimizer steps of one process.

    A step's metrics stay on the device until the next step has been launched, so that reading them
    never leaves the device idle.
    """

    def __init__(
        self,
        journal: Journal | None,
        progress: Progress,
        scaler: torch.amp.GradScaler,
        *,
        clips_per_step: float,
        skip_nonfinite: int = 0,
        groups: Sequence[str] = (),
    ) -> None:
        self._journal = journal
        self._progress = progress
        self._scaler = scaler
        self._clips_per_step = clips_per_step
        self._most_skipped = MAX_SKIPPED_IN_A_ROW - 1 if scaler.is_enabled() else skip_nonfinite
        self._groups = groups
        self._pending: collections.deque[tuple[dict[str, Any], Readback]] = collections.deque()
        self.stop_asked = False
        """Whether any rank had a stop signal at the start of a step flushed so far."""
        self._skipped_in_a_row = 0
        self._step_s: list[float] = []
        self._wait_s: list[float] = []

    def add(self, facts: dict[str, Any], metrics: Tensor, *, step_s: float, wait_s: float) -> None:
        """Take the facts and the device-side metrics of a step, [4 + G] as `TrainStep` gives them.

        Args:
            facts: at least `iteration` and `epoch` (both 0-based) and `lr`.
            step_s: wall time of the step, seconds.
            wait_s: of it, time spent waiting for input, seconds.
        """
        facts = {
            **facts,
            "clips_per_s": self._clips_per_step / step_s,
            "data_wait": wait_s / step_s,
        }
        self._step_s.append(step_s)
        self._wait_s.append(wait_s)
        self._pending.append((facts, Readback(metrics)))

    def flush(self) -> None:
        """Write all steps added so far.

        Raises:
            DivergedError: too many steps in a row without a finite gradient (their updates were
                skipped), a loss that is not finite with gradients that are, or, in fp16, a loss
                that is not finite or a collapsed loss scale.
        """
        while self._pending:
            facts, metrics = self._pending.popleft()
            loss, norm, skipped, stops, *norms = metrics.values()
            self.stop_asked |= stops > 0
            self._check_finite(facts, loss, norm, bool(skipped), norms)
            if self._journal is None:
                continue
            self._journal.step(
                **facts, loss=_finite(loss), grad_norm=_finite(norm), skipped=bool(skipped)
            )
            recent = self._step_s[-_RECENT_STEPS:]
            total = sum(recent)
            self._progress.show(
                done=facts["iteration"] + 1,
                epoch=facts["epoch"],
                loss=loss,
                clips_per_s=self._clips_per_step * len(recent) / total,
                data_wait=sum(self._wait_s[-_RECENT_STEPS:]) / total,
                step_s=total / len(recent),
            )

    def _check_finite(
        self,
        facts: Mapping[str, Any],
        loss: float,
        norm: float,
        skipped: bool,
        norms: Sequence[float],
    ) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped and math.isfinite(loss):
            return
        in_fp16 = self._scaler.is_enabled()
        scale = self._scaler.get_scale()
        reason = f"loss {loss:g}, gradient norm {norm:g}"
        if skipped and (math.isfinite(loss) or not in_fp16):
            within = self._skipped_in_a_row <= self._most_skipped
            if within and (not in_fp16 or scale >= MIN_LOSS_SCALE):
                return
            if self._most_skipped:
                reason += f", {self._skipped_in_a_row} skipped steps in a row"
            if in_fp16:
                reason += f", loss scale {scale:g}"
        raise DivergedError(
            f"training diverged at iteration {facts['iteration']}: {reason}. The step was "
            f"{'not ' if skipped else ''}applied; lower optim.lr or check the data.",
            {
                **facts,
                "loss": str(loss),
                "gradient_norm": str(norm),
                "gradient_norms_of_groups": {
                    name: str(value) for name, value in zip(self._groups, norms, strict=False)
                },
                "skipped_in_a_row": self._skipped_in_a_row,
                "loss_scale": scale if in_fp16 else None,
            },
        )


def rates(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median clips/s of journal lines, and the share of their time spent waiting for input."""
    if not steps:
        return {"clips_per_s": 0.0, "data_wait": 0.0}
    durations = [1.0 / step["clips_per_s"] for step in steps]
    waits = [step["data_wait"] * time for step, time in zip(steps, durations, strict=True)]
    return {
        "clips_per_s": statistics.median(step["clips_per_s"] for step in steps),
        "data_wait": sum(waits) / sum(durations),
    }


def _finite(value: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
