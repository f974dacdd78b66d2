"""What a run writes down: metrics.jsonl, TensorBoard, and the live progress line."""

import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from accel.engine.checkpoint import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and recorded besides the journal."""

    progress_s: float = 10.0
    """Seconds between progress lines when stderr is not a terminal (on one: a live line), > 0."""
    tensorboard: bool = True
    """Write TensorBoard events when the package tensorboard is installed."""
    profile: Literal["none", "nsys", "torch"] = "none"
    """Capture some steps into the run folder's profile/: "torch" (torch.profiler), "nsys" (NVTX
    ranges, start and stop of a capture; profile/nsys_train.sh runs it) or "none"."""
    profile_start: int = 20
    """Steps of this process before the capture, >= 1."""
    profile_steps: int = 10
    """Steps captured, >= 1."""

    def __post_init__(self) -> None:
        for key in ("profile_start", "profile_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"log.{key}: must be >= 1, got {getattr(self, key)}.")
        if self.progress_s <= 0:
            raise ValueError(f"log.progress_s: must be > 0, got {self.progress_s}.")


class Journal:
    """`metrics.jsonl`: a line per optimizer step; the others have an `"event"`: "eval", "gpu" or
    "unusable"."""

    def __init__(self, path: Path, tensorboard: Path | None = None, *, purge_step: int = 0) -> None:
        self._file = open(path, "ab", buffering=0)
        self._unwritten: list[bytes] = []
        self._board = _summary_writer(tensorboard, purge_step) if tensorboard is not None else None

    def step(self, **values: Any) -> None:
        """Record one optimizer step (iteration, epoch, loss, lr, clips_per_s, data_wait, ...)."""
        self._write(values, prefix="train")

    def evaluation(self, **values: Any) -> None:
        """Record one evaluation; `iteration` is the number of steps done before it."""
        self._write({"event": "eval", **values}, prefix="val")

    def gpu(self, **values: Any) -> None:
        """Record means of what the GPU reported; `iteration` is the number of steps done."""
        self._write({"event": "gpu", **values}, prefix="gpu")

    def unusable(self, *, iteration: int, **video: Any) -> None:
        """Record a video that is left out from now on; `iteration` is the number of steps done."""
        self._write({"event": "unusable", "iteration": iteration, **video}, prefix="data")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, values: dict[str, Any], prefix: str) -> None:
        self._unwritten.append((json.dumps(values) + "\n").encode())
        self._write_lines()
        if self._board is not None:
            try:
                for name, value in values.items():
                    if isinstance(value, float) and math.isfinite(value):
                        self._board.add_scalar(f"{prefix}/{name}", value, values["iteration"])
            except OSError as error:
                logger.warning("TensorBoard events can no longer be written (%s).", error)
                self._board = None

    def _write_lines(self) -> None:
        """Write what waits; lines that a full disk refuses wait for the next call."""
        while self._unwritten:
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = self._file.write(self._unwritten[0])
                if written != len(self._unwritten[0]):
                    raise OSError("the line was cut short")
            except OSError as error:
                if len(self._unwritten) == 1:
                    logger.error("%s cannot be written (%s).", self._file.name, error)
                self._file.truncate(end)
                return
            self._unwritten.pop(0)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a journal; a last line cut by a crash is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def rewind_journal(path: Path, iteration: int, evaluated: int) -> None:
    """Drop the lines that a resumed run will write again; those of unusable videos stay.

    Args:
        iteration: optimizer steps done in the checkpoint.
        evaluated: steps done at the checkpoint's last evaluation, -1 if none.
    """
    kept = [
        row
        for row in read_journal(path)
        if row.get("event") == "unusable"
        or (
            row["iteration"] <= evaluated
            if row.get("event") == "eval"
            else row["iteration"] < iteration
        )
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class Progress:
    """One line on stderr: step, loss, clips/s, data-wait share, ETA."""

    def __init__(self, total: int, interval_s: float, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._interval_s = 0.2 if self._live else interval_s
        self._last = 0.0
        self._width = 0

    def show(
        self,
        *,
        done: int,
        epoch: int,
        loss: float,
        clips_per_s: float,
        data_wait: float,
        step_s: float,
    ) -> None:
        """Update the line, at most every interval.

        Args:
            done: optimizer steps done.
            epoch: 0-based.
            data_wait: share of the time spent waiting for input, 0..1.
            step_s: seconds per step, for the ETA.
        """
        now = time.monotonic()
        waiting = now - self._last < self._interval_s and done < self._total
        if waiting or self._interval_s == math.inf:
            return
        self._last = now
        eta = _duration((self._total - done) * step_s)
        text = (
            f"step {done}/{self._total}  epoch {epoch + 1}  loss {loss:.3f}  "
            f"{clips_per_s:.1f} clips/s  data wait {100 * data_wait:.0f} %  ETA {eta}"
        )
        try:
            self._print(text)
        except OSError:  # the reader of stderr went away
            self._interval_s = math.inf

    def _print(self, text: str) -> None:
        if not self._live:
            print(text, file=self._stream, flush=True)
            return
        columns = _columns(self._stream)
        print(
            "\r" + text[: columns - 1].ljust(min(self._width, columns - 1)),
            end="",
            file=self._stream,
        )
        self._stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """End the live line, so that other output starts on a line of its own."""
        if self._live and self._width:
            print(file=self._stream, flush=True)
            self._width = 0


def _columns(stream: TextIO) -> int:
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, 20)
    except (OSError, ValueError):
        return 80


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _summary_writer(folder: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
