"""Imports a command and runs it: this takes seconds, in which Ctrl-C and missing packages happen.

Nothing but the standard library is imported here before that.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence


def start(command: str, argv: Sequence[str]) -> int:
    """Run a command under `accel.cli.rendering.run_guarded`.

    Args:
        command: module of this package and its function, e.g. "train:main".
        argv: its arguments.

    Returns:
        The exit code; 130 when interrupted, 2 where a package is not installed.
    """
    module, _, function = command.partition(":")
    try:
        guarded = importlib.import_module("accel.cli.rendering").run_guarded
        main = getattr(importlib.import_module(f"accel.cli.{module}"), function)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "accel", "kernels", "pipelines"):
            raise
        if "--verbose" in argv:
            traceback.print_exc()
        print(
            f"error: {sys.executable} has no package {package!r}; activate the environment "
            "(. .venv/bin/activate), which make setup makes.",
            file=sys.stderr,
        )
        return 2
    code: int = guarded(main, argv)
    return code
