"""NVTX ranges and the data-wait clock."""

import contextlib
import time
from collections.abc import Iterator

_NOTHING = contextlib.nullcontext()


class Ranges:
    """Named NVTX ranges for nsys; a shared null context when off, so that a range costs nothing."""

    def __init__(self, enabled: bool) -> None:
        self._nvtx = None
        if enabled:
            import nvtx

            self._nvtx = nvtx

    def __call__(self, name: str) -> contextlib.AbstractContextManager[object]:
        """A context that shows as `name` in the domain accel."""
        if self._nvtx is None:
            return _NOTHING
        annotation: contextlib.AbstractContextManager[object] = self._nvtx.annotate(
            name, domain="accel"
        )
        return annotation


class Stopwatch:
    """Accumulates the time spent inside `with stopwatch.running():`, in seconds (monotonic)."""

    def __init__(self) -> None:
        self.total_s = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the body."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.total_s += time.perf_counter() - start
