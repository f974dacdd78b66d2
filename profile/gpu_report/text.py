"""The report of gpu_check.py as markdown."""

from typing import Any

from gpu_report.asks import asks, table
from gpu_report.sections import SECTIONS

_SITE = ("op", "form", "channels", "size", "direction", "implementation")
_WAYS = (
    "model",
    "way",
    "checkpoint_activations",
    "step_ms",
    "ratio_to_eager",
    "peak_gib",
    "loss_difference",
)
_LOADER = ("name", "backend", "clips_per_s", "cpu_ms_per_clip", "ratio_to_best_peer", "description")
_WAIT = ("decoder", "data_wait", "train_clips_per_s", "compute_clips_per_s", "loader_clips_per_s")
_STEP = (
    "model",
    "step_ms",
    "p10_ms",
    "p90_ms",
    "clips_per_s",
    "ratio_to_tsn",
    "tflops",
    "peak_gib",
)


def markdown(report: dict[str, Any]) -> str:
    """Environment, asks beside what was measured, outcomes, and every row of the benchmarks."""
    lines = ["# GPU check", ""]
    lines += [f"- {key}: {value}" for key, value in report.get("env", {}).items()]
    lines += ["", "## Asked and measured", "", *table(asks(report))]
    lines += [
        "",
        "## Sections",
        "",
        "| section | outcome | seconds | last line |",
        "|---|---|---|---|",
    ]
    for section in SECTIONS:
        found = report.get(section.name, {"outcome": "not run", "seconds": "", "last_line": ""})
        last = found["last_line"].replace("|", "/")
        lines.append(f"| {section.name} | {found['outcome']} | {found['seconds']} | {last} |")
    for name in ("training", "training_distributed"):
        if training := report.get(name, {}).get("result"):
            lines += ["", f"## {name}", "", *(f"- {k}: {v}" for k, v in training.items())]
    for name in (section.name for section in SECTIONS if section.json):
        if rows := report.get(name, {}).get("models"):
            settings = report[name].get("settings", {})
            lines += ["", f"## {name}: {settings.get('batch')} clips per step", ""]
            columns = (
                *_STEP,
                *(["graph_problem"] if any("graph_problem" in r for r in rows) else []),
            )
            lines += _table(columns, [[str(row.get(key, "")) for key in columns] for row in rows])
        if rows := report.get(name, {}).get("rows"):
            lines += ["", f"## {name}", ""]
            cells = []
            for row in rows:
                numbers = f"{row['median_us']:.1f}", f"{row['gb_s']:.0f}", f"{row['of_copy']:.0%}"
                cells.append([*(str(row[column]) for column in _SITE), *numbers])
            lines += _table((*_SITE, "median us", "GB/s", "of copy"), cells)
    tables = (
        ("graphs", "ways", _WAYS),
        ("loader", "sets", _LOADER),
        ("data_wait", "data_wait", _WAIT),
    )
    for name, key, columns in tables:
        found = report.get(name, {})
        if rows := [row for row in found.get(key, []) if not row.get("problem")]:
            lines += ["", f"## {name}", ""]
            lines += _table(
                columns, [[_short(row.get(column)) for column in columns] for row in rows]
            )
        problems = [
            (row.get("decoder") or row["way"], row["problem"])
            for row in found.get(key, [])
            if row.get("problem")
        ]
        for set_name, reasons in found.get("not_measured", {}).items():
            problems += [(f"{set_name}, {backend}", why) for backend, why in reasons.items()]
        lines += ["", *(f"- {what}: {why}" for what, why in problems)] if problems else []
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join(row)} |" for row in rows]
