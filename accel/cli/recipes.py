"""`accel recipes`: the shipped recipes, the published rows they stand for, and a check of both."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from accel.cli.options import Parser
from accel.engine.config import shipped_recipes
from accel.engine.published import facts, published_rows
from accel.engine.published_detection import detection_rows
from accel.engine.recipe_check import (
    check_recipes,
    recipes_of_detection_runs,
    recipes_of_runs,
    resolve_row,
)


def main(argv: Sequence[str]) -> int:
    """List the recipes with their rows, or compare them with the facts."""
    parser = Parser(prog="accel recipes", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare every recipe with the published facts"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array of the rows")
    options = parser.parse_args(argv)
    if options.check:
        problems = list(check_recipes())
        for problem in problems:
            print(problem)
        rows, extra = len(facts()["rows"]), len(facts()["extra_rows"])
        print(
            f"{len(recipes_of_runs())} recipes, {rows} published rows and {extra} of model zoos; "
            f"{len(recipes_of_detection_runs())} of detectors, {len(detection_rows())} rows: "
            f"{len(problems) or 'no'} disagreement{'s' if len(problems) != 1 else ''}"
        )
        return 1 if problems else 0
    table = list(_table())
    if options.json:
        print(json.dumps(table + list(_detection_table()), indent=1))
        return 0
    print(f"{'row':32}{'test':6}{'top-1':>8}{'top-5':>8}{'mean':>8}  recipe")
    for row in table:
        numbers = "".join(
            f"{row['published'].get(key, ''):>8}" for key in ("top1", "top5", "mean_class")
        )
        print(f"{row['row']:32}{row['protocol']:6}{numbers}  {' + '.join(row['recipes'])}")
    print(f"\n{'detection row':32}{'fusion':6}{'@0.5':>8}{'@0.2':>8}{'frame':>8}  recipe")
    for row in _detection_table():
        numbers = "".join(
            f"{row['published'][key]:>8}"
            for key in ("video_map_50", "video_map_20", "frame_map_50")
        )
        print(f"{row['row']:32}{row['fusion']:6}{numbers}  {' + '.join(row['recipes'])}")
    named = {name for row in (*table, *_detection_table()) for name in row["recipes"]}
    print(f"\nrecipes without a row: {', '.join(sorted(set(shipped_recipes()) - named))}")
    return 0


def _detection_table() -> Iterator[dict[str, Any]]:
    for row in detection_rows():
        yield {
            "row": row.name,
            "recipes": [recipes_of_detection_runs()[run] for run in row.runs],
            "fusion": row.fusion,
            "published": row.published,
        }


def _table() -> Iterator[dict[str, Any]]:
    for row in published_rows():
        recipes = [recipe.name for recipe in resolve_row(row)]
        yield {
            "row": row.name,
            "recipes": recipes,
            "protocol": row.protocol,
            "published": row.published,
        }
