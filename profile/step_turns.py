"""Measured steps: the clock, and networks that take turns in processes of their own."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Times:
    """Times of one thing that was repeated, milliseconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of all threads of this process."""

    def summary(self) -> dict[str, float]:
        """Median, 10 % and 90 % quantiles and minimum of the wall times; the CPU times alike."""
        ordered = sorted(self.wall)
        last = len(ordered) - 1
        values = {
            "step_ms": statistics.median(ordered),
            "p10_ms": ordered[round(0.1 * last)],
            "p90_ms": ordered[round(0.9 * last)],
            "min_ms": ordered[0],
            "cpu_ms": statistics.median(self.cpu),
            "cpu_min_ms": min(self.cpu),
        }
        return {key: round(value, 4) for key, value in values.items()}


class Clock:
    """Measures calls: CUDA events on a GPU, the wall clock elsewhere; process time beside it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, times: Times, function: Callable[[], object], count: int = 1) -> None:
        """Add the time of one of `count` units of work that `function` does."""
        cpu = time.process_time()
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            wall = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            function()
            wall = (time.perf_counter() - begin) * 1e3
        times.wall.append(wall / count)
        times.cpu.append((time.process_time() - cpu) * 1e3 / count)


class NetworkProcess:
    """A network in a fresh process, which does a step when it is told to.

    Args:
        label: of the network.
        command: answers with a line of JSON when it is ready, and to each line it reads with one
            more: the step's milliseconds by the clock and of the processors, and other facts.
    """

    def __init__(self, label: str, command: list[str]) -> None:
        self.label = label
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()  # it is ready

    def step(self, times: Times) -> None:
        """Do a step and add its time."""
        wall, cpu, self.facts = self._ask("step")
        times.wall.append(wall)
        times.cpu.append(cpu)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: str) -> Any:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # of a process that has ended; reading says so
            print(request, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ChildProcessError(f"the process of {self.label} ended with exit status {code}.")
        return json.loads(line)
