"""A published row from start to end: check the data, train, test, compare."""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.engine import config as configs
from accel.engine.checkpoint import write_atomically
from accel.engine.config import Recipe
from accel.engine.data import open_shared_dataset, warn_of_classes
from accel.engine.distributed import World
from accel.engine.dry_run import dry_run
from accel.engine.evaluate import protocol_views
from accel.engine.published import Row, dataset_of, facts, published_rows
from accel.engine.recipe_check import recipes_of_runs
from accel.engine.run import environment, resolve_device
from accel.engine.scores import ensemble, load_scores
from accel.engine.tester import evaluate_protocols, find_target
from accel.engine.trainer import Trainer
from accel.errors import ConfigError
from pipelines.annotations import VideoSet, format_list
from pipelines.datasets import Dataset
from pipelines.errors import DataError

_METRICS = ("top1", "top5", "mean_class")


@dataclass(frozen=True)
class Plan:
    """What a name stands for."""

    name: str
    recipes: tuple[Recipe, ...]
    """One, or the members of an ensemble, as they will run."""
    published: tuple[Recipe, ...]
    """The same, as shipped."""
    rows: tuple[Row, ...]
    """The rows that are measured; those of an ensemble need every recipe."""
    problems: tuple[str, ...]
    """How the data differs from the published set."""
    scale: float


def plan(
    name: str,
    out: Path,
    *,
    overrides: Mapping[str, str] | None = None,
    scale: float = 1.0,
    world: World | None = None,
) -> Plan:
    """Resolve a name and look at the data.

    Args:
        name: a recipe that stands for a published run (all its own rows are measured), or a row.
        out: folder of the reproduction; a share of the lists goes to `lists/` in it.
        overrides: dotted key -> text, for every recipe.
        scale: share of the videos and of the epochs, in (0, 1].
        world: this process among all.

    Raises:
        ConfigError: an unknown name, or a recipe that stands for nothing published.
        pipelines.errors.DataError: lists that cannot be read.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale: must be in (0, 1], got {scale}.")
    world = world or World()
    runs, rows = resolve(name)
    names = [recipes_of_runs()[run] for run in runs]
    published = [configs.load_recipe(recipe) for recipe in names]
    used, problems = [], []
    for run, recipe in zip(runs, names, strict=True):
        settings = configs.load_recipe(recipe, overrides)
        dataset = open_shared_dataset(settings, world)
        if world.is_main:
            warn_of_classes(dataset)  # of the whole lists: a share of them may lack some
        problems += _data_problems(run, settings, dataset)
        if scale < 1:
            scaled = _scaled(settings, dataset, scale, out, world)
            settings = configs.load_recipe(recipe, {**scaled, **(overrides or {})})
        used.append(settings)
    unique = tuple(dict.fromkeys(problems))
    return Plan(name, tuple(used), tuple(published), tuple(rows), unique, scale)


def resolve(name: str) -> tuple[list[str], list[Row]]:
    """The published runs and rows that a row or a recipe stands for."""
    rows = {row.name: row for row in published_rows()}
    if name in rows:
        return list(rows[name].runs), [rows[name]]
    run = {recipe: run for run, recipe in recipes_of_runs().items()}.get(name)
    if run is None:
        known = sorted([*rows, *recipes_of_runs().values()])
        raise ConfigError(
            f"reproduce: {name!r} is neither a row nor a recipe of a published run. "
            f"{configs.nearest(name, known, 'accel recipes')}"
        )
    return [run], [row for row in rows.values() if row.runs == (run,)]


def _data_problems(run: str, recipe: Recipe, dataset: Dataset) -> list[str]:
    """How the lists differ from the dataset of a run."""
    fact = facts()["datasets"][facts()["runs"][run]["dataset"]]
    problems = []
    for split, videos in (("train", dataset.train), ("val", dataset.val)):
        expected = fact[f"{split}_videos"]
        if expected and len(videos) != expected:
            problems.append(f"{split}: {len(videos)} videos, the published list has {expected}")
    stamp = Path(recipe.data.root).expanduser() / "dataset.json"
    if stamp.is_file():
        try:
            imported = json.loads(stamp.read_text(encoding="utf-8"))
            problems += _import_problems(imported, fact["id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{stamp}: cannot be read ({error})")
    return problems


def _import_problems(imported: dict[str, Any], expected: str) -> list[str]:
    """What `accel data import` says about the lists, against the dataset of the facts."""
    wanted, numbering = dataset_of(expected)
    problems = []
    if imported["dataset"] != wanted:
        problems.append(f"the lists are those of {imported['dataset']}, the recipe's are {wanted}")
    elif imported["numbering"] != numbering:
        problems.append(
            f"the labels are numbered in the {imported['numbering']} order, the recipe's in the "
            f"{numbering} one"
        )
    missing = {split: count for split, count in imported["missing"].items() if count}
    if missing:
        problems.append("missing videos: " + ", ".join(f"{v} of {k}" for k, v in missing.items()))
    return problems


def _scaled(
    recipe: Recipe, dataset: Dataset, scale: float, out: Path, world: World
) -> dict[str, str]:
    """Overrides for a run on a share of videos and epochs, spread evenly over the classes."""
    overrides = {
        "schedule.epochs": str(max(1, round(recipe.schedule.epochs * scale))),
        "schedule.kind": "constant",
        "schedule.milestones": "[]",
        "schedule.factors": "[]",
    }
    batch = min(recipe.train.global_batch, len(dataset.train))
    if batch < recipe.train.global_batch:
        micro = min(recipe.train.micro_batch, batch)
        overrides["train.micro_batch"] = str(micro)
        overrides["train.global_batch"] = str(batch - batch % micro)
    for split, videos, least in (("train", dataset.train, batch), ("val", dataset.val, 1)):
        path = (out / "lists" / f"{recipe.name}-{split}.txt").absolute()
        problem = None
        if world.is_main:
            count = min(len(videos), max(least, math.ceil(len(videos) * scale)))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, format_list(_share(videos, count)).encode())
            except OSError as error:
                problem = f"{path}: cannot be written: {error.strerror}."
        if problem := world.share(problem):
            raise ConfigError(problem)
        overrides[f"data.{split}_list"] = str(path)
    return overrides


def _share(videos: VideoSet, count: int) -> list[Any]:
    """`count` videos, as many of each class as evenness allows, in the order of the list."""
    by_label = np.argsort(videos.labels, kind="stable")
    places = np.linspace(0, len(videos) - 1, count).round().astype(int)
    return [videos[int(index)] for index in np.sort(by_label[places])]


def preview(job: Plan, world: World) -> list[dict[str, Any]]:
    """What each run would do, from a short measurement on this machine; writes nothing.

    Returns:
        Per recipe: `dry_run`'s report, hours of training, views and estimated hours of the tests,
        and GiB on disk.
    """
    reports = []
    for recipe in job.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(recipe, Path(scratch), resume="none", world=world)
            try:
                report = dry_run(trainer)
                forward_s = _forward_s(trainer)
            finally:
                trainer.close()
        protocols = dict.fromkeys(row.protocol for row in job.rows)
        test_s, views = 0.0, 0
        for name in protocols:
            wanted = protocol_views(name, recipe.test, recipe.augment)
            count = wanted.num_clips * wanted.num_crops * len(trainer.dataset.val)
            area = (wanted.size / recipe.augment.size) ** 2
            views += count
            test_s += count * area * forward_s / world.size
        kept = recipe.checkpoint.keep_last + 1
        reports.append(
            {
                "recipe": recipe.name,
                **report,
                "train_hours": round(report["expected_train_s"] / 3600, 3),
                "protocols": list(protocols),
                "test_views": views,
                "test_hours": round(test_s / 3600, 3),
                "disk_gib": round(kept * 8 * report["parameters"] / 2**30, 3),
            }
        )
    return reports


@torch.inference_mode()
def _forward_s(trainer: Trainer) -> float:
    """Seconds of one view's forward pass, after a first one."""
    recipe, device = trainer.recipe, trainer.device
    length = recipe.sampling.num_segments * recipe.model.frames_per_segment
    shape = (recipe.train.micro_batch, length, recipe.augment.size, recipe.augment.size, 3)
    clips = torch.zeros(shape, dtype=torch.uint8, device=device)
    trainer.model.eval()
    for _ in range(2):
        start = time.perf_counter()
        with trainer.precision.autocast():
            trainer.model(trainer.precision.network_input(clips))
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return elapsed / len(clips)


def reproduce(job: Plan, out: Path, world: World) -> dict[str, Any]:
    """Train every recipe of a plan (or continue), test all its rows, write `report.json`.

    Args:
        job: of `plan`.
        out: gets a run folder per recipe and the report.
        world: this process among all.

    Returns:
        The report, on all processes.
    """
    start = time.perf_counter()
    runs = {}
    for recipe, shipped in zip(job.recipes, job.published, strict=True):
        folder = out / recipe.name
        trainer = Trainer(recipe, folder, world=world)
        try:
            trainer.fit()
        finally:
            trainer.close()
        world.barrier()
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        runs[recipe.name] = {
            "deviations": deviations(shipped, recipe, world),
            "videos": {"train": len(trainer.dataset.train), "val": len(trainer.dataset.val)},
            "fingerprints": trainer.dataset.fingerprints,
            "train_s": summary["wall_s"],
            "clips_per_s": summary["clips_per_s"],
            "energy_wh": _energy_wh(summary),
            "iterations": summary["iterations"],
        }
    rows = [_measure(row, job, out, world) for row in job.rows]
    report = {
        "name": job.name,
        "scale": job.scale,
        "data_problems": list(job.problems),
        "rows": rows,
        "runs": runs,
        "processes": world.size,
        "wall_s": round(time.perf_counter() - start, 1),
        "environment": environment(resolve_device(job.recipes[0].run.device, world.local_rank)),
    }
    if world.is_main:
        write_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _energy_wh(summary: Mapping[str, Any]) -> float | None:
    """Of the first GPU during training; None where its power is not reported."""
    power = (summary.get("gpu") or {}).get("gpu_power_w")
    return None if power is None else round(power * summary["wall_s"] / 3600, 3)


def _measure(row: Row, job: Plan, out: Path, world: World) -> dict[str, Any]:
    """Test one row: its protocol on every member, and their sum if there are several."""
    overrides = {key: as_text(value) for key, value in row.overrides.items()}
    files = []
    for recipe in job.recipes:
        folder = out / recipe.name
        kept = folder / row.name if overrides else folder
        target = find_target(str(folder), out=str(kept), overrides=overrides)
        evaluate_protocols(replace(target, out=kept), [row.protocol], world=world)
        files.append(kept / "scores" / f"{row.protocol}.npz")
    world.barrier()
    members = [load_scores(path) for path in files]
    metrics = ensemble(members, [1.0] * len(members)).metrics()
    measured = {key: round(100 * metrics[key], 2) for key in _METRICS}
    return {
        "row": row.name,
        "recipes": [recipe.name for recipe in job.recipes],
        "protocol": row.protocol,
        "published": row.published,
        "measured": measured,
        "difference": {
            key: round(measured[key] - row.published[key], 2)
            for key in _METRICS
            if key in row.published
        },
    }


def deviations(published: Recipe, used: Recipe, world: World) -> dict[str, list[Any]]:
    """What differs from the shipped recipe and may change results: key -> [published, used]."""
    changed = configs.diff(configs.to_dict(published), configs.to_dict(used))
    found = {key: list(pair) for key, pair in changed.items() if not configs.is_harmless(key)}
    found.pop("model.pretrained", None)
    if used.published.init != "none" and not used.model.pretrained:
        found["published.init"] = [used.published.init, "random"]
    if used.precision.mode != "fp32":
        found["precision.mode"] = ["fp32", used.precision.mode]
    return found


def check_data(job: Plan, *, accept: bool) -> None:
    """Refuse data that is not the published set, unless that is accepted.

    Raises:
        pipelines.errors.DataError: naming every difference.
    """
    if job.problems and not accept:
        raise DataError(
            f"{job.name}: the data is not the published set: {'; '.join(job.problems)}. Correct it "
            "(accel data import), or pass --accept-data to go on; the report then says so."
        )


def report_lines(report: Mapping[str, Any]) -> Sequence[str]:
    """The report as a table, published beside measured, in percent."""
    lines = [
        f"{'row':32}{'test':7}{'metric':12}{'published':>10}{'measured':>10}{'difference':>12}"
    ]
    for row in report["rows"]:
        for key in _METRICS:
            if key in row["published"]:
                lines.append(
                    f"{row['row']:32}{row['protocol']:7}{key:12}{row['published'][key]:10.2f}"
                    f"{row['measured'][key]:10.2f}{row['difference'][key]:+12.2f}"
                )
    for name, run in report["runs"].items():
        energy = f", {run['energy_wh']:.1f} Wh" if run["energy_wh"] is not None else ""
        lines.append(
            f"{name}: {run['iterations']} steps in {run['train_s']:.0f} s, "
            f"{run['clips_per_s']:.1f} clips/s{energy}"
        )
        lines += [
            f"  {key}: {old} published, {new} here" for key, (old, new) in run["deviations"].items()
        ]
    lines += [f"data: {problem}" for problem in report["data_problems"]]
    if report["scale"] < 1:
        lines.append(f"scale {report['scale']:g}: tests the chain, not the published numbers")
    return lines


def as_text(value: object) -> str:
    """A value of a recipe as the command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
