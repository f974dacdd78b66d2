"""How far long work has come, and how long it still takes, on stderr."""

import sys
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 60.0


def progress_bar(total: int, what: str, unit: str, *, show: bool = True) -> Any:
    """A bar where stderr is a terminal; elsewhere (batch jobs, log files) a line every minute.

    Args:
        total: steps.
        what: is done.
        unit: what one step is of.
        show: False = say nothing.

    Returns:
        a `tqdm`: `update()` after each step; a context that ends it.
    """
    options: dict[str, Any] = {"total": total, "desc": what, "unit": unit, "disable": not show}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n"
        options |= {"bar_format": line, "delay": _LOG_INTERVAL_S, "mininterval": _LOG_INTERVAL_S}
        options |= {"miniters": 1, "maxinterval": float("inf")}
    return tqdm(**options)
