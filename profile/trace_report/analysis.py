"""What a trace says: time per range, idle time and its cause, rates, a verdict."""

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trace_report.reading import Operation, Trace

from accel.engine.cards import Card, find_card

SIGNIFICANT = 0.15
"""Share of the time from which a wait decides the verdict."""

Interval = tuple[int, int]

# First match wins; parts of the names of kernels and operators, in lower case.
_CLASSES = (
    ("communication", ("nccl", "all_reduce", "allreduce", "gloo")),
    ("layout conversion", ("nchwtonhwc", "nhwctonchw", "contiguous")),
    (
        "temporal operator",
        ("temporal_taps", "mas_fuse", "diff_gate", "branch_fuse", "deform", "accel_kernels"),
    ),
    ("batch norm", ("batch_norm", "batchnorm", "bn_fw", "bn_bw", "bn_act", "welford")),
    ("input normalization", ("ingest",)),
    (
        "convolution or matrix product",
        ("conv", "gemm", "xmma", "cutlass", "wgrad", "dgrad", "winograd", "addmm", "aten::mm"),
    ),
    ("pooling", ("pool",)),
    ("optimizer", ("sgd", "multi_tensor", "foreach")),
    ("copy", ("copy", "memcpy", "memset", "aten::to", "cat")),
    ("reduction", ("reduce", "sum", "mean", "norm")),
    ("elementwise", ("elementwise", "add", "mul", "relu", "threshold", "div", "fill", "zero")),
)


@dataclass(frozen=True)
class RangeTime:
    """One range, per step."""

    path: tuple[str, ...]
    count: float
    host_ms: float
    """Between its start and end on the training thread."""
    device_ms: float
    """Device work launched inside it."""


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel (or operator), per step."""

    name: str
    category: str
    count: float
    ms: float
    share: float
    """Of the time of all of them."""


@dataclass
class Analysis:
    """Everything that the report shows. Times are per step unless the name says otherwise."""

    source: str
    device: str
    on_gpu: bool
    num_steps: int
    step_ms: float
    busy: float
    """Share of the time in which the device works; shares are of the whole window."""
    idle_input: float
    """Idle while the training thread waits for clips."""
    idle_host: float
    """Idle otherwise: the host has not launched anything."""
    data_wait: float
    """Share of the time that the training thread waits for clips, the device busy or not."""
    sync_wait: float
    """Share of the time that the training thread waits for the device."""
    communication_alone: float
    """Share of the time in which only communication runs on the device."""
    launches: float
    copied_bytes: float
    ranges: list[RangeTime]
    kernels: list[KernelTime]
    categories: dict[str, float]
    """Share of the device's working time."""
    facts: dict[str, Any] = field(default_factory=dict)
    card: Card | None = None
    rates: dict[str, float] = field(default_factory=dict)
    """clips_per_s, tflops, gb_s and, where the card is known, shares of its limits."""
    kind: str = ""
    """input-bound | compute-bound | launch-bound | communication-bound."""
    verdict: str = ""


def analyze(trace: Trace, facts: dict[str, Any] | None = None) -> Analysis:
    """The analysis of a trace; `facts` are those of the run (facts.json), if there are any."""
    facts = facts or {}
    steps = trace.steps
    window = (steps[0].start, steps[-1].end)
    length, count = window[1] - window[0], len(steps)
    main = steps[0].thread
    on_gpu = bool(trace.device)
    inside = [o for o in trace.operations if o.end > window[0] and o.start < window[1]]
    waiting = union(
        ((r.start, r.end) for r in trace.ranges if r.name == "data wait" and r.thread == main),
        window,
    )
    busy = union(((o.start, o.end) for o in inside), window)
    if not on_gpu:  # what the training thread does to fetch a clip is waiting too
        busy = subtract(busy, waiting)
    idle = subtract([window], busy)
    idle_input = size(intersect(idle, waiting))
    talk = [o for o in inside if category(o.name) == "communication"]
    rest = union(((o.start, o.end) for o in inside if category(o.name) != "communication"), window)
    alone = subtract(union(((o.start, o.end) for o in talk), window), rest)
    analysis = Analysis(
        source=trace.source,
        device=trace.device or str(facts.get("device", "CPU")),
        on_gpu=on_gpu,
        num_steps=count,
        step_ms=length / count / 1e6,
        busy=size(busy) / length,
        idle_input=idle_input / length,
        idle_host=(size(idle) - idle_input) / length,
        data_wait=size(waiting) / length,
        sync_wait=size(union(((w.start, w.end) for w in trace.waits), window)) / length,
        communication_alone=size(alone) / length if on_gpu else 0.0,
        launches=trace.launches / count,
        copied_bytes=sum(o.bytes for o in inside) / count,
        ranges=_range_times(trace, inside, main, count),
        kernels=_kernel_times(inside, count),
        categories=_categories(inside),
        facts=facts,
        card=find_card(trace.device) if on_gpu else None,
    )
    analysis.rates = _rates(analysis)
    analysis.kind, analysis.verdict = _verdict(analysis)
    return analysis


def category(name: str) -> str:
    """What a kernel or operator does, guessed from its name."""
    lowered = name.lower()
    for label, parts in _CLASSES:
        if any(part in lowered for part in parts):
            return label
    return "other"


def _range_times(
    trace: Trace, operations: Sequence[Operation], main: int, steps: int
) -> list[RangeTime]:
    """Inclusive times by path, in the order of first appearance."""
    host: dict[tuple[str, ...], list[int]] = {}
    stack: list[tuple[str, int]] = []
    for span in sorted(
        (r for r in trace.ranges if r.thread == main), key=lambda r: (r.start, -r.end)
    ):
        while stack and stack[-1][1] <= span.start:
            stack.pop()
        stack.append((span.name, span.end))
        times = host.setdefault(tuple(name for name, _ in stack), [0, 0])
        times[0] += 1
        times[1] += span.end - span.start
    device: dict[tuple[str, ...], int] = collections.Counter()
    for operation in operations:
        for depth in range(1, len(operation.path) + 1):
            device[operation.path[:depth]] += operation.end - operation.start
    others = [path for path in device if path not in host]  # of other threads: all-reduce
    rows = [(path, *host.get(path, (0, 0))) for path in (*host, *others)]
    return [
        RangeTime(path, number / steps, time / steps / 1e6, device.get(path, 0) / steps / 1e6)
        for path, number, time in rows
    ]


def _kernel_times(operations: Sequence[Operation], steps: int) -> list[KernelTime]:
    """Largest first."""
    times: dict[str, list[int]] = {}
    for operation in operations:
        entry = times.setdefault(operation.name, [0, 0])
        entry[0] += operation.calls
        entry[1] += operation.end - operation.start
    total = sum(time for _, time in times.values()) or 1
    ordered = sorted(times.items(), key=lambda item: -item[1][1])
    return [
        KernelTime(name, category(name), number / steps, time / steps / 1e6, time / total)
        for name, (number, time) in ordered
    ]


def _categories(operations: Sequence[Operation]) -> dict[str, float]:
    times: dict[str, int] = collections.Counter()
    for operation in operations:
        times[category(operation.name)] += operation.end - operation.start
    total = sum(times.values()) or 1
    return {name: time / total for name, time in sorted(times.items(), key=lambda i: -i[1])}


def _rates(analysis: Analysis) -> dict[str, float]:
    facts, seconds = analysis.facts, analysis.step_ms / 1e3
    rates = {}
    if clips := facts.get("clips_per_step"):
        rates["clips_per_s"] = clips / seconds
    if flop := facts.get("flop_per_step"):
        rates["tflops"] = flop / seconds / 1e12
    if moved := facts.get("operand_bytes_per_step"):
        rates["gb_s"] = moved / seconds / 1e9
    if analysis.card is not None:
        peak = analysis.card.peak_tflops(str(facts.get("precision", "fp32")))
        if "tflops" in rates and peak:
            rates["of_peak_tflops"] = rates["tflops"] / peak
        if "gb_s" in rates:
            rates["of_bandwidth"] = rates["gb_s"] / analysis.card.bandwidth_gb_s
    return rates


def _verdict(a: Analysis) -> tuple[str, str]:
    device = "GPU" if a.on_gpu else "training thread"
    shares = {
        "input-bound": a.idle_input,
        "launch-bound": a.idle_host,
        "communication-bound": a.communication_alone,
    }
    kind = max(shares, key=lambda name: shares[name])
    if shares[kind] < SIGNIFICANT:
        kind = "compute-bound"
    largest = next(iter(a.categories.items()), ("nothing", 0.0))
    if kind == "input-bound":
        text = (
            f"{_percent(a.idle_input)} of the step waits for clips while the {device} is idle; "
            f"without that wait a step would take {a.step_ms * (1 - a.idle_input):.1f} ms instead "
            f"of {a.step_ms:.1f}. Raise loader.threads or loader.prefetch, or store files that "
            "decode faster (short side 256, a key frame every 16 frames or less)."
        )
    elif kind == "launch-bound":
        text = (
            f"the GPU is idle {_percent(a.idle_host)} of the step although clips are there: the "
            f"host launches its work too slowly ({a.launches:.0f} launches per step). Use larger "
            "micro-batches, CUDA graphs or torch.compile."
            if a.on_gpu
            else f"{_percent(a.idle_host)} of the step the training thread runs Python between the "
            "operators. Use larger micro-batches."
        )
    elif kind == "communication-bound":
        text = (
            f"{_percent(a.communication_alone)} of the step the {device} only exchanges gradients. "
            "Use larger micro-batches, gradient accumulation, or compressed gradients."
        )
    else:
        text = (
            f"the {device} works {_percent(a.busy)} of the step; most of that is "
            f"{largest[0]} ({_percent(largest[1])}). Clips cost {_percent(a.idle_input)} of the "
            f"step, launches {_percent(a.idle_host)}."
        )
        text += _which_limit(a)
    return kind, f"{kind}: {text}"


def _which_limit(a: Analysis) -> str:
    math, memory = (a.rates.get(key) for key in ("of_peak_tflops", "of_bandwidth"))
    if math is None or memory is None or a.card is None:
        return ""
    nearer = "memory bandwidth" if memory > math else "arithmetic"
    return (
        f" It reaches {_percent(math)} of the arithmetic and {_percent(memory)} of the memory "
        f"bandwidth of a {a.card.name}: {nearer} is the nearer limit."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def union(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Disjoint, sorted intervals that cover the same, cut to the window."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        start, end = max(start, window[0]), min(end, window[1])
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What two disjoint, sorted lists of intervals have in common."""
    result, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            result.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return result


def subtract(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What disjoint, sorted intervals cover and the others do not."""
    result, j = [], 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if other[k][0] > start:
                result.append((start, other[k][0]))
            start = max(start, other[k][1])
            k += 1
        if start < end:
            result.append((start, end))
    return result


def size(intervals: Iterable[Interval]) -> int:
    """Total length."""
    return sum(end - start for start, end in intervals)
