"""`accel reproduce` and `accel results`: published rows from start to end, and their table."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from accel.cli.options import Parser
from accel.engine import config as configs
from accel.errors import AccelError
from pipelines.errors import DataError


def main(argv: Sequence[str]) -> int:
    """Check the data, train, test every protocol, report published against measured."""
    rest, overrides = configs.split_overrides(argv)
    parser = Parser(
        prog="accel reproduce",
        description="Train and test a published row, or a recipe with all its rows, and compare. "
        "The same command continues. Every key of a recipe is an option with its dotted name; "
        "what differs from the recipe is reported.",
    )
    parser.add_argument("name", help="a row or recipe of accel recipes")
    parser.add_argument("--out", default="", help="default: runs/reproduce-<name>")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of videos and epochs, to test the chain"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="what would run and what it needs; with the data there also steps, hours, disk and "
        "memory; writes no run",
    )
    parser.add_argument(
        "--accept-data", action="store_true", help="go on with other videos than published"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of errors")
    options = parser.parse_args(rest)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    for package in ("accel", "pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)

    from accel.engine import reproduce
    from accel.engine.distributed import start_world, stop_world
    from accel.engine.outline import outline, outline_lines
    from accel.engine.run import resolve_device
    from accel.engine.stop import StopRequested

    out = Path(options.out or f"runs/reproduce-{options.name}")
    steps = []
    if options.dry_run:
        steps = outline(options.name, out, overrides=overrides, scale=options.scale)
    where = {key: value for key, value in overrides.items() if key.startswith("run.")}
    run = configs.recipe_of({}, "command line", name="run", overrides=where).run
    world = start_world(resolve_device(run.device).type, run.timeout_s)
    if not world.is_main:
        logging.disable(logging.WARNING)
    previewing = options.dry_run and world.is_main
    try:
        if previewing and not options.json:
            print("\n".join(outline_lines(steps)))
        try:
            job = reproduce.plan(
                options.name, out, overrides=overrides, scale=options.scale, world=world
            )
            reproduce.check_data(job, accept=options.accept_data)
        except (AccelError, DataError):
            if previewing and options.json:
                print(json.dumps(steps))
            raise
        if options.dry_run:
            previews = reproduce.preview(job, world)
            if previewing and options.json:
                print(json.dumps([a | b for a, b in zip(steps, previews, strict=True)]))
            elif previewing:
                print("\n".join(outline_lines(previews)))
            return 0
        report = reproduce.reproduce(job, out, world)
    except StopRequested as stop:
        if world.is_main:
            print(f"{stop}; saved in {out}. The same command continues.", file=sys.stderr)
        return stop.exit_code
    finally:
        stop_world()
    if world.is_main:
        print(json.dumps(report) if options.json else "\n".join(reproduce.report_lines(report)))
        print(f"report in {out / 'report.json'}", file=sys.stderr)
    return 0


def results_main(argv: Sequence[str]) -> int:
    """Print the table of results, or put it into a file between its markers."""
    parser = Parser(
        prog="accel results",
        description="The table of all published rows, with what reports of accel reproduce hold.",
    )
    parser.add_argument("reports", nargs="*", help="report.json files")
    parser.add_argument(
        "--into", default="", help="file with the markers of the table, e.g. README"
    )
    options = parser.parse_args(argv)

    from accel.engine.results import insert_table, load_reports, results_table

    table = results_table(load_reports([Path(path) for path in options.reports]))
    if options.into:
        insert_table(Path(options.into), table)
    else:
        print(table, end="")
    return 0
