"""Groups of samples, decoded although files are unreadable and decoders fail.

A sample that cannot be read twice goes into the quarantine, and the group is asked for again: the
source then names another one in its place. Where storage fails, it is given some seconds. A decoder
that fails as a whole is built anew and gets the same group again, so no batch is lost, none comes
twice, and their order stays.
"""

import errno
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.decode import read_frames
from pipelines.decoder_settings import Decoder
from pipelines.errors import DataError
from pipelines.quarantine import Quarantine
from pipelines.shards import find_media_damage
from pipelines.source import Sample

_LOG = logging.getLogger(__name__)
MAX_REBUILDS = 3
"""Failures of a group in a row, none of which takes out a sample, before the run ends."""
_PAUSE_S = 0.1  # before the second attempt at a file: network file systems have moments
_OUTAGE_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Before further attempts where the error is that of storage which may come back."""
_OUTAGES = frozenset((errno.EIO, errno.ESTALE, errno.ETIMEDOUT))


Pick = Callable[[], list[list[Sample]]]
"""Names the samples of a group, batch by batch; other ones once some are in the quarantine."""


@dataclass(eq=False)
class Submitted:
    """A group that is being read."""

    pick: Pick
    batches: list[list[Sample]]
    decoder: Decoder
    results: list[Future[Any]]

    @property
    def samples(self) -> list[Sample]:
        return [sample for batch in self.batches for sample in batch]


class GroupDecoder:
    """Decodes groups with a decoder that is built here, and built anew when it fails.

    Args:
        build: makes a decoder.
        quarantine: gets the samples that cannot be read.
        note: is told, before it begins, what is being read from now on.
    """

    def __init__(
        self,
        build: Callable[[], Decoder],
        quarantine: Quarantine,
        note: Callable[[list[Sample]], None],
    ) -> None:
        self._build = build
        self._quarantine = quarantine
        self._note = note
        self.unread: set[int] = set()
        """Ids of samples that could not be read, until somebody empties it."""
        self._decoder = build()
        self._submitted: list[Submitted] = []

    def submit(self, pick: Pick) -> Submitted:
        """Begin to read a group."""
        submitted = Submitted(pick, [], self._decoder, [])
        self._submitted.append(submitted)
        self._submit(submitted)
        return submitted

    def finish(self, submitted: Submitted) -> tuple[list[list[Sample]], torch.Tensor | None]:
        """The samples of a group that came, batch by batch, and their clips.

        Returns:
            The clips are [N, views, F, size, size, 3] uint8, N over all batches; None if N = 0.

        Raises:
            DataError: more samples are unreadable than tolerated, or the decoder failed more than
                `MAX_REBUILDS` times in a row for no reason that a sample would explain.
        """
        failures = 0
        while True:
            if submitted.decoder is not self._decoder:  # it was given up with the group before
                self._submit(submitted)
            samples = submitted.samples
            try:
                clips = self._clips(submitted) if samples else None
                self._submitted.remove(submitted)
                return submitted.batches, clips
            except (DataError, MemoryError):
                raise
            except Exception as error:
                reason = _one_line(error)
                unreadable, failed = self._examine(submitted, thorough=failures > 0)
            failures += 1
            if unreadable:
                self.unread.update(sample_id for sample_id, _ in unreadable)
                self._quarantine.add_all(unreadable)
                failures = 0
            elif failures > MAX_REBUILDS:
                named = ", ".join(f"{sample.sample_id} ({sample.path})" for sample in samples)
                raise DataError(
                    f"the decoder failed {failures} times in a row on the samples {named}, each "
                    f"of which can be read alone: {reason}"
                )
            if failed:
                _LOG.warning("the decoder failed and is built anew: %s", reason)
            self._submit(submitted)

    def in_flight(self) -> list[Sample]:
        """What is being read, or else decoded, at the moment."""
        groups = list(self._submitted)
        reading = [
            sample
            for group in groups
            for sample, result in zip(group.samples, list(group.results), strict=False)
            if not result.done()
        ]
        return reading or [sample for group in groups[:1] for sample in group.samples]

    def forget(self) -> None:
        """Give up what was submitted, at the end of an epoch that was left early."""
        for group in self._submitted:
            for result in group.results:
                result.cancel()
        self._submitted = []
        self._note([])

    def close(self) -> None:
        """Release the decoder."""
        self._decoder.close()

    def _submit(self, submitted: Submitted) -> None:
        submitted.batches = submitted.pick()
        submitted.decoder = self._decoder
        self._note([sample for group in self._submitted for sample in group.samples])
        submitted.results = self._decoder.submit(submitted.samples)

    def _clips(self, submitted: Submitted) -> torch.Tensor:
        for result in submitted.results:
            if error := result.exception():
                raise _ReadError() from error
        clips = self._decoder.finish(submitted.results)
        expected = (len(submitted.samples), len(submitted.samples[0].frame_indices))
        got = (clips.shape[0], clips.shape[2])
        if got != expected:
            raise RuntimeError(f"expected (clips, frames) = {expected}, got {got}")
        return clips

    def _examine(
        self, submitted: Submitted, *, thorough: bool
    ) -> tuple[list[tuple[int, str]], bool]:
        """(sample id, reason) of those that cannot be read, and whether the decoder was rebuilt."""
        pairs = list(zip(submitted.samples, submitted.results, strict=True))
        suspects = [sample for sample, result in pairs if result.exception()]
        if suspects:
            time.sleep(_PAUSE_S)
            found = _unreadable(suspects, _read)
            if not found and thorough:  # the decoder reads by a way of its own
                found = _unreadable(suspects, self._decode_alone)
            return found, False
        self._rebuild()
        found = _unreadable(submitted.samples, _probe_and_read)
        if not found and thorough:
            found = _unreadable(submitted.samples, self._decode_alone)
        return found, True

    def _decode_alone(self, sample: Sample) -> None:
        try:
            self._decoder.finish(self._decoder.submit([sample]))
        except Exception:
            self._rebuild()  # a pipeline of DALI is not valid after an error
            raise

    def _rebuild(self) -> None:
        self._decoder.close()
        self._decoder = self._build()


class _ReadError(Exception):
    """A sample of the group could not be read; its result says why."""


def _read(sample: Sample) -> None:
    """A second attempt at a sample, by the path that reads everything."""
    read_frames(sample)


def _probe_and_read(sample: Sample) -> None:
    find_media_damage(sample.path, sample.info)
    read_frames(sample)


def _unreadable(
    samples: Sequence[Sample], attempt: Callable[[Sample], None]
) -> list[tuple[int, str]]:
    failed = _failures(samples, attempt)
    for pause in _OUTAGE_PAUSES_S:
        waiting = [sample for sample, error in failed.values() if _is_outage(error)]
        if not waiting:
            break
        time.sleep(pause)
        failed = {k: pair for k, pair in failed.items() if not _is_outage(pair[1])}
        failed |= _failures(waiting, attempt)
    found = []
    for sample, error in failed.values():
        problem = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
        path = getattr(error, "path", sample.path)
        if path != sample.path:  # a frame of the folder
            problem = f"{path.name}: {problem}"
        found.append((sample.sample_id, problem))
    return found


def _is_outage(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _OUTAGES:
            return True
        error = error.__cause__
    return False


def _failures(
    samples: Sequence[Sample], attempt: Callable[[Sample], None]
) -> dict[int, tuple[Sample, Exception]]:
    """Sample id -> the sample, and why the attempt at it failed."""
    failed: dict[int, tuple[Sample, Exception]] = {}
    for sample in samples:
        try:
            attempt(sample)
        except MemoryError:
            raise
        except Exception as error:  # recorded in the quarantine
            failed[sample.sample_id] = (sample, error)
    return failed


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[-300:]
