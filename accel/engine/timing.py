"""Named ranges for profilers, and the data-wait clock."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

RANGE_PREFIX = "accel::"
"""Before our ranges in traces of torch.profiler (in NVTX they have the domain accel)."""

_NOTHING = contextlib.nullcontext()


class Ranges:
    """Named ranges for nsys (NVTX, domain accel) or torch.profiler.

    When off, a shared null context, so that a range costs nothing.
    """

    def __init__(self, recorder: Literal["off", "nvtx", "torch"] = "off") -> None:
        self._recorder = recorder
        self._nvtx: Any = None
        self._open = threading.local()
        if recorder == "nvtx":
            import nvtx

            self._nvtx = nvtx

    @property
    def enabled(self) -> bool:
        """Whether anything is recorded."""
        return self._recorder != "off"

    def __call__(self, name: str) -> contextlib.AbstractContextManager[object]:
        """A context that a profile shows as `name`."""
        if self._recorder == "off":
            return _NOTHING
        context: contextlib.AbstractContextManager[object]
        if self._nvtx is not None:
            context = self._nvtx.annotate(name, domain="accel")
        else:
            context = torch.profiler.record_function(RANGE_PREFIX + name)
        return context

    def mark(self, parts: Iterable[tuple[str, nn.Module]]) -> None:
        """Show the forward pass of each module as a range; does nothing when off.

        A recomputed forward pass (activation checkpointing) shows up again, inside the backward.
        """
        if not self.enabled:
            return
        for name, module in parts:
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            # Recomputation leaves a module by an exception once it has what it needs.
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, name: str) -> None:
        context = self(name)
        context.__enter__()
        if not hasattr(self._open, "contexts"):
            self._open.contexts = []
        self._open.contexts.append(context)

    def _leave(self) -> None:
        self._open.contexts.pop().__exit__(None, None, None)


class Readback:
    """Brings a small tensor to the host without waiting for what was launched after it.

    Reading a tensor of the device at once would wait for everything in its stream, the step that
    was launched meanwhile included. The copy is launched here, right behind the tensor's own work.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._done: Any = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def values(self) -> list[float]:
        """The numbers; waits for the copy."""
        if self._done is not None:
            self._done.synchronize()
        return [float(value) for value in self._host.tolist()]


class Stopwatch:
    """Accumulates the time spent inside `with stopwatch.running():`, in seconds (monotonic)."""

    def __init__(self) -> None:
        self.total_s = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the body."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.total_s += time.perf_counter() - start
