"""`run.fit_memory`: the largest micro-batch whose training steps fit a card, or a part of it."""

import gc
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from accel.engine import config as configs
from accel.engine.config import Recipe
from accel.engine.distributed import World
from accel.engine.optim import Optimizer
from accel.engine.precision import Precision
from accel.engine.rehearsal import Rehearsal, random_batch
from accel.engine.run import RunFolder
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.errors import ConfigError
from accel.models import build_model
from accel.models.recompute import recompute_activations

logger = logging.getLogger(__name__)

USABLE = 0.9
"""Share of the memory that steps may take; the rest is for the context, decoders, fragmentation."""
_UNITS = {"GB": 10**9, "GiB": 2**30}
# No engine: none whose workspace could be had. Not initialized: their handles need memory, too.
_OUT_OF_MEMORY = (
    "out of memory",
    "nable to find an engine",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)

Measure = Callable[[int], int | None]
"""Clips of a micro-batch -> bytes that steps with it take at most, or None: they do not fit."""


def cap_bytes(setting: str) -> int | None:
    """The limit that `run.fit_memory` names, in bytes; None: that of the card."""
    match = re.fullmatch(r"([\d.]+)(GB|GiB)", setting)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def sizes(global_batch: int, processes: int) -> list[int]:
    """Clips per micro-batch that add up to a global batch, ascending."""
    share = global_batch // processes
    return [n for n in range(1, share + 1) if global_batch % (n * processes) == 0]


def largest_that_fits(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest candidate that fits, or None, with few trials: doubling, then bisection.

    Args:
        candidates: ascending; when one does not fit, no larger one does.
        fits: tries one.
    """
    low, high = -1, len(candidates)  # positions of one that fits and of one that does not
    wanted = candidates[0]
    while low + 1 < high:
        untried = range(low + 1, high)
        doubled = [i for i in untried if candidates[i] >= wanted]
        failed = high < len(candidates)
        middle = (low + high) // 2 if failed else doubled[0] if doubled else untried[-1]
        if fits(candidates[middle]):
            low, wanted = middle, 2 * candidates[middle]
        else:
            high = middle
    return candidates[low] if low >= 0 else None


def remembered_batch(recipe: Recipe, folder: RunFolder) -> int | None:
    """The micro-batch that a run in this folder has found with the same setting, or None."""
    path = folder.path / "recipe.yaml"
    if not recipe.run.fit_memory or not path.exists():
        return None
    stored = configs.recipe_of(configs.read_yaml(path), str(path), name=recipe.name)
    return stored.train.micro_batch if stored.run.fit_memory == recipe.run.fit_memory else None


def with_micro_batch(recipe: Recipe, clips: int) -> Recipe:
    """The recipe with another `train.micro_batch`."""
    return replace(recipe, train=replace(recipe.train, micro_batch=clips))


def limit_memory(recipe: Recipe, device: torch.device) -> Callable[[], None]:
    """Let this process allocate no more than `run.fit_memory` names.

    Returns:
        What lets it allocate as much as before.

    Raises:
        ConfigError: the device is not a GPU.
    """
    if not recipe.run.fit_memory:
        return lambda: None
    if device.type != "cuda":
        raise ConfigError(
            f"run.fit_memory: measures the memory of a GPU, this run is on {device.type}; set "
            "train.micro_batch instead."
        )
    cap = cap_bytes(recipe.run.fit_memory)
    if cap is None:
        return lambda: None
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    return lambda: torch.cuda.set_per_process_memory_fraction(before, device)


def fit_micro_batch(recipe: Recipe, world: World, limit: int, measure: Measure) -> Recipe:
    """The recipe with the largest `train.micro_batch` whose steps fit.

    `train.global_batch` and with it the learning rate stay: more or fewer micro-batches are
    accumulated. What changes is how many clips batch norm sees.

    Args:
        recipe: of the run.
        world: rank 0 measures for all.
        limit: bytes that this process can have; the rank with the fewest decides.
        measure: tries real steps.

    Raises:
        ConfigError: not even one clip fits.
    """
    train = recipe.train
    limit = world.minimum(limit)
    tried: dict[int, int | None] = {}

    def fits(clips: int) -> bool:
        taken = tried[clips] = measure(clips)
        return taken is not None and taken <= USABLE * limit

    possible = sizes(train.global_batch, world.size)
    if not possible:
        raise ConfigError(
            f"train.global_batch: must be a multiple of the {world.size} processes, got "
            f"{train.global_batch}."
        )
    answer = str(largest_that_fits(possible, fits)) if world.is_main else None
    answer = world.share(answer)
    if answer is None or not answer.isdecimal():
        raise ConfigError(
            f"run.fit_memory: not even {possible[0]} clip per forward fits {USABLE:.0%} of "
            f"{limit / 1e9:.1f} GB; use train.checkpoint_activations block, 16 bits "
            "(precision.mode), a smaller test.batch or a smaller network."
        )
    clips = int(answer)
    if world.is_main:
        listed = ", ".join(
            f"{n}: {'does not fit' if taken is None else f'{taken / 1e9:.2f} GB'}"
            for n, taken in sorted(tried.items())
        )
        logger.info(
            "run.fit_memory: train.micro_batch %d, accumulated %d times; batch norm sees %d clips. "
            "Steps took (clips: memory) %s; %.0f %% of %.1f GB may be used.",
            clips,
            train.global_batch // (clips * world.size),
            clips,
            listed,
            USABLE * 100,
            limit / 1e9,
        )
    return with_micro_batch(recipe, clips)


class StepMemory:
    """Measures real steps, optimizer included, of a network of its own on random clips.

    Steps and evaluation are measured launched eagerly, in one process. Where steps may be replayed
    as graphs, what both take is added up, as graphs keep theirs; where several processes exchange
    gradients, the buckets are added, as they stay while activations are at their peak.

    Args:
        recipe: of the run.
        num_classes: K.
        device: a GPU.
        processes: that share the global batch.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, device: torch.device, processes: int
    ) -> None:
        self._recipe, self._classes, self._device = recipe, num_classes, device
        self._processes = processes
        settings = asdict(replace(recipe.model, pretrained=""))
        segments = recipe.sampling.num_segments
        model = build_model(**settings, num_classes=num_classes, num_segments=segments)
        recompute_activations(model, recipe.train.checkpoint_activations)
        self._model = model.to(device)
        self._optimizer = Optimizer(self._model, recipe.optim)

    @property
    def limit(self) -> int:
        """Bytes that this process can have: the cap, or what is free and what it has."""
        free, _ = torch.cuda.mem_get_info(self._device)
        available = free + torch.cuda.memory_reserved(self._device)
        return min(available, cap_bytes(self._recipe.run.fit_memory) or available)

    def __call__(self, clips: int) -> int | None:
        """Bytes that a run with `clips` clips per forward takes at most; None: out of memory."""
        own = self._recipe.test.batch or clips
        step = self._peak(lambda: self._run(clips))
        evaluation = self._peak(lambda: self._evaluate(own)) if step is not None else None
        if step is None or evaluation is None:
            return None
        if self._processes > 1:
            step += sum(p.numel() * p.element_size() for p in self._optimizer.parameters())
        graphs = self._recipe.train.execution in ("auto", "graph", "graph+compile")
        return step + evaluation if graphs else max(step, evaluation)

    def _peak(self, work: Callable[[], None]) -> int | None:
        """Bytes that `work` reserves at most; None: out of memory."""
        self._empty()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            work()
            return torch.cuda.max_memory_reserved(self._device)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return None
        finally:
            self._empty()

    def _run(self, clips: int) -> None:
        recipe = self._recipe
        # From the second micro-batch on, gradients exist beside the activations.
        accumulation = min(2, recipe.train.global_batch // (clips * self._processes))
        step = TrainStep(
            self._model,
            self._optimizer,
            self._precision(),
            accumulation=accumulation,
            clip_norm=recipe.optim.clip_norm,
            seed=recipe.run.seed,
            world=World(),
            ranges=Ranges("off"),
        )
        Rehearsal(step, random_batch(recipe, clips, self._classes, self._device)).run(2)

    def _precision(self) -> Precision:
        return Precision(
            self._recipe.precision,
            self._device,
            mean=self._recipe.data.mean,
            std=self._recipe.data.std,
            frames_per_segment=self._recipe.model.frames_per_segment,
        )

    @torch.inference_mode()
    def _evaluate(self, clips: int) -> None:
        precision = self._precision()
        batch = random_batch(self._recipe, clips, self._classes, self._device)
        self._model.eval()
        try:
            frames = precision.network_input(batch.clips)
            with precision.autocast():
                self._model(frames)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self._model.train()

    def _empty(self) -> None:
        self._optimizer.sgd.zero_grad(set_to_none=True)
        gc.collect()  # a step and its parts refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory is too small; cuDNN and cuBLAS say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )
