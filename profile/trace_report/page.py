"""The analysis as text, and as one self-contained HTML page."""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from trace_report.analysis import Analysis
from trace_report.reading import Span, Trace

TOP = 20  # kernels listed

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
       color: #1c2430; background: #fff }
h1 { font-size: 1.4rem; margin-bottom: .3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p.verdict { background: #eef3fb; border-left: 4px solid #2b66c4; padding: .7rem 1rem;
            margin: 1rem 0 }
p.note { color: #5a6472; font-size: 13px; margin: .3rem 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #e3e7ee;
         white-space: nowrap }
th { font-weight: 600; color: #5a6472 } th:first-child, td:first-child { text-align: left }
td.name { max-width: 30rem; overflow: hidden; text-overflow: ellipsis }
td.bar { width: 8rem } td.bar i { display: block; height: .7rem; background: #2b66c4 }
svg { width: 100%; height: auto } svg text { font-size: 11px }
"""
_COLORS = {
    "data wait": "#d9822b",
    "upload": "#b5651d",
    "ingest": "#6f8fb8",
    "forward": "#2b66c4",
    "loss": "#56799f",
    "backward": "#1f4788",
    "all-reduce": "#8b3fa0",
    "optimizer": "#2f8f5b",
    "metrics": "#8a94a3",
}


def text_table(a: Analysis) -> str:
    """Verdict, shares, ranges and the largest kernels, for a terminal."""
    lines = [a.verdict, "", *(f"{name:28}{value}" for name, value in summary(a)), ""]
    device = "GPU ms" if a.on_gpu else "op ms"
    lines.append(f"{'range, per step':44}{'count':>8}{'host ms':>10}{device:>10}{'% of step':>11}")
    for row in a.ranges:
        name = "  " * (len(row.path) - 1) + row.path[-1]
        share = 100 * (row.device_ms if a.on_gpu else row.host_ms) / a.step_ms
        lines.append(
            f"{name:44}{row.count:8.1f}{row.host_ms:10.3f}{row.device_ms:10.3f}{share:11.1f}"
        )
    kind = "kernel" if a.on_gpu else "operator"
    lines += ["", f"{kind + ', per step':64}{'count':>8}{'ms':>10}{'%':>7}"]
    for kernel in a.kernels[:TOP]:
        lines.append(
            f"{kernel.name[:62]:64}{kernel.count:8.1f}{kernel.ms:10.3f}{100 * kernel.share:7.1f}"
        )
    return "\n".join(lines)


def summary(a: Analysis) -> list[tuple[str, str]]:
    """What the report begins with: name and value."""
    device = "GPU" if a.on_gpu else "operators"
    rows = [
        ("device", a.device),
        ("steps captured", f"{a.num_steps} ({a.source})"),
        ("step", f"{a.step_ms:.2f} ms"),
        (f"{device} at work", _percent(a.busy)),
        ("idle, waiting for clips", _percent(a.idle_input)),
        ("idle, waiting for the host", _percent(a.idle_host)),
        ("host waits for clips", _percent(a.data_wait)),
    ]
    if a.on_gpu:
        rows.append(("host waits for the GPU", _percent(a.sync_wait)))
        rows.append(("launches per step", f"{a.launches:.0f}"))
        rows.append(("copied per step", f"{a.copied_bytes / 1e6:.2f} MB"))
        rows.append(("only communication", _percent(a.communication_alone)))
    rates = a.rates
    if "clips_per_s" in rates:
        rows.append(("clips/s of this process", f"{rates['clips_per_s']:.1f}"))
    precision = a.facts.get("precision", "")
    if "tflops" in rates:
        rows.append(("convolutions, products", f"{rates['tflops']:.3f} TFLOP/s ({precision})"))
    if "of_peak_tflops" in rates and a.card is not None:
        peak = a.card.peak_tflops(precision)
        rows.append(("  of the card's peak", f"{_percent(rates['of_peak_tflops'])} of {peak:g}"))
    if "gb_s" in rates:
        rows.append(("operands", f"{rates['gb_s']:.1f} GB/s"))
    if "of_bandwidth" in rates and a.card is not None:
        share = _percent(rates["of_bandwidth"])
        rows.append(("  of its bandwidth", f"{share} of {a.card.bandwidth_gb_s:g}"))
    if a.card is not None:
        rows.append(("limits from", f"{a.card.source} ({a.card.architecture})"))
    elif a.on_gpu:
        rows.append(("limits", "this card is not in accel/engine/cards.py"))
    for name, value in a.facts.get("gpu_sampled", {}).items():
        rows.append((name.replace("_", " "), str(value)))
    return rows


def page(a: Analysis, trace: Trace) -> str:
    """The report as HTML that needs no other file."""
    facts = a.facts
    title = " · ".join(str(facts[key]) for key in ("recipe", "model", "precision") if key in facts)
    device = "GPU ms" if a.on_gpu else "operator ms"
    ranges = [
        (
            "&nbsp;" * 4 * (len(row.path) - 1) + html.escape(row.path[-1]),
            f"{row.count:.1f}",
            f"{row.host_ms:.3f}",
            f"{row.device_ms:.3f}",
            _bar((row.device_ms if a.on_gpu else row.host_ms) / a.step_ms),
        )
        for row in a.ranges
    ]
    kernels = [
        (
            f'<span title="{html.escape(k.name)}">{html.escape(k.name[:70])}</span>',
            html.escape(k.category),
            f"{k.count:.1f}",
            f"{k.ms:.3f}",
            _bar(k.share),
        )
        for k in a.kernels[:TOP]
    ]
    categories = [
        (html.escape(name), _percent(share), _bar(share)) for name, share in a.categories.items()
    ]
    kind = "Kernels" if a.on_gpu else "Operators"
    details = {key: value for key, value in facts.items() if key != "gpu_sampled"}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>Step report: {html.escape(title or a.device)}</title>
<style>{_STYLE}</style></head><body>
<h1>What a training step does</h1>
<p class="note">{html.escape(title or a.source)} on {html.escape(a.device)}</p>
<p class="verdict">{html.escape(a.verdict)}</p>
{_table((), [(html.escape(n), html.escape(v)) for n, v in summary(a)])}
<h2>One step</h2>
{timeline(a, trace)}
<h2>Time per range, per step</h2>
{_table(("range", "count", "host ms", device, "of the step"), ranges)}
<p class="note">Host: between start and end on the training thread. {device}: the work launched
inside, whenever it ran. Inner ranges are part of the outer ones.</p>
<h2>Kinds of work</h2>
{_table(("kind, guessed from names", "share", ""), categories)}
<h2>{kind}, per step</h2>
{_table(("name", "kind", "count", "ms", "share"), kernels)}
<h2>The run</h2>
<pre>{html.escape(json.dumps(details, indent=1))}</pre>
<p class="note">Operands: the bytes of every operand of every operator once, as if nothing were
fused or cached. Arithmetic: convolutions and matrix products. Both were counted in the step before
the capture.</p>
</body></html>
"""


def timeline(a: Analysis, trace: Trace) -> str:
    """A picture of the step of median length: ranges of the host, below them the device's work."""
    steps = sorted(trace.steps, key=lambda s: s.end - s.start)
    step = steps[len(steps) // 2]
    width, left, row = 1000, 90, 22
    scale = (width - left) / (step.end - step.start)

    def box(start: int, end: int, y: int, color: str, label: str) -> str:
        x = left + (max(start, step.start) - step.start) * scale
        w = max((min(end, step.end) - max(start, step.start)) * scale, 0.3)
        text = html.escape(f"{label}: {(end - start) / 1e6:.3f} ms")
        inner = ""
        if w > 7 * len(label) + 6:
            inner = f'<text x="{x + 4:.1f}" y="{y + 14}" fill="#fff">{html.escape(label)}</text>'
        return (
            f'<g><title>{text}</title><rect x="{x:.1f}" y="{y}" width="{w:.1f}" '
            f'height="{row - 4}" fill="{color}"/>{inner}</g>'
        )

    inside = [
        r for r in trace.ranges if r.start >= step.start and r.end <= step.end and r is not step
    ]
    parts = [f'<text x="0" y="{row + 14}">host</text>']
    depth_of = _depths(inside, step.thread)
    deepest = max(depth_of.values(), default=0)
    for span in inside:
        if span in depth_of:
            color = _COLORS.get(span.name, "#7d9cc9" if depth_of[span] % 2 else "#a9bddc")
            parts.append(box(span.start, span.end, row * (1 + depth_of[span]), color, span.name))
    y = row * (3 + deepest)
    name = "GPU" if a.on_gpu else "operators"
    parts.append(f'<text x="0" y="{y + 14}">{name}</text>')
    for operation in trace.operations:
        if operation.end > step.start and operation.start < step.end:
            inner = next((n for n in reversed(operation.path) if n in _COLORS), "")
            color = _COLORS.get(inner, "#56606e")
            parts.append(box(operation.start, operation.end, y, color, operation.name[:60]))
    length = (step.end - step.start) / 1e6
    parts.append(f'<text x="{left}" y="14">0 ms</text>')
    parts.append(f'<text x="{width}" y="14" text-anchor="end">{length:.2f} ms</text>')
    height = y + row + 4
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _depths(spans: Iterable[Span], thread: int) -> dict[Span, int]:
    depths: dict[Span, int] = {}
    stack: list[Span] = []
    for span in sorted((s for s in spans if s.thread == thread), key=lambda s: (s.start, -s.end)):
        while stack and stack[-1].end <= span.start:
            stack.pop()
        depths[span] = len(stack)
        stack.append(span)
    return depths


def as_json(a: Analysis) -> dict[str, Any]:
    """The analysis as plain data, kernels cut to the largest."""
    values = asdict(a)
    values["kernels"] = values["kernels"][:TOP]
    return values


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="bar">{cell}</td>' if cell.startswith("<i") else f"<td>{cell}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{body}</table>"


def _bar(share: float) -> str:
    return f'<i style="width:{100 * min(share, 1):.1f}%" title="{100 * share:.1f} %"></i>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
