"""The `accel` command: subcommand table, error rendering, exit codes."""

import sys
from collections.abc import Sequence

import accel
from accel.cli.start import start

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train:main", "train and evaluate a recipe (the same as train.py)"),
    "evaluate": ("evaluate:main", "test a trained network with several views, store its scores"),
    "tubes": ("tubes:main", "video-mAP of a trained detector, or of two streams fused"),
    "detect": (
        "detect:main",
        "boxes, classes and tubes in a video, from a trained detector",
    ),
    "ensemble": ("evaluate:ensemble_main", "add stored scores of several models"),
    "reproduce": ("reproduce:main", "train and test a published row, compare, report"),
    "results": ("reproduce:results_main", "the table of published and measured results"),
    "data": ("data:main", "import lists of known datasets; check, measure, re-encode media"),
    "bench": ("bench:main", "rates of this machine: a recipe, every network, operators, input"),
    "convert": ("convert:main", "convert a checkpoint between our layout and published ones"),
    "models": ("models:main", "list the networks with their parameters and multiply-adds"),
    "recipes": ("recipes:main", "list the recipes with their published rows, or check them"),
    "doctor": ("doctor:main", "report versions, devices, DALI, the extension and name clashes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (0 done, 2 usage, else as the command says)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(accel.__version__)
        return 0
    if arguments[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        print(_usage(), file=sys.stderr)
        got = f"unknown command {arguments[0]!r}" if arguments else "no command given"
        print(f"accel: {got}; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command, _ = COMMANDS[arguments[0]]
    return start(command, arguments[1:])


def _usage() -> str:
    rows = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: accel COMMAND [options]\n\n{rows}\n\naccel COMMAND --help shows its options."


if __name__ == "__main__":
    sys.exit(main())
