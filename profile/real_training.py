"""A minute of real training: JPEG folders, augmentation, loader, network, evaluation, checkpoints.

    python profile/real_training.py --device cuda --precision fp16 --out runs/minute --json
    torchrun --nproc-per-node gpu profile/real_training.py --device cuda --out runs/minute

The demo recipe on its generated clips, written as folders of JPEG files, so that neither a video
decoder nor the recipe parser has to be installed. After --seconds the run is stopped by a signal,
as a scheduler does it, continued, and ended with an evaluation. Ten steps are profiled
(profile/nsys_report.py <out>/profile).
"""

import argparse
import functools
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.engine.config import SECTIONS, Recipe, read_yaml
from accel.engine.distributed import World, start_world, stop_world
from accel.engine.journal import read_journal
from accel.engine.stop import StopRequested
from accel.engine.trainer import Trainer
from accel.errors import AccelError
from pipelines.cache import write_once
from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.synthetic import CLASSES, render_clip

QUALITY = 95  # of the JPEG files


def write_clip(folder: Path, job: tuple[str, int]) -> None:
    """Clip `index` of a split as `<split>/<class>/<index>/00001.jpg` and so on."""
    from PIL import Image

    split, index = job
    name, image = CLASSES[index % len(CLASSES)], index // len(CLASSES)
    rng = np.random.default_rng(np.random.SeedSequence((0, ("train", "val").index(split), image)))
    target = folder / split / name / f"{index:04d}"
    target.mkdir(parents=True)
    for number, frame in enumerate(render_clip(name, rng), start=1):
        Image.fromarray(frame).save(target / f"{number:05d}.jpg", quality=QUALITY)


def write_set(folder: Path, sizes: dict[str, int]) -> None:
    """All clips of both splits, by as many processes as there are cores."""
    jobs = [(split, index) for split, size in sizes.items() for index in range(size)]
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for _ in pool.map(functools.partial(write_clip, folder), jobs, chunksize=4):
            pass


def make_recipe(root: Path, size: int, args: argparse.Namespace) -> Recipe:
    """The demo recipe on the folders, by `size` processes; its values as they stand in the file."""
    path = Path(str(resources.files("accel") / "recipes" / "demo_motion8.yaml"))
    values = read_yaml(path)
    values["data"] = {"root": str(root)}
    settings: dict[str, Any] = {
        section: cls(**{key: _tuple(value) for key, value in values.get(section, {}).items()})
        for section, cls in SECTIONS.items()
    }
    recipe = Recipe(name="real_training", **settings)
    return replace(
        recipe,
        model=replace(recipe.model, name=args.model),
        precision=replace(recipe.precision, mode=args.precision),
        schedule=replace(recipe.schedule, epochs=args.epochs),
        train=replace(recipe.train, global_batch=recipe.train.micro_batch * size),
        log=replace(recipe.log, profile="torch", tensorboard=False),
        run=replace(recipe.run, device=args.device),
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def fit(recipe: Recipe, out: Path, world: World, seconds: float = 0) -> dict[str, Any] | None:
    """Train on; None where `seconds` ended it."""
    trainer = Trainer(recipe, out, world=world)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)) if seconds else None
    try:
        if timer is not None:
            timer.start()
        return trainer.fit()
    except StopRequested:
        return None
    finally:
        if timer is not None:
            timer.cancel()
        trainer.close()


def measure(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """What the command reports; nothing on ranks other than 0."""
    sizes = {"train": args.clips, "val": args.clips // 4}
    root = DataConfig().resolved_cache_dir() / f"motion8-jpeg-{args.clips}"
    write_once(root, lambda folder: write_set(folder, sizes))
    out = Path(args.out)
    recipe = make_recipe(root, world.size, args)
    summary = fit(recipe, out, world, args.seconds)
    stopped = summary is None
    world.barrier()
    if summary is None:  # ten steps more after the stop, then the evaluation
        done = sum("event" not in row for row in read_journal(out / "metrics.jsonl"))
        more = replace(recipe, train=replace(recipe.train, max_steps=done + 10))
        summary = fit(more, out, world)
    assert summary is not None
    if not world.is_main:
        return {}
    steps = [row for row in read_journal(out / "metrics.jsonl") if "event" not in row]
    if [row["iteration"] for row in steps] != list(range(len(steps))):
        raise DataError(f"{out / 'metrics.jsonl'}: the steps are not those of one run.")
    losses = [row["loss"] for row in steps if row["loss"] is not None]
    return {
        "processes": world.size,
        "stopped_and_resumed": stopped,
        "steps": len(steps),
        "skipped": sum(bool(row["skipped"]) for row in steps),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "val_top1": summary["val_top1"],
        "chance": 1 / summary["num_classes"],
        "clips_per_s_per_process": round(summary["clips_per_s"], 1),
        "data_wait": summary["data_wait"],
        "wall_s": summary["wall_s"],
        "loader": summary["loader"],
        "gpu": summary["gpu"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--model", default="tanet")
    parser.add_argument("--seconds", type=float, default=60, help="of training before the stop")
    parser.add_argument("--epochs", type=int, default=18, help="of the schedule, as in the demo")
    parser.add_argument("--clips", type=int, default=640, help="training clips, at least 32")
    parser.add_argument("--out", required=True, help="run folder; the same again continues it")
    parser.add_argument("--json", action="store_true", help="JSON as the last line of stdout")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if args.clips < 4 * len(CLASSES):
        parser.error(f"--clips: expected at least {4 * len(CLASSES)}, got {args.clips}.")
    try:
        world = start_world(args.device, timeout_s=120)
        result = measure(args, world)
    except (AccelError, DataError) as error:
        print(f"real_training: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        stop_world()
    if not world.is_main:
        return 0
    for name, value in result.items():
        print(f"{name:20}{value}")
    if args.json:
        print(json.dumps({"result": result}))
    return 0 if math.isfinite(result["loss_last"]) else 1


if __name__ == "__main__":
    sys.exit(main())
