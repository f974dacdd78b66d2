"""`accel data`: what concerns the videos of a dataset."""

from collections.abc import Callable, Sequence
from pathlib import Path

from accel.cli.options import Parser
from accel.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run `accel data SUBCOMMAND`."""
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        rows = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
        if argv and argv[0] in ("-h", "--help"):
            print(f"usage: accel data SUBCOMMAND [options]\n\n{rows}")
            return 0
        got = f"unknown subcommand {argv[0]!r}" if argv else "no subcommand"
        raise ConfigError(f"accel data: {got}; expected one of {', '.join(COMMANDS)}.")
    command, _ = COMMANDS[argv[0]]
    return command(argv[1:])


def import_main(argv: Sequence[str]) -> int:
    """Match official annotation files with the media at hand and write our lists."""
    from pipelines.adapters import DATASETS, import_dataset

    parser = Parser(
        prog="accel data import",
        description="Write train.txt, val.txt and classes.txt for a known dataset into the folder "
        "of its videos or frame folders, from its official annotation files; nothing is "
        "downloaded.",
        epilog="; ".join(f"{name}: {', '.join(facts.files)}" for name, facts in DATASETS.items()),
    )
    parser.add_argument("dataset", choices=sorted(DATASETS))
    parser.add_argument("--annotations", required=True, help="folder of the annotation files")
    parser.add_argument("--media", required=True, help="folder of the videos or frame folders")
    parser.add_argument(
        "--numbering",
        choices=("alphabetical", "official"),
        default="alphabetical",
        help="sthv1: labels by class name (TSM, MAS-Net, TDN, MSN, AMS-Net; default) or in the "
        "order of the official labels file (TANet's mmaction2 rows)",
    )
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="ucf101, hmdb51")
    options = parser.parse_args(argv)
    report = import_dataset(
        options.dataset,
        Path(options.annotations),
        Path(options.media),
        numbering=options.numbering,
        split=options.split,
    )
    for split, found in report.found.items():
        lacking = report.missing[split]
        more = f"; {len(lacking)} missing, e.g. {', '.join(lacking[:3])}" if lacking else ""
        print(f"{split}: {found} videos{more}")
    if any(report.missing.values()):
        print(f"all missing videos: {Path(options.media) / 'missing.txt'}")
    if report.unused:
        print(f"{report.unused} files or folders are in no list")
    print(f"{report.num_classes} classes; now: --data.root {options.media}")
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "import": (import_main, "lists of a known dataset from its official annotation files"),
}
