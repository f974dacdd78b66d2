"""A training step as CUDA graphs: recorded once on fixed memory, replayed by one launch."""

import contextlib
import dataclasses
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accel.errors import AccelError
from pipelines.loader import Batch

logger = logging.getLogger(__name__)

MicroStep = Callable[[Batch, bool, bool], None]
"""Work on one micro-batch; whether it is the first and the last one of its step."""

WARM_UP_STEPS = 3
# torch's notes on CUDA graphs: DDP times its first 10 iterations with events, which a capture
# forbids.
DISTRIBUTED_WARM_UP_STEPS = 11
# Before, an end of a capture that fails leaves the allocator waiting for it (pytorch #180395).
_ENDS_BROKEN_CAPTURES = "2.13"  # compared as versions


class Graphs(Protocol):
    """What records and replays; `DeviceGraphs`, or a stand-in of a test."""

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Where warm-up and capture happen, in order with the stream of the caller."""

    def watch(self) -> contextlib.AbstractContextManager[list[str]]:
        """Collects where this thread waits for the device, which no capture survives."""

    def new_pool(self) -> object:
        """Memory for graphs that are replayed in the order of their capture.

        One that all its graphs have left is gone: torch asserts when it is captured into again.
        """

    def capture(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Record what `work` launches without running it; the result replays it.

        Args:
            work: runs on the memory that it allocates in `pool`.
            pool: of `new_pool`.

        Raises:
            RuntimeError: something in `work` cannot be recorded.
            AccelError: so it is, and nothing on the device can be relied on after that.
        """


class DeviceGraphs:
    """Graphs of one GPU that share one stream for capture.

    Args:
        device: of the network; without an index the current one.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[str]]:
        """See `Graphs`."""
        found: list[str] = []
        thread, show = threading.get_ident(), warnings.showwarning

        def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                # The mode is that of the process: the loader's thread may wait.
                if threading.get_ident() == thread:
                    found.append(f"{Path(filename).name}:{lineno} waits for the device")
            elif "Synchronization debug mode" not in str(message):
                show(message, category, filename, lineno, *rest)

        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(mode)

    def new_pool(self) -> object:
        """See `Graphs`."""
        return torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """See `Graphs`."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def capture(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """See `Graphs`."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self._device.index]
        spare = generator.clone_state()
        cause: RuntimeError | None = None

        def recorded() -> None:
            nonlocal cause
            try:
                work()
            except RuntimeError as error:
                cause = error
                raise

        try:
            # The outer context gives the stream back when the inner one fails to end its capture.
            # The loader's thread allocates and copies meanwhile: that is not this thread's error.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(
                    graph,
                    pool=pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                recorded()
        except RuntimeError as error:
            # A capture that failed may leave its generator waiting for the end of it.
            generator.graphsafe_set_state(spare)
            if error is not cause and torch.__version__ < _ENDS_BROKEN_CAPTURES:
                raise AccelError(
                    "train.execution: the step cannot be captured as a CUDA graph "
                    f"({_one_line(cause or error)}), and torch {torch.__version__} cannot go on "
                    "after that; use eager."
                ) from error
            raise
        return graph.replay


class Replay:
    """Runs micro-steps eagerly a few times, then records each kind of them and replays it.

    The first, a middle and the last micro-batch of a step are different work, so they are different
    graphs: a first one sets the gradients, the others add to them, a last one updates. Inputs are
    copied into memory that stays; learning rates and the loss scale are tensors that stay. A step
    with a micro-batch of another shape runs eagerly.

    Args:
        work: launches the work of one micro-batch and neither waits nor reads host numbers that
            change.
        graphs: records and replays.
        parameters: whose gradients `work` accumulates.
        warm_up: steps that run eagerly first, >= 1.
        undo: called after a capture failed, to forget what `work` did on the host.
        fall_back: whether steps run eagerly where they cannot be captured; otherwise it is an
            error.
    """

    def __init__(
        self,
        work: MicroStep,
        graphs: Graphs,
        *,
        parameters: Iterable[nn.Parameter],
        warm_up: int,
        undo: Callable[[], None],
        fall_back: bool = True,
    ) -> None:
        self._work = work
        self._graphs = graphs
        self._pool = graphs.new_pool()
        self._parameters = list(parameters)
        self._warm_up = warm_up
        self._undo = undo
        self._fall_back = fall_back
        self._static: Batch | None = None
        self._replays: dict[tuple[bool, bool], Callable[[], None]] = {}
        self._gradients: list[Tensor | None] = []
        self._eager_step = False
        self.problem: str | None = None
        """Why steps are not replayed any more; None: they are."""

    def __call__(self, batch: Batch, first: bool, last: bool) -> None:
        """Run one micro-step.

        Raises:
            AccelError: the step cannot be captured, and there must be no fallback.
        """
        if first:
            self._eager_step = self.problem is not None
        if not self._eager_step and not self._take(batch):
            self._eager_step = True
            self._attach(first)
        if self._eager_step:
            self._work(batch, first, last)
            return
        assert self._static is not None
        if self._warm_up > 0:
            # The last step to warm up shows what a capture would stumble over, which is dear.
            watch = self._graphs.watch() if self._warm_up == 1 else contextlib.nullcontext([])
            with self._graphs.side_stream(), watch as waits:
                self._work(self._static, first, last)
            self._warm_up -= last
            if waits and self.problem is None:
                self._give_up(waits[0])
            return
        if (first, last) not in self._replays and not self._capture(first, last):
            self._work(batch, first, last)
            return
        self._replays[first, last]()

    def _take(self, batch: Batch) -> bool:
        """Copy a batch to where the graphs read it; False: it has another shape."""
        if self._static is None:
            copies: dict[str, Any] = {name: t.clone() for name, t in _inputs(batch).items()}
            self._static = dataclasses.replace(batch, **copies)
            return True
        mine, given = _inputs(self._static), _inputs(batch)
        if {k: _kind(v) for k, v in mine.items()} != {k: _kind(v) for k, v in given.items()}:
            return False
        for name, tensor in given.items():
            mine[name].copy_(tensor, non_blocking=True)
        return True

    def _capture(self, first: bool, last: bool) -> bool:
        self._attach(first)
        static = self._static
        assert static is not None
        try:
            replay = self._graphs.capture(lambda: self._work(static, first, last), self._pool)
        except RuntimeError as error:
            # What ends a broken capture complains about it and hides the cause.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            self._give_up(_one_line(cause))
            self._undo()
            self._attach(first)
            self._eager_step = True
            return False
        self._replays[first, last] = replay
        if not last:
            # The memory that the following graphs add to; a reference keeps it what it is.
            self._gradients = [parameter.grad for parameter in self._parameters]
        return True

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        if not self._fall_back:
            raise AccelError(
                f"train.execution: the step cannot be captured as a CUDA graph ({problem}), and "
                "with several processes all must replay; use eager."
            )
        logger.warning("steps run eagerly, a CUDA graph cannot be made: %s", problem)

    def _attach(self, first: bool) -> None:
        """Give the parameters the gradients that the graphs of this step have left so far."""
        if not first:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=False):
                parameter.grad = gradient


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch that a step reads on the device."""
    names = ("clips", "labels", "colors")
    found = {name: getattr(batch, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
