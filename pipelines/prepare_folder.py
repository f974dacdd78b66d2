"""The folder that a set is prepared into: one process at a time, one encoding, one root."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.cache import file_lock, replace_bytes
from pipelines.errors import DataError, why

_SETTINGS = "prepared.json"
_LOCK = ".prepare.lock"


@contextlib.contextmanager
def claimed(out: Path, facts: Mapping[str, Any], root: Path) -> Iterator[None]:
    """Have the folder alone, for copies of one kind and of what is below one root.

    Args:
        out: the folder; what a killed run left unfinished in it is removed.
        facts: how copies are made; plain data.
        root: of the originals.

    Raises:
        DataError: it holds copies of another kind or root, another process has it, or it cannot be
            written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(out / _LOCK, wait=False))
            _claim(out, facts, root)
        except BlockingIOError as error:
            problem = "another accel data prepare is writing to it; wait, or use another folder."
            raise DataError(f"{out}: {problem}") from error
        except OSError as error:
            raise DataError(f"{out}: cannot be written: {why(error)}.") from error
        yield


def _claim(out: Path, facts: Mapping[str, Any], root: Path) -> None:
    settings = out / _SETTINGS
    source = str(root.resolve())
    if settings.exists():
        known = _settings(settings)
        other = known.pop("root", source)  # earlier versions did not note it
        if known != facts:
            raise DataError(
                f"{out}: holds copies with other settings ({_SETTINGS}); use another folder, or "
                "delete this one."
            )
        if other != source:
            raise DataError(
                f"{out}: holds copies of what is in {other}, not in {source}; use another folder "
                f'(if that set has moved, change its "root" in {_SETTINGS}).'
            )
    content = json.dumps({"root": source, **facts}, indent=1)
    replace_bytes(settings, [content.encode()])
    for left_over in out.rglob("*.part-*"):  # of a killed run
        left_over.unlink(missing_ok=True)


def _settings(path: Path) -> dict[str, Any]:
    """{} where it cannot be understood."""
    with contextlib.suppress(ValueError):
        known = json.loads(path.read_bytes())
        return known if isinstance(known, dict) else {}
    return {}
