"""Stop requests: signals set a flag, the loop acts on it at the next step boundary."""

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0}


class StopRequested(Exception):  # noqa: N818  (a request, not an error)
    """Raised at a boundary after a stop signal, once the state is saved."""

    def __init__(self, signum: int | None) -> None:
        """`signum` None: another rank received the signal."""
        received = signal.Signals(signum if signum is not None else signal.SIGTERM)
        super().__init__(f"stopped by {received.name}")
        self.exit_code = EXIT_CODES[received]


class StopSignals:
    """While active, SIGINT, SIGTERM and SIGUSR1 ask for a stop; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in EXIT_CODES:
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        previous = self._previous.get(signum)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(signum, frame)  # an embedding program's own handler still runs
