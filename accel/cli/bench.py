"""`accel bench`: the tables to quote of this machine."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accel.cli.options import Parser
from accel.engine import config as configs
from accel.engine.config import Recipe

SECTIONS = {
    "recipe": "the recipe's network alone, its input alone, both",
    "steps": "training steps of every network beside TSN, our operators and plain PyTorch",
    "operators": "each operator beside a copy and plain PyTorch",
    "loop": "what the training loop itself costs",
    "readers": "our decoders beside other loaders, on the generated sets that are there",
}


def main(argv: Sequence[str]) -> int:
    """Measure the sections that were asked for; print their tables."""
    rest, overrides = configs.split_overrides(argv)
    parser = Parser(
        prog="accel bench",
        description="Rates of this machine. Sections: "
        + "; ".join(f"{name}: {text}" for name, text in SECTIONS.items())
        + ". Without --full at reduced sizes (steps at 4 x 112 x 112, three sites per operator), "
        "two minutes on two cores. Every key of a recipe is an option with its dotted name.",
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"default: all of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--recipe", default=configs.DEFAULT_RECIPE, help="name or path")
    parser.add_argument("--warmups", type=int, default=5, help="recipe: steps before each (5)")
    parser.add_argument("--steps", type=int, default=30, help="recipe: steps of each (30)")
    parser.add_argument("--full", action="store_true", help="at 8 x 224 x 224 and all sites")
    parser.add_argument("--json", action="store_true", help="last line: everything as JSON")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of errors")
    options = parser.parse_args(rest)
    for name in ("warmups", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a number >= 1, got {getattr(options, name)}")
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    recipe = configs.load_recipe(options.recipe, overrides)

    from accel.engine import suite
    from accel.engine.run import environment, resolve_device

    device, threads = resolve_device(recipe.run.device), recipe.run.threads
    facts = environment(device)
    cache = recipe.data.resolved_cache_dir()
    precision, full = recipe.precision.mode, options.full
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "recipe": lambda: _recipe(recipe, options.warmups, options.steps),
        "steps": lambda: suite.steps(device.type, precision, threads, full=full),
        "operators": lambda: suite.operators(device.type, threads, full=full),
        "loop": lambda: suite.loop(options.recipe, overrides),
        "readers": lambda: suite.readers(cache, threads, full=full),
    }
    report: dict[str, Any] = {
        "environment": facts,
        "recipe_sha256": configs.fingerprint(recipe),
        "full": full,
    }
    print(_head(recipe, facts, report))
    for name in options.sections or SECTIONS:
        start = time.perf_counter()
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        try:
            report[name] = measures[name]()
        except suite.BenchError as error:
            if options.sections:
                raise
            report[name] = {"not_run": str(error)}
            print(f"\n{name}: not run: {error}", flush=True)
            continue
        report[name]["seconds"] = round(time.perf_counter() - start, 1)
        print("\n" + "\n".join(_TABLES[name](report[name])), flush=True)
    if options.json:
        print(json.dumps(report))
    return 0


def _recipe(recipe: Recipe, warmups: int, steps: int) -> dict[str, Any]:
    from accel.engine.bench import bench
    from accel.engine.trainer import Trainer

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(recipe, Path(scratch) / "run", resume="none")
        try:
            return bench(trainer, warmups=warmups, steps=steps)
        finally:
            trainer.close()


def _head(recipe: Recipe, facts: dict[str, Any], report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['device']}, {facts['torch_threads']} threads, {versions}, "
        f"revision {facts['revision'] or 'unknown'}\n"
        f"{recipe.name} (sha256 {report['recipe_sha256'][:16]}), {recipe.precision.mode}"
    )


def _recipe_table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'recipe':9}{'step ms':>10}{'p10':>10}{'p90':>10}{'clips/s':>10}{'data wait':>11}"]
    for row in report["rows"]:
        wait = f"{100 * row['data_wait']:.1f} %" if row["mode"] == "train" else ""
        numbers = "".join(f"{row[key]:10.2f}" for key in ("step_ms", "p10_ms", "p90_ms"))
        lines.append(f"{row['mode']:9}{numbers}{row['clips_per_s']:10.1f}{wait:>11}")
    compute, loader, train = (row["clips_per_s"] for row in report["rows"])
    ratios = f"{loader / compute:.2f}, both / slower one {train / min(compute, loader):.2f}"
    return [
        *lines,
        f"input / network {ratios}; {report['clips_per_step']} clips per step, median of "
        f"{report['steps']} steps",
        report["loader"],
    ]


def _steps_table(report: dict[str, Any]) -> list[str]:
    facts = report["settings"]
    size = f"{facts['batch']} clips of {facts['frames']} x {facts['size']} x {facts['size']}"
    names = ("step ms", "p10", "p90", "clips/s", "in TSN's", "plain ms", "gain")
    keys = ("step_ms", "p10_ms", "p90_ms", "clips_per_s", "ratio_to_tsn", "plain_ms", "gain")
    lines = [f"{'steps':14}" + "".join(f"{name:>10}" for name in names)]
    for row in report["rows"]:
        lines.append(f"{row['model']:14}" + "".join(f"{row[key]:10.2f}" for key in keys))
    return [*lines, f"{size}, {facts['precision']}, median of {facts['steps']} steps"]


def _operators_table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'operators':18}{'us':>10}{'of a copy':>10}{'plain us':>10}{'gain':>10}"]
    for row in report["rows"]:
        numbers = f"{row['us']:10.0f}{row['of_copy']:10.0%}{row['plain_us']:10.0f}"
        lines.append(f"{row['op']:18}{numbers}{row['gain']:10.2f}")
    facts = report["settings"]
    text = f"forward and backward over its sites, {facts['batch']} clips of "
    return [*lines, text + f"{facts['num_segments']} frames, {facts['dtype']}"]


def _loop_table(report: dict[str, Any]) -> list[str]:
    return [
        f"loop: {report['loop_ms']:.2f} of the {report['step_ms']:.1f} ms of a step are neither "
        f"data nor network nor optimizer ({report['loop_share']:.2%}; of the thread's processor "
        f"time {report['loop_cpu_share']:.2%})"
    ]


def _readers_table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'readers':24}{'clips/s':>10}{'best other':>12}{'ratio':>8}"]
    for row in report["rows"]:
        peers = row["peers"]
        best = max(peers, key=lambda name: float(peers[name]), default="")
        other = f"{peers[best]:12.1f}{row['clips_per_s'] / peers[best]:8.2f} {best}" if best else ""
        lines.append(f"{row['name'] + ' ' + row['backend']:24}{row['clips_per_s']:10.1f}{other}")
    return lines


_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "recipe": _recipe_table,
    "steps": _steps_table,
    "operators": _operators_table,
    "loop": _loop_table,
    "readers": _readers_table,
}
