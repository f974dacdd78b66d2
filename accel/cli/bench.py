"""`accel bench`: the table to quote of a recipe on this machine."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel.cli.options import Parser
from accel.engine import config as configs


def main(argv: Sequence[str]) -> int:
    """Measure the network alone, the input alone and both; print the table."""
    rest, overrides = configs.split_overrides(argv)
    parser = Parser(
        prog="accel bench",
        description="Rates of a recipe on this machine: the network alone, the input alone, both. "
        "Every key of a recipe is an option with its dotted name.",
    )
    parser.add_argument("--recipe", default=configs.DEFAULT_RECIPE, help="name or path")
    parser.add_argument("--warmups", type=int, default=5, help="steps before each (default 5)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each (default 30)")
    parser.add_argument("--json", action="store_true", help="last line: everything as JSON")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of errors")
    options = parser.parse_args(rest)
    for name in ("warmups", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a number >= 1, got {getattr(options, name)}")
    recipe = configs.load_recipe(options.recipe, overrides)

    from accel.engine.bench import bench
    from accel.engine.trainer import Trainer

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(recipe, Path(scratch) / "run", resume="none")
        try:
            report = bench(trainer, warmups=options.warmups, steps=options.steps)
        finally:
            trainer.close()
    print(table(report))
    if options.json:
        print(json.dumps(report))
    return 0


def table(report: dict[str, Any]) -> str:
    """The rows and what they depend on, as text."""
    facts = report["environment"]
    lines = [f"{'':9}{'step ms':>10}{'p10':>10}{'p90':>10}{'clips/s':>10}{'data wait':>11}"]
    for row in report["rows"]:
        wait = f"{100 * row['data_wait']:.1f} %" if row["mode"] == "train" else ""
        numbers = "".join(f"{row[key]:10.2f}" for key in ("step_ms", "p10_ms", "p90_ms"))
        lines.append(f"{row['mode']:9}{numbers}{row['clips_per_s']:10.1f}{wait:>11}")
    compute, loader, train = (row["clips_per_s"] for row in report["rows"])
    lines.append(
        f"input / network {loader / compute:.2f}, both / slower one "
        f"{train / min(compute, loader):.2f}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += [
        f"{report['recipe']} (sha256 {report['recipe_sha256'][:16]}), {report['precision']}, "
        f"{report['clips_per_step']} clips per step, median of {report['steps']} steps",
        f"{facts['device']}, {facts['torch_threads']} threads, {versions}, "
        f"revision {facts['revision'] or 'unknown'}",
        report["loader"],
    ]
    return "\n".join(lines)
