"""The table of published rows, with what stored reports measured."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.engine.checkpoint import write_atomically
from accel.engine.published import published_rows
from accel.engine.recipe_check import resolve_row
from accel.errors import ConfigError

BEGIN = "<!-- results: written by `accel results`, not by hand -->"
END = "<!-- end of results -->"


def load_reports(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reports of `accel reproduce`.

    Raises:
        ConfigError: a file that is none, or one of a scaled run, which measures nothing.
    """
    reports = []
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"{path}: is no JSON text: {error}.") from error
        try:
            scale = report["scale"]
            complete = isinstance(report["rows"], list) and "device" in report["environment"]
        except (KeyError, TypeError):
            complete = False
        if not complete:
            raise ConfigError(
                f"{path}: is not a report of accel reproduce, which has scale, rows and "
                "environment; give its report.json."
            )
        if scale != 1:
            raise ConfigError(f"{path}: is of --scale {scale}; such a run measures no row.")
        reports.append(report)
    return reports


def results_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: row, recipe, test, published and measured percent, hardware."""
    measured = {
        row["row"]: (row["measured"], report) for report in reports for row in report["rows"]
    }
    lines = [
        "| row | recipe | test | published top-1 / top-5 (mean class) | measured | hardware |",
        "|---|---|---|---|---|---|",
    ]
    for row in published_rows():
        found: Mapping[str, float]
        source: Mapping[str, Any] | None
        found, source = measured.get(row.name) or ({}, None)
        recipes = " + ".join(f"`{recipe.name}`" for recipe in resolve_row(row))
        numbers = {key: found[key] for key in row.published if key in found}
        hardware = _hardware(source) if source is not None else ""
        lines.append(
            f"| {row.name} | {recipes} | {row.protocol} | {_numbers(row.published)} | "
            f"{_numbers(numbers)} | {hardware} |"
        )
    return "\n".join(lines) + "\n"


def _numbers(values: Mapping[str, float]) -> str:
    if "top1" not in values:
        return ""
    text = _percent(values["top1"])
    if "top5" in values:
        text += f" / {_percent(values['top5'])}"
    return text + (f" ({_percent(values['mean_class'])})" if "mean_class" in values else "")


def _percent(value: float) -> str:
    """One decimal, or two where there are two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _hardware(report: Mapping[str, Any]) -> str:
    deviating = sum(len(run["deviations"]) for run in report["runs"].values())
    notes = [f"{deviating} deviations"] if deviating else []
    notes += ["other videos"] if report["data_problems"] else []
    device = f"{report['processes']} x {report['environment']['device']}"
    return f"{device} ({', '.join(notes)})" if notes else device


def insert_table(path: Path, table: str) -> None:
    """Replace what stands between the markers of a file.

    Raises:
        ConfigError: the file lacks them, or cannot be written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        write_atomically(path, f"{before}{BEGIN}\n\n{table}\n{END}{after}".encode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: expected one pair of the lines {BEGIN} and {END}.") from error
