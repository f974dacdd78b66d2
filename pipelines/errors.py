"""Errors of lists and media files: where, got, expected, what to do."""

from pathlib import Path


class DataError(Exception):
    """Data that cannot be used. `train.py` ends with exit code 3."""

    exit_code = 3


class AnnotationError(DataError):
    """A list file, or one line of it (1-based), that cannot be used."""

    def __init__(self, path: Path | str, problem: str, line: int | None = None) -> None:
        super().__init__(f"{path}:{line}: {problem}" if line is not None else f"{path}: {problem}")
        self.path = Path(path)
        self.line = line
        self.problem = problem


class MediaError(DataError):
    """A media file that cannot be decoded as asked."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)
        self.problem = problem
