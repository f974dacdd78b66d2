"""A profile of a few steps in the middle of a run: capture, and how much work a step is."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from accel.engine.checkpoint import write_atomically
from accel.engine.journal import LogConfig

logger = logging.getLogger(__name__)

RECORDERS: dict[str, Literal["off", "nvtx", "torch"]] = {
    "none": "off",
    "nsys": "nvtx",
    "torch": "torch",
}


class OperandBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what unfused operators read and write: every operand once per operator.

    Views are free. An operator that reads its operand twice counts it once, and caches are not
    seen, so it is a number to compare implementations by, not a measurement of the memory bus.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (isinstance(func, torch._ops.OpOverload) and func.is_view):
            operands = torch.utils._pytree.tree_leaves((args, kwargs, result))
            # An in-place or out= operator returns the tensor it was given: read and written.
            self.total += sum(x.nbytes for x in operands if isinstance(x, Tensor))
        return result


class StepProfiler:
    """Captures the steps `log.profile_start` .. + `log.profile_steps` of this process's run.

    Into the folder go `facts.json` (what a step computes) and, for torch.profiler, `trace.json`;
    nsys writes its own report and is told when to start and stop (cudaProfilerStart and Stop).

    Args:
        config: says whether, when and with what.
        folder: of the files; created when needed.
        device: of the run.
        facts: called once for what the files say about the run besides.
    """

    def __init__(
        self,
        config: LogConfig,
        folder: Path,
        device: torch.device,
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        self._config = config
        self._folder = folder
        self._device = device
        self._facts = facts
        self._done = 0
        self._work: dict[str, int] = {}
        self._trace: Any = None
        self._capturing = False

    def check_window(self, steps: int) -> None:
        """Warn when the `steps` that this process will make end before the capture does."""
        start, wanted = self._config.profile_start, self._config.profile_steps
        if self._config.profile == "none" or steps >= start + wanted:
            return
        captured = max(0, steps - start)
        logger.warning(
            "log.profile %s captures %s, because %d steps are to be made; log.profile_start "
            "(%d) + log.profile_steps (%d) must not exceed that.",
            self._config.profile,
            f"only {captured} of {wanted} steps" if captured else "nothing",
            steps,
            start,
            wanted,
        )

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Surrounds each optimizer step."""
        if self._config.profile == "none":
            yield
            return
        if self._done == self._config.profile_start:
            self._start()
        counting = self._done == self._config.profile_start - 1
        with self._counted() if counting else contextlib.nullcontext():
            yield
        self._done += 1
        if self._done == self._config.profile_start + self._config.profile_steps:
            self.stop()

    def stop(self) -> None:
        """End a capture that is running and write its files."""
        if not self._capturing:
            return
        self._capturing = False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._trace is not None:
            self._trace.stop()
            self._trace.export_chrome_trace(str(self._folder / "trace.json"))
        elif self._device.type == "cuda":
            # The facts first: nsys may end this process as soon as the capture ends.
            self._write_facts()
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
            return
        self._write_facts()

    def _start(self) -> None:
        self._capturing = True
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._config.profile == "torch":
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
        elif self._device.type == "cuda":
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with FlopCounterMode(display=False) as flops, OperandBytes() as operands:
            yield
        self._work = {
            "flop_per_step": flops.get_total_flops(),
            "operand_bytes_per_step": operands.total,
        }

    def _write_facts(self) -> None:
        captured = self._done - self._config.profile_start
        # Compiled and replayed steps show no operators to count.
        work = {key: value for key, value in self._work.items() if value}
        facts = {**self._facts(), "captured_steps": captured, **work}
        write_atomically(self._folder / "facts.json", (json.dumps(facts, indent=1) + "\n").encode())
        logger.info(
            "profiled %d steps into %s; python profile/nsys_report.py %s shows them",
            captured,
            self._folder,
            self._folder,
        )
