"""Turns what a command raises into one sentence on stderr and an exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from accel.engine.distributed import first_to_say, tell_launcher
from accel.errors import AccelError, is_full
from pipelines.errors import DataError


def run_guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run `command(argv)`.

    Returns:
        Its exit code; that of an AccelError or DataError after printing its sentence (with the
        traceback under --verbose), 2 after that of a full disk or of too many open files; 130 when
        interrupted; 1 after an unexpected error. Under torchrun, whose own traceback follows, the
        cause that this ends with is the sentence too.
    """
    try:
        return command(argv)
    except (AccelError, DataError) as error:
        return _say(str(error), argv, error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        remedy = _remedy(error) if isinstance(error, OSError) else None
        if isinstance(error, OSError) and remedy:
            where = f"{error.filename}: " if error.filename else ""
            return _say(f"{where}{error.strerror}; {remedy} and repeat the command.", argv, 2)
        traceback.print_exc()
        tell_launcher(traceback.format_exc())
        print(
            f"error: {_rank()}this is a bug in accel; the traceback above shows where.",
            file=sys.stderr,
        )
        return 1


def _remedy(error: OSError) -> str | None:
    """Of what the machine has run out of, which any call of the system may say."""
    if is_full(error):
        return "make room"
    if error.errno == errno.EMFILE:
        return "raise the limit of open files (ulimit -n)"
    return None


def _say(sentence: str, argv: Sequence[str], exit_code: int) -> int:
    """Print the sentence of the exception that is being handled; the exit code again."""
    if "--verbose" in argv:
        traceback.print_exc()
    if sentence:
        tell_launcher(f"error: {sentence}")
        if first_to_say(sentence):
            print(f"error: {_rank()}{sentence}", file=sys.stderr)
    return exit_code


def _rank() -> str:
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
