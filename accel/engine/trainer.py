"""The training run: the loop over a task, its evaluations, checkpoints and journal."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from accel.engine import config as configs
from accel.engine.checkpoint import CheckpointStore
from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.execution import Launcher
from accel.engine.fit_memory import (
    StepMemory,
    fit_micro_batch,
    limit_memory,
    remembered_batch,
    with_micro_batch,
)
from accel.engine.gpu_sampling import GpuSampler
from accel.engine.journal import Journal, Progress, read_journal, rewind_journal
from accel.engine.memory import keep_freed_memory
from accel.engine.precision import Precision
from accel.engine.profiling import RECORDERS, StepProfiler
from accel.engine.recorder import StepRecorder, rates
from accel.engine.rehearsal import Rehearsal, random_batch
from accel.engine.report import draw_curves
from accel.engine.run import RunFolder, environment, resolve_device
from accel.engine.schedule import lr_factor
from accel.engine.seeding import set_deterministic
from accel.engine.state import (
    Counters,
    RunState,
    check_agreement,
    check_unchanged,
    circumstances,
    find_checkpoint,
)
from accel.engine.stop import StopRequested, StopSignals
from accel.engine.task import Setting, task_of
from accel.engine.timing import Ranges
from accel.errors import CheckpointError, ConfigError, DivergedError, is_full
from pipelines.errors import DataError
from pipelines.quarantine import Quarantine

logger = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe in a run folder.

    Args:
        recipe: what to do.
        out: the run folder; created, and locked while the trainer lives.
        resume: "auto" (continue what the folder holds, or start), "none" (the folder must be
            fresh), or the path of a checkpoint of a run (the folder must be fresh or that run's).
        resume_allow: dotted keys that may differ from the checkpoint's recipe; also "data" (other
            videos or labels), "decoders" and "world_size".
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
        self.world = world if world is not None else World()
        self.folder = RunFolder(out)
        fitted = remembered_batch(recipe, self.folder)
        if fitted is not None:
            recipe = with_micro_batch(recipe, fitted)
        self.recipe = recipe
        self.device = resolve_device(recipe.run.device, self.world.local_rank)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._on_close = contextlib.ExitStack()
        self._on_close.callback(limit_memory(recipe, self.device))
        set_deterministic(recipe.run.deterministic)
        self.precision = Precision(
            recipe.precision,
            self.device,
            mean=recipe.data.mean,
            std=recipe.data.std,
            frames_per_segment=recipe.model.frames_per_segment,
        )
        if not recipe.run.fit_memory:
            self._accumulation()  # refuse before anything is opened
        self._on_close.callback(self.folder.release)
        if self.world.is_main:
            self.folder.acquire()
        try:
            self.store = CheckpointStore(self.folder.checkpoints, recipe.checkpoint.keep_last)
            found = find_checkpoint(resume, self.folder, self.store, recipe)
            self._build(found, resume_allow, fitted=fitted is not None)
            if found is not None:
                self.state.restore(*found, resume_allow)
            if not self.finished():
                execution = found[1].get("execution") if found is not None else None
                self._launcher.settle(self.step, self._rehearse, execution)
        except BaseException:
            self.close()
            raise

    def _build(
        self, found: tuple[Path, dict[str, Any]] | None, allow: Sequence[str], *, fitted: bool
    ) -> None:
        """Data, network, optimizer, loaders and step; `fitted`: the micro-batch is known to fit."""
        path, stored = found if found is not None else (None, None)
        task_type = task_of(self.recipe)
        self.dataset = task_type.open_dataset(self.recipe, self.world)
        if self.world.size > 1:
            check_agreement(
                self.world,
                self.recipe,
                self.dataset,
                checkpoint=path.name if path is not None else "none",
                code=environment(self.device),
            )
        if self.recipe.run.fit_memory and not fitted:
            self.recipe = self._fitted(stored)
        recipe, self.accumulation = self.recipe, self._accumulation()
        if found is not None:
            # The task would refuse other videos or classes, too, but not say why they are others.
            check_unchanged(*found, circumstances(recipe, self.dataset, self.world), allow)
        self._launcher = Launcher(recipe, self.device, self.world, self.accumulation)
        self.ranges = Ranges(RECORDERS[recipe.log.profile])
        self.profiler = self._open_profiler()
        setting = Setting(
            recipe=recipe,
            world=self.world,
            device=self.device,
            precision=self.precision,
            ranges=self.ranges,
            accumulation=self.accumulation,
            graphs=self._launcher.graphs,
            quarantine=self.folder.quarantine,
            on_close=self._on_close,
        )
        self.task = task = task_type(setting, self.dataset, stored)
        self.model, self.optimizer, self.step = task.model, task.optimizer, task.step
        self.train_loader, self.val_loader = task.train_loader, task.val_loader
        self.state = RunState(task, recipe, self.dataset, self.world)

    @property
    def counters(self) -> Counters:
        """Where the run stands."""
        return self.state.counters

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        schedule = self.recipe.schedule
        planned = schedule.iterations or schedule.epochs * self.train_loader.steps_per_epoch
        return min(planned, self.recipe.train.max_steps or planned)

    def close(self) -> None:
        """Stop the loaders, give the folder back and lift the limit of memory."""
        self._on_close.close()

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
        if self.world.is_main:
            for split, loader in {"train": self.train_loader, **self.task.video_loaders}.items():
                logger.info("%s: %s", split, loader.description)
        self.profiler.check_window(self.total_steps - self.counters.iteration)
        journal = self._open_folder() if self.world.is_main else None
        self.world.barrier()
        progress = Progress(self.total_steps, self.recipe.log.progress_s)
        self._recorder = StepRecorder(
            journal,
            progress,
            self.precision.scaler,
            clips_per_step=self.recipe.train.global_batch / self.world.size,
            skip_nonfinite=self.recipe.train.skip_nonfinite,
            groups=[group.name for group in self.optimizer.groups],
        )
        self._failed_saves = 0
        self._started = time.monotonic() - self.counters.wall_s
        try:
            with GpuSampler(self.device) as self.gpu, StopSignals() as self._stop:
                try:
                    self._loop(journal, progress)
                except RuntimeError as error:
                    # Here a SIGTERM of the launcher, which ends the job too, is only noted.
                    if lost := self.world.explain(error):
                        raise lost from error
                    raise
        except DivergedError as error:
            raise DivergedError(f"{error} {self._after_divergence(error.facts)}") from error
        except DataError:
            # Nothing is lost, unless half a step has already moved the batch-norm statistics.
            if self.world.size == 1 and not self.step.underway:
                self._save()
            raise
        finally:
            self.profiler.stop()
            progress.clear()
            if journal is not None:
                journal.close()
        return self._finish() if self.world.is_main else {}

    def _after_divergence(self, facts: Mapping[str, Any] | None) -> str:
        """Write down what helps to find the cause; a sentence on how to go on."""
        entries = self.store.entries()
        last = str(self.store.folder / entries[-1].name) if entries else "none yet"
        if facts is not None and self.world.is_main:
            step = facts["iteration"] % self.train_loader.steps_per_epoch
            videos = self.train_loader.videos_of_step(facts["epoch"], step)
            self.folder.write_json("diverged.json", {**facts, "videos": videos})
            return f"Last checkpoint: {last}; diverged.json has the step's videos and gradients."
        return f"Last checkpoint: {last}."

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
        batches: Iterator[Any] | None = None
        while True:
            evaluating = self._evaluation_due() and counters.evaluated != counters.iteration
            best = False
            if evaluating:
                self._recorder.flush()
                progress.clear()
                best = self._evaluate(journal)
            if best or ((evaluating or batches is not None) and self._save_due()):
                self._save(required=counters.iteration >= self.total_steps)
            if counters.iteration >= self.total_steps:
                return
            self._stop_if_asked()
            epoch, step = divmod(counters.iteration, self.train_loader.steps_per_epoch)
            if batches is None or step == 0:
                batches = self.train_loader.epoch(epoch, start=step * self.accumulation)
            self._train_step(batches, epoch, journal)

    def _train_step(self, batches: Iterator[Any], epoch: int, journal: Journal | None) -> None:
        iteration = self.counters.iteration
        start, waited = time.perf_counter(), self.step.data_wait.total_s
        factor = lr_factor(self.recipe.schedule, iteration, self.train_loader.steps_per_epoch)
        lr = self.optimizer.set_lr(factor)
        with self.profiler.step():
            metrics = self.step(batches, iteration, stop=self._stop.received is not None)
            with self.ranges("metrics"):
                self._recorder.flush()  # the step before: the device is never idle meanwhile
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
        if journal is not None and (sample := self.gpu.take()):
            journal.gpu(iteration=self.counters.iteration, **sample)
        self._note_unusable(journal)

    @property
    def _quarantines(self) -> list[Quarantine]:
        return [loader.quarantine for loader in self.task.video_loaders.values()]

    def _note_unusable(self, journal: Journal | None) -> None:
        """Write down the videos that have been found to be unusable since the last call."""
        if journal is None:
            return
        for quarantine in self._quarantines:
            for video in quarantine.take_new():
                if (video.split, video.sample_id) not in self._noted:
                    journal.unusable(iteration=self.counters.iteration, **vars(video))

    def _evaluation_due(self) -> bool:
        iteration, per_epoch = self.counters.iteration, self.train_loader.steps_per_epoch
        every = self.recipe.test.every_steps or per_epoch * self.recipe.test.every_epochs
        return (iteration > 0 and iteration % every == 0) or iteration >= self.total_steps

    def _save_due(self) -> bool:
        iteration, settings = self.counters.iteration, self.recipe.checkpoint
        every = [settings.every_epochs * self.train_loader.steps_per_epoch]
        if settings.every_steps:
            every.append(settings.every_steps)
        return iteration >= self.total_steps or any(iteration % steps == 0 for steps in every)

    def _evaluate(self, journal: Journal | None) -> bool:
        """Evaluate and record; whether it is this run's best so far."""
        # With several ranks a stop waits for the end of the evaluation.
        poll = self._stop_if_asked if self.world.size == 1 else lambda: None
        self.state.scores = scores = self.task.measure(poll)
        done = self.counters.iteration
        self.counters.evaluated = done
        self.counters.wall_s = time.monotonic() - self._started
        if journal is not None:
            journal.evaluation(
                iteration=done,
                epoch=(done - 1) // self.train_loader.steps_per_epoch,
                **{f"val_{name}": value for name, value in asdict(scores).items()},
                wall_s=round(self.counters.wall_s, 3),
            )
            logger.info("step %d: %s", done, scores.text)
        for quarantine in self._quarantines:
            quarantine.refresh()  # what the other ranks have found
        self._note_unusable(journal)
        best: bool = scores.rating > self.state.best_top1
        self.state.best_top1 = max(self.state.best_top1, scores.rating)
        return best

    def _stop_if_asked(self) -> None:
        """Save and raise when any rank has received a stop signal.

        Several ranks learn of it together, when they read the metrics of the step that carried it.
        """
        own = self._stop.received is not None
        if own if self.world.size == 1 else self._recorder.stop_asked:
            self._save(required=True)
            raise StopRequested(self._stop.received)

    def _save(self, *, required: bool = False) -> None:
        """Write a checkpoint on rank 0.

        A failure is forgiven once in a row, unless this save is `required` because no later one
        would come; else it is raised on all ranks.
        """
        self._recorder.flush()
        problem: str | None = None
        if self.world.is_main:
            scores, counters = self.state.scores, self.counters
            rated = scores is not None and counters.evaluated == counters.iteration
            top1 = scores.rating if scores is not None and rated else None
            try:
                self.store.save(self.state.to_dict(), counters.iteration, top1)
                self._failed_saves = 0
            except CheckpointError as error:
                self._failed_saves += 1
                if self._failed_saves == 1 and not required:
                    logger.error("%s Training goes on; the next save must succeed.", error)
                else:
                    problem = error.problem
                    if isinstance(cause := error.__cause__, OSError):
                        remedy = "Make room" if is_full(cause) else "Make the folder writable"
                        problem += f" {remedy} and repeat the command."
        problem = self.world.share(problem)
        if problem is not None:
            raise CheckpointError(self.folder.checkpoints, problem)

    def _finish(self) -> dict[str, Any]:
        scores = self.state.scores
        assert scores is not None  # the loop ends with an evaluation
        entries, best = self.store.entries(), self.store.best()
        summary = {
            "recipe": self.recipe.name,
            **{f"val_{name}": value for name, value in asdict(scores).items()},
            "num_classes": self.dataset.num_classes,
            **rates([row for row in read_journal(self.folder.journal) if "event" not in row]),
            "wall_s": round(self.counters.wall_s, 3),
            "iterations": self.counters.iteration,
            "epochs": self.counters.iteration / self.train_loader.steps_per_epoch,
            "checkpoint": str(self.store.folder / entries[-1].name) if entries else None,
            "best_checkpoint": str(best) if best else None,
            f"best_val_{self.task.rating_name}": self.state.best_top1,
            "loader": self.train_loader.description,
            "decoded_whole": {
                split: loader.decoded_whole for split, loader in self.task.video_loaders.items()
            },
            "unusable": [video for each in self._quarantines for video in each.summary()],
            "execution": self.step.execution,
            "gpu": self.gpu.summary(),
            "recipe_sha256": configs.fingerprint(self.recipe),
        }
        draw_curves(self.folder.journal, self.folder.curves)
        self.folder.write_json(self.folder.summary.name, summary)  # the last: now it is finished
        return summary

    def _profile_facts(self) -> dict[str, Any]:
        facts = environment(self.device)
        return {
            "recipe": self.recipe.name,
            "recipe_sha256": configs.fingerprint(self.recipe),
            "model": self.recipe.model.name,
            "precision": self.recipe.precision.mode,
            "clips_per_step": self.recipe.train.global_batch // self.world.size,
            "processes": self.world.size,
            **{key: facts[key] for key in ("device", "versions", "revision", "command")},
            "gpu_sampled": self.gpu.summary(),
        }

    def _accumulation(self) -> int:
        train = self.recipe.train
        if train.global_batch % (train.micro_batch * self.world.size):
            raise ConfigError(
                f"train.global_batch: must be a multiple of train.micro_batch x processes = "
                f"{train.micro_batch} x {self.world.size}, got {train.global_batch}."
            )
        return train.global_batch // (train.micro_batch * self.world.size)

    def _fitted(self, stored: Mapping[str, Any] | None) -> Recipe:
        """The recipe with a micro-batch that fits; a run from a checkpoint keeps its own."""
        if stored is not None:
            return with_micro_batch(self.recipe, stored["recipe"]["train"]["micro_batch"])
        memory = StepMemory(self.recipe, self.dataset.num_classes, self.device, self.world.size)
        return fit_micro_batch(self.recipe, self.world, memory.limit, memory)

    def _rehearse(self) -> Rehearsal:
        clips, classes = self.recipe.train.micro_batch, self.dataset.num_classes
        return Rehearsal(self.step, random_batch(self.recipe, clips, classes, self.device))

    def _open_profiler(self) -> StepProfiler:
        log = self.recipe.log
        return StepProfiler(
            log if self.world.is_main else replace(log, profile="none"),
            self.folder.path / "profile",
            self.device,
            self._profile_facts,
        )

    def _open_folder(self) -> Journal:
        self.store.prepare()
        self.store.forget_after(self.counters.iteration)
        self.folder.write_text("recipe.yaml", configs.dump(self.recipe))
        facts = environment(self.device)
        now, then = facts["torch_threads"], self.folder.stored_environment().get("torch_threads")
        if self.counters.iteration and self.device.type == "cpu" and then not in (None, now):
            logger.info("run.threads: %s now, %s before: the last bits may be others.", now, then)
        self.folder.write_json("environment.json", facts)
        self.folder.summary.unlink(missing_ok=True)
        rewind_journal(self.folder.journal, self.counters.iteration, self.counters.evaluated)
        rows = read_journal(self.folder.journal)
        known = [row for row in rows if row.get("event") == "unusable"]
        self._noted = {(row["split"], row["sample_id"]) for row in known}
        return Journal(
            self.folder.journal,
            self.folder.path / "tensorboard" if self.recipe.log.tensorboard else None,
            purge_step=self.counters.iteration,
        )
