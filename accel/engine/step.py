"""One optimizer step: micro-batches, autocast, loss scaling, clipping, device-side finite check."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.engine.batchnorm import StepStatistics
from accel.engine.distributed import World
from accel.engine.graphs import DISTRIBUTED_WARM_UP_STEPS, WARM_UP_STEPS, Graphs, MicroStep, Replay
from accel.engine.optim import Optimizer
from accel.engine.precision import Precision
from accel.engine.seeding import seed_everything
from accel.engine.timing import Ranges, Stopwatch
from accel.models.heads import AuxiliaryLogits
from accel.models.recompute import Recompute
from pipelines.loader import Batch

Execution = Literal["eager", "graph", "compile", "graph+compile"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch sizes and an early end."""

    global_batch: int = 64
    """Clips per optimizer step over all processes; optim.lr is for it."""
    micro_batch: int = 8
    """Clips per forward of one process; batch norm sees these. global_batch must be a multiple of
    micro_batch x processes; the quotient is the number of accumulated micro-batches."""
    sync_bn: bool = False
    """Several processes: 2-D batch norms see the clips of all of them (in the fused operator);
    false: those of one process, as published."""
    execution: Literal["auto", "eager", "graph", "compile", "graph+compile"] = "eager"
    """How a step is launched: "eager" (operator by operator), "graph" (all of it, optimizer
    included, recorded once as a CUDA graph and replayed), "compile" (the network by torch.compile),
    "graph+compile", or "auto" (a short measurement before the first step; a resumed run does what
    it did before). Eagerly, with the reason, where the wanted way cannot be."""
    checkpoint_activations: Recompute = "none"
    """What is computed again in the backward to save memory: "none", every residual "block", or
    every "stage" of them. Losses, gradients and statistics stay the same."""
    skip_nonfinite: int = 0
    """Steps in a row without a finite gradient that are left out, batch-norm statistics included,
    before the run ends; fp16, where the loss scale makes some, has its own limit (20)."""
    max_steps: int = 0
    """End after so many optimizer steps although the schedule is longer; 0 = the whole schedule."""

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"train.micro_batch: must be >= 1, got {self.micro_batch}.")
        if self.global_batch < 1:
            raise ValueError(f"train.global_batch: must be >= 1, got {self.global_batch}.")
        if self.skip_nonfinite < 0:
            raise ValueError(f"train.skip_nonfinite: must be >= 0, got {self.skip_nonfinite}.")
        if self.max_steps < 0:
            raise ValueError(
                f"train.max_steps: must be >= 0 (0 = whole schedule), got {self.max_steps}."
            )


def training_loss(output: Tensor | AuxiliaryLogits, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the clips, plus that of an auxiliary head times its weight.

    Args:
        output: of a network in training mode, for N clips.
        labels: [N], int64.

    Returns:
        Scalar, float32.
    """
    if isinstance(output, AuxiliaryLogits):
        auxiliary = F.cross_entropy(output.auxiliary.float(), labels)
        return F.cross_entropy(output.logits.float(), labels) + output.weight * auxiliary
    return F.cross_entropy(output.float(), labels)


class TrainStep:
    """Runs optimizer steps on a (possibly wrapped) model. Nothing in it waits for the device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        *,
        accumulation: int,
        clip_norm: float,
        seed: int,
        world: World,
        ranges: Ranges,
        skips: bool = False,
    ) -> None:
        self._plain_model = self._model = model
        self._compiled_model: Any = None
        self._optimizer = optimizer
        self.precision = precision
        self._accumulation = accumulation
        self._clip_norm = clip_norm
        self._seed = seed
        self._world = world
        self.ranges = ranges
        # Where nothing is skipped, a step without a finite gradient ends the run.
        skips = skips or precision.scaler.is_enabled()
        self._statistics = StepStatistics(model) if skips else None
        # Loss, norm, skipped, norm of each group.
        self._results = torch.zeros(3 + len(optimizer.groups), device=precision.device)
        self._micro: MicroStep = self._micro_step
        self._way: Execution = "eager"
        self._replay: Replay | None = None
        self.data_wait = Stopwatch()
        self.underway = False
        """Between a step's first forward pass and its end: batch-norm statistics have moved on."""

    def __call__(self, batches: Iterator[Batch], iteration: int, *, stop: bool = False) -> Tensor:
        """One step on the next micro-batches.

        Args:
            batches: this rank's micro-batches, at the right position.
            iteration: 0-based; with the seed it fixes all random draws of the step (dropout).
            stop: this process has been asked to stop; the ranks learn of it with the metrics.

        Returns:
            [4 + G] float32 on the device: mean loss over all clips of the step, total gradient norm
            before clipping, 1 where the update was skipped because that norm is not finite (batch
            norm statistics are then as before), the number of processes asked to stop, and the
            gradient norm of each of the optimizer's G groups.
        """
        with self.ranges("step"):
            return self._run(batches, iteration, stop)

    @property
    def execution(self) -> Execution:
        """How steps are launched; no graphs once they have turned out to be impossible."""
        if self._replay is None or self._replay.problem is None:
            return self._way
        return "compile" if "compile" in self._way else "eager"

    def launch(self, way: Execution, graphs: Graphs | None) -> Replay | None:
        """From now on launch steps in this way.

        Args:
            way: "graph": after a few steps that warm up; the optimizer's rates must be tensors on
                the device.
            graphs: records steps, for the ways that replay.

        Returns:
            What replays, if anything does.
        """
        self._model = self._compiled() if "compile" in way else self._plain_model
        self._micro = self._micro_step
        self._way, self._replay = way, None
        if "graph" not in way:
            return None
        assert graphs is not None
        alone = self._world.size == 1
        self._micro = self._replay = Replay(
            self._micro_step,
            graphs,
            parameters=self._optimizer.parameters(),
            warm_up=WARM_UP_STEPS if alone else DISTRIBUTED_WARM_UP_STEPS,
            undo=self.abandon,
            fall_back=alone,
        )
        return self._replay

    def state(self) -> list[Tensor]:
        """All tensors that a step changes, besides the loss scale."""
        own = self._plain_model.state_dict()
        return [*own.values(), *self._optimizer.state_dict().values()]

    def abandon(self) -> None:
        """Forget a step that was only recorded, or that an error ended."""
        self.precision.forget_unscaling()
        self._optimizer.sgd.zero_grad(set_to_none=True)
        self.underway = False

    def _compiled(self) -> nn.Module:
        if self._compiled_model is None:
            self._compiled_model = torch.compile(self._plain_model, fullgraph=True, dynamic=False)
        model: nn.Module = self._compiled_model
        return model

    def _run(self, batches: Iterator[Batch], iteration: int, stop: bool) -> Tensor:
        for micro_step, batch in enumerate(self._micro_batches(batches)):
            self.underway = True
            # The number of this micro-batch among those of all ranks: dropout is the same for any
            # number of processes. (The 0 was the rank: bits of runs of one process stay.)
            place = micro_step * self._world.size + self._world.rank
            seed_everything(self._seed, "forward", iteration, place, 0)
            self._micro(batch, micro_step == 0, micro_step == self._accumulation - 1)
        self.underway = False
        # Filled on the device: a tensor made of host data would be a copy that waits.
        totals = torch.zeros(2, device=self.precision.device)  # loss, stop
        totals[0].copy_(self._results[0])
        if stop:
            totals[1].fill_(1)
        if self._world.size > 1:
            with self.ranges("all-reduce"):
                self._world.sum_([totals])
            totals[0] /= self._world.size
        return torch.cat([totals[:1], self._results[1:3], totals[1:], self._results[3:]])

    def _micro_step(self, batch: Batch, first: bool, last: bool) -> None:
        """Everything that the device does for one micro-batch; a CUDA graph can hold it."""
        if first:
            self._results.zero_()
            if self._statistics is not None:
                self._statistics.keep()
        with self._without_sync(last):
            loss = self._forward(batch) / self._accumulation
            with self.ranges("backward"):
                torch.autograd.backward(self.precision.scaler.scale(loss))
                loss = loss.detach()  # the graph goes now
        self._results[0] += loss.float()
        if last:
            with self.ranges("optimizer"):
                norm, skipped = self._update()
                if self._statistics is not None:
                    self._statistics.restore_if(skipped)
                self._results[1].copy_(norm)
                self._results[2].copy_(skipped)

    def _micro_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches of this step, each when its turn comes."""
        for _ in range(self._accumulation):
            with self.ranges("data wait"), self.data_wait.running():
                batch = next(batches)
            yield batch

    def _forward(self, batch: Batch) -> Tensor:
        with self.ranges("ingest"):
            frames = self.precision.network_input(batch.clips, batch.colors)
        with self.precision.autocast():
            with self.ranges("forward"):
                output = self._model(frames)
            with self.ranges("loss"):
                return training_loss(output, batch.labels)

    def _update(self) -> tuple[Tensor, Tensor]:
        sgd: Any = self._optimizer.sgd
        scaler = self.precision.scaler
        if scaler.is_enabled():
            scaler.unscale_(sgd)
        parameters, norms = [], []
        for place, group in enumerate(self._optimizer.groups, start=3):
            trained = [p for p in group.params.values() if p.grad is not None]
            if trained:
                parameters += trained
                gradients = [p.grad for p in trained if p.grad is not None]
                norms.append(nn.utils.get_total_norm(gradients))
                self._results[place].copy_(norms[-1])
        norm = torch.linalg.vector_norm(torch.stack(norms))
        skipped = (~torch.isfinite(norm)).float()
        if self._clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        if scaler.is_enabled():
            scaler.step(sgd)
            scaler.update()
        else:
            # The fused kernel reads the flag on the device: a non-finite step changes nothing, and
            # the host learns of it when it reads the step's metrics.
            sgd.found_inf = skipped
            sgd.step()
        sgd.zero_grad(set_to_none=True)
        return norm, skipped

    def _without_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Under DDP only the last micro-batch exchanges gradients."""
        if self._world.size > 1 and not last:
            return self._model.no_sync()  # type: ignore[operator, no-any-return]
        return contextlib.nullcontext()
