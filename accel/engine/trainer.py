"""The training run: composes loader, model, step, evaluation, checkpoints and journal."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import accel
from accel.engine import config as configs
from accel.engine.checkpoint import CheckpointStore, load_verified
from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.evaluate import evaluate
from accel.engine.journal import Journal, Progress, rewind_journal
from accel.engine.metrics import Scores
from accel.engine.optim import Optimizer
from accel.engine.precision import Precision
from accel.engine.recorder import StepRecorder
from accel.engine.report import draw_curves
from accel.engine.run import RunFolder, environment, resolve_device
from accel.engine.schedule import lr_factor
from accel.engine.seeding import seed_everything, set_deterministic
from accel.engine.step import TrainStep
from accel.engine.stop import StopRequested, StopSignals
from accel.engine.timing import Ranges
from accel.errors import CheckpointError, ConfigError
from accel.models import build_model
from pipelines.datasets import Dataset, open_dataset
from pipelines.loader import Batch, Loader, build_loader

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Where a run stands; together with the recipe it determines everything that follows."""

    iteration: int = 0
    """Optimizer steps done."""
    evaluated: int = -1
    """`iteration` at the last completed evaluation, -1 if none."""
    wall_s: float = 0.0
    """Seconds spent so far, over all processes that worked on the run one after another."""


class Trainer:
    """One run of a recipe in a run folder.

    Args:
        recipe: what to do.
        out: the run folder; created, and locked while the trainer lives.
        resume: "auto" (continue what the folder holds, or start), "none" (the folder must be
            fresh), or the path of a checkpoint of a run (the folder must be fresh or that run's).
        resume_allow: dotted keys that may differ from the checkpoint's recipe; also "data" (other
            videos or labels) and "world_size".
        world: this process among all.

    Raises:
        ConfigError, CheckpointError, pipelines.errors.DataError: before anything is overwritten.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        resume: str = "auto",
        resume_allow: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        self.recipe = recipe
        self.world = world if world is not None else World()
        self.folder = RunFolder(out)
        self.device = resolve_device(recipe.run.device, self.world.local_rank)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        set_deterministic(recipe.run.deterministic)
        self.precision = Precision(recipe.precision, self.device)
        self.accumulation = self._accumulation()
        self._loaders: list[Loader] = []
        if self.world.is_main:
            self.folder.acquire()
        try:
            self.store = CheckpointStore(self.folder.checkpoints, recipe.checkpoint.keep_last)
            found = self._find_checkpoint(resume)
            self.dataset = self._open_dataset()
            self._build()
            self.counters = Counters()
            self.scores: Scores | None = None
            if found is not None:
                self._restore(*found, resume_allow)
        except BaseException:
            self.close()
            raise

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        planned = self.recipe.schedule.epochs * self.train_loader.steps_per_epoch
        return min(planned, self.recipe.train.max_steps or planned)

    def close(self) -> None:
        """Stop the loaders and give the folder back."""
        for loader in self._loaders:
            loader.close()
        self.folder.release()

    def fit(self) -> dict[str, Any]:
        """Train to the end of the schedule and evaluate.

        Returns:
            The summary, as in `summary.json` (empty on ranks other than 0).

        Raises:
            StopRequested: a signal asked for it; the state is saved.
            DivergedError: a non-finite loss or gradient; nothing non-finite is saved.
            pipelines.errors.DataError: a clip could not be delivered.
        """
        if self.finished():
            logger.info("%s is finished: nothing to do.", self.folder.path)
            return dict(json.loads(self.folder.summary.read_text(encoding="utf-8")))
        journal = self._open_folder() if self.world.is_main else None
        self.world.barrier()
        progress = Progress(self.total_steps, self.recipe.log.progress_s)
        self._recorder = StepRecorder(
            journal,
            progress,
            self.precision.scaler,
            global_batch=self.recipe.train.global_batch,
        )
        self._failed_saves = 0
        self._started = time.monotonic() - self.counters.wall_s
        try:
            with StopSignals() as self._stop:
                self._loop(journal, progress)
        finally:
            progress.clear()
            if journal is not None:
                journal.close()
        return self._finish() if self.world.is_main else {}

    def finished(self) -> bool:
        """Whether the folder holds the complete run already."""
        done = self.counters.iteration
        return (
            done >= self.total_steps
            and self.counters.evaluated == done
            and self.folder.summary.exists()
        )

    def _loop(self, journal: Journal | None, progress: Progress) -> None:
        counters = self.counters
        batches: Iterator[Batch] | None = None
        while True:
            evaluating = self._evaluation_due() and counters.evaluated != counters.iteration
            if evaluating:
                self._recorder.flush()
                progress.clear()
                self._evaluate(journal)
            if (evaluating or batches is not None) and self._save_due():
                self._save()
            if counters.iteration >= self.total_steps:
                return
            self._stop_if_asked()
            epoch, step = divmod(counters.iteration, self.train_loader.steps_per_epoch)
            if batches is None or step == 0:
                batches = self.train_loader.epoch(epoch, start=step * self.accumulation)
            self._train_step(batches, epoch)

    def _train_step(self, batches: Iterator[Batch], epoch: int) -> None:
        iteration = self.counters.iteration
        start, waited = time.perf_counter(), self.step.data_wait.total_s
        factor = lr_factor(self.recipe.schedule, iteration, self.train_loader.steps_per_epoch)
        lr = self.optimizer.set_lr(factor)
        metrics = self.step(batches, iteration)
        self._recorder.flush()  # the step before this one: the device is never idle meanwhile
        self.counters.iteration += 1
        self.counters.wall_s = time.monotonic() - self._started
        self._recorder.add(
            {
                "iteration": iteration,
                "epoch": epoch,
                "lr": lr,
                "wall_s": round(self.counters.wall_s, 3),
            },
            metrics,
            step_s=time.perf_counter() - start,
            wait_s=self.step.data_wait.total_s - waited,
        )

    def _evaluation_due(self) -> bool:
        iteration, per_epoch = self.counters.iteration, self.train_loader.steps_per_epoch
        at_epoch = iteration > 0 and iteration % (per_epoch * self.recipe.test.every_epochs) == 0
        return at_epoch or iteration >= self.total_steps

    def _save_due(self) -> bool:
        iteration, settings = self.counters.iteration, self.recipe.checkpoint
        every = [settings.every_epochs * self.train_loader.steps_per_epoch]
        if settings.every_steps:
            every.append(settings.every_steps)
        return iteration >= self.total_steps or any(iteration % steps == 0 for steps in every)

    def _evaluate(self, journal: Journal | None) -> None:
        self.scores = evaluate(
            self.model,
            self.val_loader,
            num_classes=self.dataset.num_classes,
            precision=self.precision,
            data=self.recipe.data,
            world=self.world,
            ranges=self.ranges,
            # With several ranks a stop waits for the end of the evaluation: ranks may hold
            # different numbers of batches, so they could not agree inside it.
            poll=self._stop_if_asked if self.world.size == 1 else lambda: None,
        )
        done = self.counters.iteration
        self.counters.evaluated = done
        self.counters.wall_s = time.monotonic() - self._started
        if journal is not None:
            journal.evaluation(
                iteration=done,
                epoch=(done - 1) // self.train_loader.steps_per_epoch,
                **{f"val_{name}": value for name, value in asdict(self.scores).items()},
                wall_s=round(self.counters.wall_s, 3),
            )
            logger.info(
                "step %d: val top-1 %.4f, loss %.4f", done, self.scores.top1, self.scores.loss
            )

    def _stop_if_asked(self) -> None:
        """Save and raise when any rank has received a stop signal."""
        if self.world.any(self._stop.received is not None, self.device):
            self._save()
            raise StopRequested(self._stop.received)

    def _save(self) -> None:
        """Write a checkpoint on rank 0; a second failure in a row is raised on all ranks."""
        self._recorder.flush()
        problem: str | None = None
        if self.world.is_main:
            rated = self.scores is not None and self.counters.evaluated == self.counters.iteration
            top1 = self.scores.top1 if self.scores is not None and rated else None
            try:
                self.store.save(self._state(), self.counters.iteration, top1)
                self._failed_saves = 0
            except CheckpointError as error:
                self._failed_saves += 1
                if self._failed_saves == 1:
                    logger.error("%s Training goes on; the next save must succeed.", error)
                else:
                    problem = error.problem
        problem = self.world.share(problem)
        if problem is not None:
            raise CheckpointError(self.folder.checkpoints, problem)

    def _finish(self) -> dict[str, Any]:
        assert self.scores is not None  # the loop ends with an evaluation
        entries, best = self.store.entries(), self.store.best()
        summary = {
            "recipe": self.recipe.name,
            **{f"val_{name}": value for name, value in asdict(self.scores).items()},
            "num_classes": self.dataset.num_classes,
            **self._recorder.rates(),
            "wall_s": round(self.counters.wall_s, 3),
            "iterations": self.counters.iteration,
            "epochs": self.counters.iteration / self.train_loader.steps_per_epoch,
            "checkpoint": str(self.store.folder / entries[-1].name) if entries else None,
            "best_checkpoint": str(best) if best else None,
            "best_val_top1": max(
                (e.val_top1 for e in entries if e.val_top1 is not None), default=None
            ),
            "loader": self.train_loader.description,
            "recipe_sha256": configs.fingerprint(self.recipe),
        }
        self.folder.write_json(self.folder.summary.name, summary)
        draw_curves(self.folder.journal, self.folder.curves)
        return summary

    def _accumulation(self) -> int:
        train = self.recipe.train
        if train.global_batch % (train.micro_batch * self.world.size):
            raise ConfigError(
                f"train.global_batch: must be a multiple of train.micro_batch x processes = "
                f"{train.micro_batch} x {self.world.size}, got {train.global_batch}."
            )
        return train.global_batch // (train.micro_batch * self.world.size)

    def _build(self) -> None:
        recipe = self.recipe
        seed_everything(recipe.run.seed, "model")
        self.model = build_model(
            **asdict(recipe.model),
            num_classes=self.dataset.num_classes,
            num_segments=recipe.sampling.num_segments,
        ).to(self.device)
        self.optimizer = Optimizer(self.model, recipe.optim)
        self.ranges = Ranges(recipe.log.nvtx)
        self.train_loader = self._open_loader("train", recipe.train.micro_batch)
        self.val_loader = self._open_loader("val", recipe.test.batch or recipe.train.micro_batch)
        self.step = TrainStep(
            self.world.wrap(self.model, self.device),
            self.optimizer,
            self.precision,
            data=recipe.data,
            accumulation=self.accumulation,
            clip_norm=recipe.optim.clip_norm,
            seed=recipe.run.seed,
            world=self.world,
            ranges=self.ranges,
        )

    def _open_dataset(self) -> Dataset:
        """The videos of both splits; rank 0 first, so that a generated set is written once."""
        if not self.world.is_main:
            self.world.barrier()
        dataset = open_dataset(self.recipe.data, progress=self.world.is_main)
        if self.world.is_main:
            self.world.barrier()
        return dataset

    def _open_loader(self, split: Literal["train", "val"], micro_batch: int) -> Loader:
        recipe = self.recipe
        try:
            loader = build_loader(
                self.dataset,
                split=split,
                sampling=recipe.sampling,
                augment=recipe.augment,
                loader=recipe.loader,
                seed=recipe.run.seed,
                micro_batch=micro_batch,
                global_batch=recipe.train.global_batch,
                rank=self.world.rank,
                world_size=self.world.size,
                device=self.device,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._loaders.append(loader)
        return loader

    def _open_folder(self) -> Journal:
        self.store.prepare()
        self.folder.write_text("recipe.yaml", configs.dump(self.recipe))
        self.folder.write_json("environment.json", environment(self.device))
        self.folder.summary.unlink(missing_ok=True)
        rewind_journal(self.folder.journal, self.counters.iteration, self.counters.evaluated)
        return Journal(
            self.folder.journal,
            self.folder.path / "tensorboard" if self.recipe.log.tensorboard else None,
        )

    def _state(self) -> dict[str, Any]:
        return {
            "format": "accel-run-1",
            "accel_version": accel.__version__,
            "model": self.model.state_dict(),
            "momentum": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "counters": asdict(self.counters),
            "scores": asdict(self.scores) if self.scores is not None else None,
            "recipe_name": self.recipe.name,
            "recipe": configs.to_dict(self.recipe),
            "data": self.dataset.fingerprints,
            "class_names": list(self.dataset.class_names),
            "world_size": self.world.size,
        }

    def _find_checkpoint(self, resume: str) -> tuple[Path, dict[str, Any]] | None:
        if resume == "auto":
            return self.store.load_latest()
        holds_run = self.folder.journal.exists() or bool(self.store.entries())
        if resume == "none":
            if holds_run:
                raise ConfigError(
                    f"--out {self.folder.path}: already holds a run; continue it with --resume "
                    "auto, or choose another folder."
                )
            return None
        path = Path(resume)
        if not path.is_file():
            raise ConfigError(
                f"--resume {resume}: no such checkpoint; give auto, none or a checkpoint's path."
            )
        if path.resolve().parent == self.store.folder.resolve():
            return path, self.store.load(self.store.folder / path.name)
        if holds_run:
            raise ConfigError(
                f"--out {self.folder.path}: already holds a run, and --resume {resume} belongs to "
                "another one; choose a fresh folder."
            )
        return path, load_verified(path)

    def _restore(self, path: Path, state: dict[str, Any], allow: Sequence[str]) -> None:
        """Continue from a verified checkpoint.

        Raises:
            ConfigError: recipe, data or number of processes differ in a way that changes results.
            CheckpointError: the contents do not fit the network.
        """
        changes = {
            key: pair
            for key, pair in configs.diff(state["recipe"], configs.to_dict(self.recipe)).items()
            if not configs.is_harmless(key)
        }
        if state["data"] != self.dataset.fingerprints:
            changes["data"] = ("the checkpoint's videos and labels", "others")
        if state["world_size"] != self.world.size:
            changes["world_size"] = (state["world_size"], self.world.size)
        changes = {key: pair for key, pair in changes.items() if key not in allow}
        if changes:
            listed = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
            raise ConfigError(
                f"resume from {path}: this run differs from the checkpoint in {listed}. Undo the "
                f"change, choose another --out, or pass --resume-allow {','.join(changes)}."
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["momentum"])
            if self.precision.scaler.is_enabled():
                self.precision.scaler.load_state_dict(state["scaler"])
            self.counters = Counters(**state["counters"])
            self.scores = Scores(**state["scores"]) if state["scores"] is not None else None
        except (RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(path, f"does not fit this run: {error}.") from error
        logger.info("resuming %s at step %d", path, self.counters.iteration)
