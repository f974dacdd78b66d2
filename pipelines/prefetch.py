"""Decoding ahead: one thread, one bounded queue."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pipelines.errors import HangError
from pipelines.source import Sample

_LOG = logging.getLogger(__name__)
JOIN_TIMEOUT_S = 10.0  # longest wait for a thread that is to end


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch."""

    clips: torch.Tensor
    """[N * V, T * L, size, size, 3] uint8 RGB on the loader's device; the L frames of a segment
    adjoin, and so do the V views of a video: crop after crop, in each clip after clip (V = 1 in
    training). `clips.flatten(0, 1).permute(0, 3, 1, 2)` is a channels_last view."""

    labels: torch.Tensor
    """[N] int64 on the loader's device; after the label exchange of a flip."""

    sample_ids: torch.Tensor
    """[N] int64 on the CPU; indices into the records of the split."""

    colors: torch.Tensor | None = None
    """[N * V * T * L, 3, 4] float32 on the loader's device: the map of each frame's colors that the
    normalization has to include (`pipelines.color`); None = none."""

    missing: tuple[int, ...] = ()
    """Validation: ids of the videos of this batch that cannot be read; N does not count them. Every
    one is a wrong answer of the evaluation."""


class Prefetcher:
    """One epoch: a thread that decodes group after group into a bounded queue.

    Args:
        groups: decodes as it is advanced.
        length: of the queue.
        in_flight: what is being decoded at the moment, for the message of a timeout.
    """

    def __init__(
        self,
        groups: Iterator[list[Batch]],
        length: int,
        in_flight: Callable[[], list[Sample]],
    ) -> None:
        self._queue: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(length)
        self._stop = threading.Event()
        self._in_flight = in_flight
        self._thread = threading.Thread(
            target=self._produce, args=(groups,), name="accel-loader", daemon=True
        )
        self._thread.start()

    def _produce(self, groups: Iterator[list[Batch]]) -> None:
        try:
            for batches in groups:
                if not self._put(batches):
                    return
            self._put(None)
        except BaseException as error:  # re-raised by the consumer
            self._put(error)

    def _put(self, item: list[Batch] | BaseException | None) -> bool:
        """Wait for room; False = stopped."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next_group(self, timeout_s: float) -> list[Batch] | None:
        """The next batches, None at the end; raises what the thread raised, or HangError."""
        deadline = time.monotonic() + timeout_s
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=min(0.5, max(0.001, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise HangError(self._timeout_message(timeout_s)) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def _timeout_message(self, timeout_s: float) -> str:
        named = ", ".join(f"{sample.sample_id} ({sample.path})" for sample in self._in_flight())
        return (
            f"no batch within loader.timeout_s = {timeout_s:g} s; decoding samples {named}. "
            "Check the storage, or raise --loader.timeout_s."
        )

    def stop(self) -> bool:
        """End the thread; False = it hangs in the decoder, which must not be used again."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(timeout=JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                _LOG.warning("the decoding thread does not end; it is left behind")
        return not self._thread.is_alive()
