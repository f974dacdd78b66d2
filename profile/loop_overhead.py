"""What the training loop itself costs: all time that is not data, forward, backward or optimizer.

    python profile/loop_overhead.py                          # the demo recipe, one epoch
    python profile/loop_overhead.py --recipe own_videos --data.root /data/mine --json

Runs one epoch of a recipe in a scratch folder and clocks its ranges. The share counts seeds,
learning rates, metrics, journal and progress line, and the Python between the ranges. On a GPU the
host's clock sees launches only: use nsys_report.py there. On a machine that does other work compare
the `cpu` rows: processor time of the training thread, which no other process adds to.
"""

import argparse
import collections
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accel.engine.config import load_recipe, split_overrides
from accel.engine.timing import Ranges
from accel.engine.trainer import Trainer
from accel.errors import AccelError
from pipelines.errors import DataError

WORK = ("data wait", "ingest", "forward", "loss", "backward", "optimizer")


class ClockedRanges(Ranges):
    """Adds up the wall time of each range, and the processor time of its thread."""

    def __init__(self) -> None:
        super().__init__("off")
        self.wall: dict[str, float] = collections.defaultdict(float)
        self.cpu: dict[str, float] = collections.defaultdict(float)
        self._first: tuple[float, float] | None = None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter(), time.thread_time()
        self._first = self._first or start
        yield
        end = time.perf_counter(), time.thread_time()
        self.wall[name] += end[0] - start[0]
        self.cpu[name] += end[1] - start[1]
        if name == "metrics":  # the last of a step
            self.wall["all"], self.cpu["all"] = (
                after - before for after, before in zip(end, self._first, strict=True)
            )


def measure(recipe_name: str, overrides: dict[str, str]) -> dict[str, object]:
    """Times of the steps of one epoch, in which neither evaluation nor checkpoint falls."""
    recipe = load_recipe(recipe_name, {"log.tensorboard": "false", **overrides})
    clock = ClockedRanges()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        trainer = Trainer(recipe, out, resume="none")
        try:
            steps = trainer.train_loader.steps_per_epoch
            trainer.ranges = trainer.step.ranges = clock
            trainer.recipe = replace(recipe, train=replace(recipe.train, max_steps=steps))
            trainer.fit()
        finally:
            trainer.close()
    loop, loop_cpu = (
        times["all"] - sum(times[name] for name in WORK) for times in (clock.wall, clock.cpu)
    )
    return {
        "recipe": recipe.name,
        "steps": steps,
        "step_ms": clock.wall["all"] / steps * 1e3,
        **{f"{name}_ms".replace(" ", "_"): clock.wall[name] / steps * 1e3 for name in WORK},
        "loop_ms": loop / steps * 1e3,
        "loop_share": loop / clock.wall["all"],
        "step_cpu_ms": clock.cpu["all"] / steps * 1e3,
        "loop_cpu_ms": loop_cpu / steps * 1e3,
        "loop_cpu_share": loop_cpu / clock.cpu["all"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Further options are keys of the recipe."
    )
    parser.add_argument("--recipe", default="demo_motion8")
    parser.add_argument("--json", action="store_true", help="JSON as the last line of stdout")
    try:
        rest, overrides = split_overrides(sys.argv[1:])
        args = parser.parse_args(rest)
        values = measure(args.recipe, overrides)
    except (AccelError, DataError) as error:
        print(f"loop_overhead: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in values.items():
        print(f"{name:16}{value:10.4f}" if isinstance(value, float) else f"{name:16}{value:>10}")
    if args.json:
        print(json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
