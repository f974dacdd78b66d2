"""Checkpoints that survive crashes: written atomically, verified before use, rotated by iteration.

A checkpoint is one file of plain data. `checkpoints/index.json` knows each file's size and sha256,
because neither torch nor the zip format notices every flipped bit.
"""

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from accel.errors import CheckpointError, is_full
from accel.models.weights import load_foreign

logger = logging.getLogger(__name__)
INDEX_NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save besides at the end and after a best evaluation. The best is always kept."""

    every_epochs: int = 1
    """Save after every so many epochs, >= 1."""
    every_steps: int = 0
    """Also save after every so many optimizer steps; 0 = no."""
    keep_last: int = 2
    """Newest checkpoints kept, >= 1."""

    def __post_init__(self) -> None:
        if self.every_epochs < 1:
            raise ValueError(f"checkpoint.every_epochs: must be >= 1, got {self.every_epochs}.")
        if self.every_steps < 0:
            raise ValueError(
                f"checkpoint.every_steps: must be >= 0 (0 = off), got {self.every_steps}."
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last: must be >= 1, got {self.keep_last}.")


@dataclass(frozen=True)
class Entry:
    """One line of the index."""

    name: str
    iteration: int
    bytes: int
    sha256: str
    val_top1: float | None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any moment leaves the old or the new content.

    Raises:
        OSError: nothing was replaced and no temporary file is left.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write names no file
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class CheckpointStore:
    """The folder `checkpoints/` of one run."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def prepare(self) -> None:
        """Create the folder, remove what a killed process left, prove that files can be written.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp-*"):
                leftover.unlink()
            probe = self.folder / ".write-probe"
            write_atomically(probe, b"ok")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                self.folder,
                f"checkpoints cannot be written here: {error.strerror}; "
                f"{'make room, or ' if is_full(error) else ''}choose another --out.",
            ) from error

    def entries(self) -> list[Entry]:
        """Known checkpoints whose files exist, by iteration.

        An index that cannot be read is rebuilt from the files' names, without checksums.
        """
        try:
            rows = json.loads((self.folder / INDEX_NAME).read_text(encoding="utf-8"))
            entries = [Entry(**row) for row in rows]
        except FileNotFoundError:
            entries = []
        except (ValueError, TypeError, OSError) as error:
            logger.warning(
                "%s is not readable (%s): using the files as they are.", INDEX_NAME, error
            )
            entries = []
        known = {entry.name for entry in entries}
        for path in self.folder.glob("step_*.pt"):
            digits = path.stem.removeprefix("step_")
            if path.name not in known and digits.isdigit():
                entries.append(Entry(path.name, int(digits), path.stat().st_size, "", None))
        existing = [entry for entry in entries if (self.folder / entry.name).is_file()]
        return sorted(existing, key=lambda entry: entry.iteration)

    def forget_after(self, iteration: int) -> None:
        """Set aside (as `*.stale`) the checkpoints beyond the one a run continues from.

        They belong to a future that will be computed again, or are damaged; left in place they
        would be taken for the newest ones.
        """
        entries = self.entries()
        for entry in entries:
            if entry.iteration > iteration:
                os.replace(self.folder / entry.name, self.folder / f"{entry.name}.stale")
        self._write_index([entry for entry in entries if entry.iteration <= iteration])

    def _write_index(self, entries: list[Entry]) -> None:
        rows = [asdict(entry) for entry in entries]
        write_atomically(self.folder / INDEX_NAME, json.dumps(rows, indent=1).encode())

    def best(self) -> Path | None:
        """File of the largest val_top1 (the earliest of equals), or None."""
        rated = [entry for entry in self.entries() if entry.val_top1 is not None]
        if not rated:
            return None
        best = max(rated, key=lambda entry: (entry.val_top1, -entry.iteration))
        return self.folder / best.name

    def save(self, state: Mapping[str, Any], iteration: int, val_top1: float | None) -> Path:
        """Write the checkpoint of `iteration`, record it, and remove what rotation no longer keeps.

        Raises:
            CheckpointError: disk full, folder gone, or a non-finite number in the state. Older
                checkpoints are untouched.
        """
        path = self.folder / f"step_{iteration:08d}.pt"
        bad = first_non_finite(state)
        if bad is not None:
            raise CheckpointError(path, f"not written: {bad} holds a non-finite number.")
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getvalue()
        entry = Entry(path.name, iteration, len(data), hashlib.sha256(data).hexdigest(), val_top1)
        entries = [e for e in self.entries() if e.name != path.name] + [entry]
        entries.sort(key=lambda e: e.iteration)
        keep = {e.name for e in entries[-self.keep_last :]}
        rated = [e for e in entries if e.val_top1 is not None]
        if rated:
            keep.add(max(rated, key=lambda e: (e.val_top1, -e.iteration)).name)
        try:
            write_atomically(path, data)
            self._write_index([e for e in entries if e.name in keep])
            for stale in entries:
                if stale.name not in keep:
                    (self.folder / stale.name).unlink(missing_ok=True)
        except OSError as error:
            older = [e for e in self.entries() if e.iteration < iteration]
            kept = "older checkpoints are intact" if older else "there is no older one"
            raise CheckpointError(
                path,
                f"could not be written: {error.strerror or error}; {kept}.",
            ) from error
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """A verified checkpoint of this run.

        Raises:
            CheckpointError: missing, truncated, damaged, or not a checkpoint of ours.
        """
        entry = next((e for e in self.entries() if (self.folder / e.name) == path), None)
        return load_verified(path, entry)

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that verifies; damaged newer ones are named in a warning.

        Raises:
            CheckpointError: there are checkpoints and none of them is usable.
        """
        entries = self.entries()
        for entry in reversed(entries):
            path = self.folder / entry.name
            try:
                return path, load_verified(path, entry)
            except CheckpointError as error:
                if entry is entries[0]:
                    raise CheckpointError(
                        path,
                        f"{error.problem} No other checkpoint here is usable; start again with "
                        "another --out.",
                    ) from error
                logger.warning("%s Trying the checkpoint before it.", error)
        return None


def load_verified(path: Path, entry: Entry | None = None) -> dict[str, Any]:
    """Read a checkpoint after checking size and sha256 (where the index knows them) and zip CRCs.

    Raises:
        CheckpointError: as `CheckpointStore.load`.
    """
    if entry is not None and entry.sha256:
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(
                path, f"has {size} bytes, {entry.bytes} were written: truncated or overwritten."
            )
        with open(path, "rb") as file:
            digest = (
                hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
            )
            if digest is None:  # Python 3.10
                digest = hashlib.sha256(file.read())
        if digest.hexdigest() != entry.sha256:
            raise CheckpointError(path, "its sha256 is not the recorded one: the file is damaged.")
    state = load_foreign(path)
    if not isinstance(state, dict) or state.get("format") != "accel-run-1":
        raise CheckpointError(
            path,
            "is not a checkpoint of a training run; published weights go to --model.pretrained.",
        )
    bad = first_non_finite(state)
    if bad is not None:
        raise CheckpointError(path, f"{bad} holds a non-finite number; use an earlier checkpoint.")
    return state


def first_non_finite(tree: object, name: str = "") -> str | None:
    """Path of the first floating tensor or number in nested dicts that is not finite, or None."""
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point() and not bool(torch.isfinite(tree).all()):
            return name
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            found = first_non_finite(value, f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
    elif isinstance(tree, float) and not math.isfinite(tree):
        return name
    return None
