"""`accel train` and `train.py`: a recipe, overrides, a run."""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import accel
from accel.engine import config as configs
from accel.errors import ConfigError

DESCRIPTION = (
    "Train and evaluate a recipe. Every key of a recipe is an option with its dotted name; the "
    "command line wins over the file."
)


def main(argv: Sequence[str]) -> int:
    """Parse, train, report; returns the exit code."""
    rest, overrides = configs.split_overrides(argv)
    options = _parse(rest)
    _start_logging(options)
    if options.help:
        _full_parser().print_help()
        return 0
    if options.version:
        print(accel.__version__)
        return 0
    recipe = configs.load_recipe(options.recipe, overrides)
    if options.print_config:
        print(configs.dump_marked(recipe), end="")
        return 0
    out = Path(options.out or Path("runs") / configs.override_name(recipe.name, overrides))
    return _train(recipe, out, options)


def _train(recipe: configs.Recipe, out: Path, options: argparse.Namespace) -> int:
    from accel.engine.data import warn_of_classes
    from accel.engine.distributed import start_world, stop_world
    from accel.engine.dry_run import dry_run
    from accel.engine.report import summary_text
    from accel.engine.run import resolve_device
    from accel.engine.stop import StopRequested
    from accel.engine.trainer import Trainer

    world = start_world(resolve_device(recipe.run.device).type, recipe.run.timeout_s)
    if not world.is_main:
        logging.disable(logging.WARNING)
    scratch = tempfile.TemporaryDirectory() if options.dry_run else None
    try:
        trainer = Trainer(
            recipe,
            out if scratch is None else Path(scratch.name),
            resume=options.resume if scratch is None else "none",
            resume_allow=[key for key in options.resume_allow.split(",") if key],
            world=world,
        )
        try:
            if world.is_main:
                warn_of_classes(trainer.dataset)
            if options.dry_run:
                report = dry_run(trainer)
                if world.is_main:
                    print(json.dumps(report) if options.json else _table(report))
                return 0
            summary = trainer.fit()
        except StopRequested as stop:
            if world.is_main:
                print(f"{stop}; saved in {out}. The same command continues.", file=sys.stderr)
            return stop.exit_code
        finally:
            trainer.close()
    finally:
        stop_world()
        if scratch is not None:
            scratch.cleanup()
    if world.is_main:
        print(summary_text(summary, out))
        if options.json:
            print(json.dumps(summary), flush=True)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"command line: {message}; --help lists the options.")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        default=configs.DEFAULT_RECIPE,
        help="name of a shipped recipe, or path of a .yaml file",
    )
    parser.add_argument(
        "--out",
        default="",
        help="run folder; default runs/<recipe>[-<overrides that change results>]",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (continue what --out holds) | none (--out must be fresh) | path of a checkpoint",
    )
    parser.add_argument(
        "--resume-allow",
        default="",
        metavar="KEYS",
        help="comma-separated keys that may differ from the checkpoint's recipe",
    )
    parser.add_argument(
        "--json", action="store_true", help="last line of stdout: the result as JSON"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe and stop"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="one batch: shapes, steps, memory, expected duration"
    )
    parser.add_argument("--quiet", action="store_true", help="warnings and errors only")
    parser.add_argument(
        "--verbose", action="store_true", help="debug messages, tracebacks of errors"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="train.py", add_help=False, allow_abbrev=False)
    _add_options(parser)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    return parser.parse_args(argv)


def _full_parser() -> argparse.ArgumentParser:
    """The parser whose help lists every key of a recipe with its description."""
    parser = configs.make_parser("train.py", DESCRIPTION)
    _add_options(parser)
    configs.add_recipe_options(parser)
    return parser


def _start_logging(options: argparse.Namespace) -> None:
    level = logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("accel", "pipelines", "kernels"):
        logging.getLogger(package).setLevel(level)


def _table(values: dict[str, object]) -> str:
    return "\n".join(f"{name:24}{value}" for name, value in values.items())
