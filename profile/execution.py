"""Ways to launch a step, compared: the same losses as eager, the ratio of times, and the memory.

    python profile/execution.py --device cuda --precision fp16 --batch 8 --json
    python profile/execution.py --models tsn --ways eager --size 64 --batch 2      # this CPU

For every network: steps launched eagerly, as CUDA graphs, compiled, and both; then eager steps with
activations that are computed again (train.checkpoint_activations). All begin with the same weights
and take the same clips. Exit code 1: losses differ by more than --tolerance, or a way fell back.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from typing import Any

import torch

from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.graphs import DeviceGraphs
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.rehearsal import random_batch
from accel.engine.run import environment
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.models import ModelConfig, build_model, list_models
from accel.models.recompute import recompute_activations
from pipelines.config import AugmentConfig, SamplingConfig

WAYS = ("eager", "graph", "compile", "graph+compile")
RECOMPUTED = ("block", "stage")
NUM_CLASSES = 174


def train(name: str, way: str, recomputed: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses, time of a step and memory of one network, launched in one way."""
    gc.collect()
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    recipe = Recipe(
        model=ModelConfig(name=name, depth=args.depth, width=args.width, stages=args.stages),  # type: ignore[arg-type]
        sampling=SamplingConfig(num_segments=8),
        augment=AugmentConfig(size=args.size, resize=0),
    )
    seed_everything(0, "model")
    model = build_model(
        **dataclasses.asdict(recipe.model), num_classes=NUM_CLASSES, num_segments=8
    ).to(args.device)
    recompute_activations(model, recomputed)  # type: ignore[arg-type]
    optimizer = Optimizer(model, OptimConfig(lr=1e-3))
    step = TrainStep(
        model,
        optimizer,
        Precision(
            PrecisionConfig(mode=args.precision),
            args.device,
            mean=recipe.data.mean,
            std=recipe.data.std,
            frames_per_segment=recipe.model.frames_per_segment,
        ),
        accumulation=args.accumulation,
        clip_norm=20.0,
        seed=0,
        world=World(),
        ranges=Ranges("off"),
    )
    graphs = DeviceGraphs(args.device) if "graph" in way else None
    replay = step.launch(way, graphs)  # type: ignore[arg-type]
    batch = random_batch(recipe, args.batch, NUM_CLASSES, args.device)
    metrics, times = [], []
    for iteration in range(args.steps):
        optimizer.set_lr(1 / (1 + iteration))
        begin = time.perf_counter()
        metrics.append(step(itertools.repeat(batch), iteration))
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    late = sorted(times[args.steps // 2 :])  # compiled and captured by then
    return {
        "model": name,
        "way": way,
        "checkpoint_activations": recomputed,
        "step_ms": round(late[len(late) // 2], 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "losses": [float(row[0]) for row in metrics],
        "problem": replay.problem if replay is not None else None,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to every row what it is beside the eager steps of its network."""
    eager = {row["model"]: row for row in rows if row["way"] == "eager"} | {
        row["model"]: row
        for row in rows
        if row["way"] == "eager" and row["checkpoint_activations"] == "none"
    }
    for row in rows:
        base = eager[row["model"]]
        pairs = zip(row["losses"], base["losses"], strict=True)
        row["loss_difference"] = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
        row["ratio_to_eager"] = round(row["step_ms"] / base["step_ms"], 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="tsn,tanet", help=f"comma-separated, of {', '.join(list_models())}")
    add("--ways", default="", help="comma-separated; default: on CUDA all, on a CPU eager")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32")
    add("--batch", type=int, default=8, help="clips per micro-batch")
    add("--accumulation", type=int, default=1, help="micro-batches per step")
    add("--size", type=int, default=224, help="height and width, px")
    add("--steps", type=int, default=20, help="the second half is timed")
    add("--depth", type=int, default=50)
    add("--width", type=int, default=64)
    add("--stages", type=int, default=4)
    add("--tolerance", type=float, default=0.02, help="of a loss, relative")
    add("--json", action="store_true", help="JSON as the last line of stdout")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"execution: torch {torch.__version__} sees no CUDA device.", file=sys.stderr)
        return 2
    args.device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    ways = [w for w in args.ways.split(",") if w] or (
        WAYS if args.device.type == "cuda" else WAYS[:1]
    )
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: unknown {', '.join(sorted(unknown))}; of {', '.join(WAYS)}.")
    rows = []
    for name in args.models.split(","):
        for way, recomputed in [(w, "none") for w in ways] + [("eager", r) for r in RECOMPUTED]:
            rows.append(train(name, way, recomputed, args))
    compare(rows)
    print(
        f"{'model':10}{'way':15}{'recomputed':12}{'step_ms':>10}{'ratio':>8}{'GiB':>8}{'loss':>10}"
    )
    for row in rows:
        print(
            f"{row['model']:10}{row['way']:15}{row['checkpoint_activations']:12}"
            f"{row['step_ms']:10.2f}{row['ratio_to_eager']:8.3f}{row['peak_gib'] or 0:8.2f}"
            f"{row['loss_difference']:10.1e} {row['problem'] or ''}"
        )
    if args.json:
        print(json.dumps({"environment": environment(args.device), "ways": rows}))
    same = all(row["loss_difference"] <= args.tolerance for row in rows)
    return 0 if same and not any(row["problem"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
