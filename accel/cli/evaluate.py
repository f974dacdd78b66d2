"""`accel evaluate` and `accel ensemble`: tests with several views, and sums of stored scores."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel.cli.options import Parser
from accel.engine import config as configs
from accel.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Test a network on the validation videos and store its scores."""
    rest, overrides = configs.split_overrides(argv)
    parser = Parser(
        prog="accel evaluate",
        description="Test a run, a checkpoint or published weights on the validation videos. Every "
        "key of a recipe is an option with its dotted name, e.g. --data.root.",
    )
    parser.add_argument("target", help="run folder, checkpoint, or file of published weights")
    parser.add_argument(
        "--protocol", default="", help="clips x crops, e.g. 2x3 or 1x1,2x3; default: the recipe's"
    )
    parser.add_argument("--recipe", default="", help="name or path; default: the run's own")
    parser.add_argument("--out", default="", help="folder that gets scores/; default: the run's")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of errors")
    options = parser.parse_args(rest)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("accel.engine.tester").setLevel(logging.INFO)  # says who decodes

    from accel.engine.distributed import start_world, stop_world
    from accel.engine.run import resolve_device
    from accel.engine.tester import evaluate_protocols, find_target

    target = find_target(
        options.target, recipe=options.recipe, out=options.out, overrides=overrides
    )
    protocols = [name for name in options.protocol.split(",") if name]
    world = start_world(resolve_device(target.recipe.run.device).type)
    try:
        reports = evaluate_protocols(target, protocols, world=world)
    finally:
        stop_world()
    if not world.is_main:
        return 0
    if options.json:
        print(json.dumps(reports, indent=1))
        return 0
    for report in reports:
        print(_line(f"{report['protocol']} ({report['num_views']} views)", report))
    for decoder in dict.fromkeys(report["loader"] for report in reports):
        print(decoder)
    print(f"scores in {target.out / 'scores'}")
    return 0


def ensemble_main(argv: Sequence[str]) -> int:
    """Add the stored scores of several models, or average view sets of one."""
    parser = Parser(
        prog="accel ensemble",
        description="Add the scores of several models: files written by accel evaluate, or run "
        "folders with --protocol.",
    )
    parser.add_argument("members", nargs="+", help="files of scores, or run folders")
    parser.add_argument("--protocol", default="", help="of run folders, e.g. 2x3")
    parser.add_argument(
        "--weights", nargs="+", type=float, help="one per member; default 1 each, as published"
    )
    parser.add_argument(
        "--merge-views",
        action="store_true",
        help="the members are view sets of one model: average over all their views",
    )
    parser.add_argument("--out", default="", help="file for the resulting scores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)

    from accel.engine.scores import ensemble, load_scores, merge_views

    paths = [_score_file(member, options.protocol) for member in options.members]
    weights = options.weights or [1.0] * len(paths)
    if len(weights) != len(paths):
        parser.error(f"--weights: expected {len(paths)} numbers, got {len(weights)}")
    if options.merge_views and options.weights:
        parser.error("--weights: view sets of one model are weighted by their number of views")
    members = [load_scores(path) for path in paths]
    result = merge_views(members) if options.merge_views else ensemble(members, weights)
    if options.out:
        result.save(Path(options.out))
    report = {"members": [str(path) for path in paths], "weights": weights, **result.metrics()}
    if options.json:
        print(json.dumps(report))
        return 0
    for path, member in zip(paths, members, strict=True):
        print(_line(str(path), member.metrics()))
    print(_line("merged" if options.merge_views else "ensemble", report))
    return 0


def _score_file(member: str, protocol: str) -> Path:
    path = Path(member)
    if not path.is_dir():
        return path
    if not protocol:
        raise ConfigError(f"{path}: is a folder; --protocol says which of its scores.")
    return path / "scores" / f"{protocol}.npz"


def _line(name: str, metrics: dict[str, Any]) -> str:
    missing = metrics["num_missing"]
    unread = f", {missing} of them unreadable, counted as wrong" if missing else ""
    return (
        f"{name}: top-1 {100 * metrics['top1']:.2f}  top-5 {100 * metrics['top5']:.2f}  "
        f"mean class {100 * metrics['mean_class']:.2f}  ({metrics['num_videos']} videos{unread})"
    )
