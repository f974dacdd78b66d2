"""Reads nsys's SQLite exports and torch.profiler's Chrome traces into one form. Times are in ns.

nsys schema: docs.nvidia.com/nsight-systems, "SQLite Export Schema Reference". Tables are created
only when there is something in them, so every table is optional here.
"""

import bisect
import gzip
import itertools
import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANGE_PREFIX = "accel::"  # of the ranges in traces of torch.profiler
DOMAIN = "accel"  # of the NVTX ranges
_PUSH_POP, _DOMAIN_CREATE = 59, 75  # NVTX_EVENTS.eventType
_WAITS = ("Synchronize", "cudaStreamWaitValue", "cuStreamWaitValue")


class TraceError(Exception):
    """A file that cannot be reported on; the text is one sentence."""


@dataclass(frozen=True)
class Span:
    """Something that a thread did from `start` to `end`."""

    name: str
    start: int
    end: int
    thread: int


@dataclass(frozen=True)
class Operation:
    """A kernel or copy on the GPU; in a trace without GPU an operator of the training thread."""

    name: str
    kind: str
    """kernel | copy | set | operator."""
    start: int
    end: int
    path: tuple[str, ...]
    """Names of the ranges around the launch, outermost first."""
    bytes: int = 0
    """Moved by a copy or set."""
    calls: int = 1
    """0 for the further pieces of an operator that others interrupt."""


@dataclass
class Trace:
    """A capture of some training steps."""

    source: str
    """nsys | torch.profiler."""
    device: str
    """Name of the GPU; "" when the trace has none."""
    ranges: list[Span]
    """Of all threads, by start."""
    operations: list[Operation]
    """Without those inside other operators, by start."""
    waits: list[Span] = field(default_factory=list)
    """Calls that wait for the GPU, of the training thread."""
    launches: int = 0
    """Calls that launch work on the GPU."""

    @property
    def steps(self) -> list[Span]:
        """The captured optimizer steps."""
        return [span for span in self.ranges if span.name == "step"]


class RangeTree:
    """Finds the ranges around a moment, per thread.

    Work launched by a thread that has no range of its own then (the backward pass has its own
    threads) counts for what the training thread is in.
    """

    def __init__(self, ranges: list[Span]) -> None:
        self._threads: dict[int, tuple[list[int], list[tuple[Span, int]]]] = {}
        by_thread = itertools.groupby(
            sorted(ranges, key=lambda r: (r.thread, r.start, -r.end)), key=lambda r: r.thread
        )
        for thread, spans in by_thread:
            nodes: list[tuple[Span, int]] = []  # span, index of its parent
            parent = -1
            for span in spans:
                while parent >= 0 and nodes[parent][0].end <= span.start:
                    parent = nodes[parent][1]
                nodes.append((span, parent))
                parent = len(nodes) - 1
            self._threads[thread] = ([span.start for span, _ in nodes], nodes)
        steps = [span.thread for span in ranges if span.name == "step"]
        self.main = steps[0] if steps else -1

    def path(self, moment: int, thread: int) -> tuple[str, ...]:
        """Names of the ranges around a moment of a thread, outermost first."""
        own = self._path(moment, thread)
        if thread == self.main or (own and own[0] == "step"):
            return own
        return self._path(moment, self.main) + own

    def _path(self, moment: int, thread: int) -> tuple[str, ...]:
        starts, nodes = self._threads.get(thread, ([], []))
        index = bisect.bisect_right(starts, moment) - 1
        names = []
        while index >= 0:
            span, parent = nodes[index]
            if span.end > moment:
                names.append(span.name)
            index = parent
        return tuple(reversed(names))


def read_trace(path: Path) -> Trace:
    """The trace in a .sqlite file of `nsys export`, or a .json or .json.gz of torch.profiler.

    Raises:
        TraceError: not such a file, or one without captured training steps.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(16)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}.") from error
    trace = _read_nsys(path) if magic.startswith(b"SQLite format 3") else _read_torch(path)
    if not trace.steps:
        raise TraceError(
            f"{path}: holds no range named step; capture it with --log.profile nsys or torch."
        )
    return trace


def _read_nsys(path: Path) -> Trace:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        return _Export(connection).trace()
    except sqlite3.Error as error:
        raise TraceError(f"{path}: not an export of nsys that we can read: {error}.") from error
    finally:
        connection.close()


class _Export:
    """One SQLite export."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        self._tables = {row[0] for row in tables}
        self._strings = {row["id"]: row["value"] for row in self._rows("StringIds")}

    def trace(self) -> Trace:
        ranges = self._ranges()
        tree = RangeTree(ranges)
        calls = {}  # correlation -> (start, thread) of the call that launched it
        waits, launches = [], 0
        for row in self._rows("CUPTI_ACTIVITY_KIND_RUNTIME"):
            calls[row["correlationId"]] = (row["start"], row["globalTid"])
            name = self._strings.get(row["nameId"], "")
            launches += "Launch" in name
            if row["globalTid"] == tree.main and any(text in name for text in _WAITS):
                waits.append(Span(name, row["start"], row["end"], row["globalTid"]))
        operations = []
        for table, kind in (
            ("CUPTI_ACTIVITY_KIND_KERNEL", "kernel"),
            ("CUPTI_ACTIVITY_KIND_MEMCPY", "copy"),
            ("CUPTI_ACTIVITY_KIND_MEMSET", "set"),
            ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "graph"),
        ):
            for row in self._rows(table):
                launched, thread = calls.get(row["correlationId"], (row["start"], tree.main))
                # A replayed graph shows either its nodes or, as here, one event.
                name = kind if kind != "kernel" else self._kernel_name(row)
                if kind == "copy":
                    name = self._copy_name(row["copyKind"])
                path = tree.path(launched, thread)
                size = row["bytes"] if kind in ("copy", "set") else 0
                operations.append(
                    Operation(name, kind, row["start"], row["end"], path, int(size or 0))
                )
        operations.sort(key=lambda operation: operation.start)
        gpu = next(iter(self._rows("TARGET_INFO_GPU")), None)
        device = gpu["name"] if gpu else "GPU" if operations else ""
        return Trace("nsys", device, ranges, operations, waits, launches)

    def _rows(self, table: str) -> list[sqlite3.Row]:
        if table not in self._tables:
            return []
        return self._connection.execute(f'SELECT * FROM "{table}"').fetchall()

    def _ranges(self) -> list[Span]:
        events = self._rows("NVTX_EVENTS")
        domains = {
            row["domainId"]
            for row in events
            if row["eventType"] == _DOMAIN_CREATE and self._text(row) == DOMAIN
        }
        spans = [
            Span(self._text(row), row["start"], row["end"], row["globalTid"])
            for row in events
            if row["eventType"] == _PUSH_POP
            and row["end"] is not None
            and row["domainId"] in domains
        ]
        return sorted(spans, key=lambda span: span.start)

    def _text(self, row: sqlite3.Row) -> str:
        # Registered strings (Python's nvtx registers all) are in StringIds.
        return str(row["text"] or self._strings.get(row["textId"], ""))

    def _kernel_name(self, row: sqlite3.Row) -> str:
        return str(self._strings.get(row["demangledName"], "kernel"))

    def _copy_name(self, kind: int) -> str:
        labels = {row["id"]: row["label"] for row in self._rows("ENUM_CUDA_MEMCPY_OPER")}
        known = {1: "Host-to-Device", 2: "Device-to-Host", 8: "Device-to-Device"}
        return f"copy {labels.get(kind) or known.get(kind, kind)}"


def _read_torch(path: Path) -> Trace:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            document = json.load(file)
        events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(
            f"{path}: neither an SQLite export of nsys nor a trace of torch.profiler."
        ) from error
    ranges = sorted(
        (
            _span(event, event["name"].removeprefix(RANGE_PREFIX))
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith(RANGE_PREFIX)
        ),
        key=lambda span: span.start,
    )
    tree = RangeTree(ranges)
    runtime = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    calls = {event["args"].get("correlation"): _span(event, event["name"]) for event in runtime}
    kinds = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "set"}
    operations = []
    for event in events:
        if kind := kinds.get(event.get("cat", "")):
            span, arguments = _span(event, event["name"]), event.get("args", {})
            call = calls.get(arguments.get("correlation"))
            launched = (call.start, call.thread) if call else (span.start, tree.main)
            size = int(arguments.get("bytes", 0) or 0)
            path_ = tree.path(*launched)
            operations.append(Operation(span.name, kind, span.start, span.end, path_, size))
    properties = document.get("deviceProperties") or [{}]
    device = str(properties[0].get("name", "GPU")) if operations else ""
    if not operations:
        operations = _host_operators(events, tree)
    operations.sort(key=lambda operation: operation.start)
    waits = [s for s in calls.values() if s.thread == tree.main and "Synchronize" in s.name]
    launches = sum("Launch" in event["name"] for event in runtime)
    return Trace("torch.profiler", device, ranges, operations, waits, launches)


def _host_operators(events: list[dict[str, Any]], tree: RangeTree) -> list[Operation]:
    """Operators of the training thread, each cut to the time that no inner operator takes."""
    spans = sorted(
        (
            _span(event, event["name"])
            for event in events
            if event.get("cat") == "cpu_op" and event["tid"] == tree.main
        ),
        key=lambda span: (span.start, -span.end),
    )
    pieces = []  # name, start, end, 1 for the last piece of a call
    stack: list[tuple[Span, int]] = []  # open operator, until when it is accounted for

    def close(until: int) -> None:
        while stack and stack[-1][0].end <= until:
            span, since = stack.pop()
            if span.end > since:
                pieces.append((span.name, since, span.end, 1))
            if stack:
                stack[-1] = (stack[-1][0], span.end)

    for span in spans:
        close(span.start)
        if stack:
            outer, since = stack[-1]
            if span.start > since:
                pieces.append((outer.name, since, span.start, 0))
        stack.append((span, span.start))
    close(max((span.end for span in spans), default=0))
    return [
        Operation(name, "operator", start, end, tree.path(start, tree.main), calls=calls)
        for name, start, end, calls in pieces
    ]


def _span(event: dict[str, Any], name: str) -> Span:
    start = round(event["ts"] * 1000)
    return Span(name, start, start + round(event["dur"] * 1000), event["tid"])
