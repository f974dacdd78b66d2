"""Turns what a command raises into one sentence on stderr and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from accel.engine.distributed import first_to_say, tell_launcher
from accel.errors import AccelError
from pipelines.errors import DataError


def run_guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run `command(argv)`.

    Returns:
        Its exit code; that of an AccelError or DataError after printing its sentence (with the
        traceback under --verbose); 130 when interrupted; 1 after an unexpected error. Under
        torchrun, whose own traceback follows, the cause that this ends with is the sentence too.
    """
    try:
        return command(argv)
    except (AccelError, DataError) as error:
        if "--verbose" in argv:
            traceback.print_exc()
        if str(error):
            tell_launcher(f"error: {error}")
            if first_to_say(str(error)):
                print(f"error: {_rank()}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()
        tell_launcher(traceback.format_exc())
        print(
            f"error: {_rank()}this is a bug in accel; the traceback above shows where.",
            file=sys.stderr,
        )
        return 1


def _rank() -> str:
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
