"""Errors that users see as one sentence, and the exit code each ends the process with."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class AccelError(Exception):
    """A problem the user can act on: printed as one message, without a traceback."""

    exit_code = 1


class ConfigError(AccelError):
    """A recipe, an option or a run folder that cannot be used."""

    exit_code = 2


class CheckpointError(AccelError):
    """A checkpoint file that cannot be read, verified or mapped.

    Args:
        path: the file.
        problem: what is wrong and what to do, starting in lower case.
    """

    exit_code = 2

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)
        self.problem = problem


class DivergedError(AccelError):
    """A non-finite loss or gradient in training, or scores of a network that are not finite.

    Args:
        message: one sentence.
        facts: of a training step, for a file that helps to find the cause; plain data.
    """

    exit_code = 4

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = facts


def is_full(error: OSError) -> bool:
    """Whether the disk, or what a user may take of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
