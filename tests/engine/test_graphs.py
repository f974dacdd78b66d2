"""Steps replayed as graphs are the steps themselves: a tape of operators stands in for a GPU's."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.engine.batchnorm import StepStatistics
from accel.engine.distributed import World
from accel.engine.graphs import WARM_UP_STEPS
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.seeding import seed_everything
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.errors import AccelError
from accel.models import build_model
from pipelines.loader import Batch

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Waiting(TorchDispatchMode):
    """Notes what waits for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            self.found.append("item waits for the device")
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape:
    """What CUDA graphs do, with operators in place of kernels.

    A capture runs no Python again: a replay calls the recorded operators on the recorded tensors
    and writes into the recorded results, so that host numbers and memory are those of the capture.
    As on a GPU, the capture itself leaves tensors and generators as they were.

    Args:
        tensors: everything that lives on: parameters, buffers, momentum, scale, results.
        blind: the last step that warms up shows nothing, as with what torch cannot see.
    """

    def __init__(self, tensors, blind=False):
        self.tensors, self.blind = tensors, blind
        self.side = self.captures = self.replays = self.pools = 0

    @contextlib.contextmanager
    def watch(self):
        with _Waiting() as waiting:
            yield [] if self.blind else waiting.found

    def new_pool(self):
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def side_stream(self):
        self.side += 1
        yield

    def capture(self, work, pool):
        assert pool == self.pools
        self.captures += 1
        gradients = [t.grad for t in self.tensors if t.is_leaf and t.grad is not None]
        kept = [(t, t.detach().clone()) for t in [*self.tensors, *gradients]]
        generator = torch.get_rng_state()
        try:
            with _Recording() as recording:
                work()
        finally:
            torch.set_rng_state(generator)
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)

        def replay():
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, result in recording.calls:
                    again = func(*args, **kwargs)
                    if func.is_view:
                        continue
                    pairs = zip(_tensors(result), _tensors(again), strict=True)
                    for recorded, new in pairs:
                        if recorded is not new:
                            recorded.copy_(new)

        return replay


def _tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Run:
    """A small network in training, eagerly or on a tape."""

    def __init__(
        self,
        mode="fp32",
        accumulation=1,
        *,
        graphs=False,
        broken=None,
        blind=False,
        name="tanet",
    ):
        seed_everything(0, "model")
        self.model = build_model(
            name, num_classes=3, num_segments=2, depth=18, width=8, stages=2, dropout=0.5
        )
        config = OptimConfig(lr=0.05, groups="tanet_original" if name == "tanet" else "plain")
        self.optimizer = Optimizer(self.model, config, device_rates=True)
        self.precision = Precision(
            PrecisionConfig(mode=mode, init_scale=2.0**10),
            CPU,
            mean=MEAN,
            std=STD,
            frames_per_segment=self.model.frames_per_segment,
        )
        scaler = self.precision.scaler
        scaler.scale(torch.zeros(()))  # the scale becomes a tensor at its first use
        scaler.set_growth_interval(4)
        self.step = TrainStep(
            self.model,
            self.optimizer,
            self.precision,
            accumulation=accumulation,
            clip_norm=1.0,
            seed=0,
            world=World(),
            ranges=Ranges("off"),
        )
        self.accumulation = accumulation
        if broken is not None:
            broken(self)
        if graphs:
            statistics = self.step._statistics
            joined = [*statistics._now, *statistics._before] if statistics else []
            scale = [scaler._scale, scaler._growth_tracker] if scaler.is_enabled() else []
            self.tape = Tape(
                [
                    *self.model.parameters(),
                    *self.model.buffers(),
                    *joined,
                    *self.optimizer.state_dict().values(),
                    *scale,
                    self.step._results,
                ],
                blind,
            )
            self.replay = self.step.launch("graph", self.tape)

    def train(self, steps, batch=3, start=0, odd=()):
        metrics = []
        for iteration in range(start, start + steps):
            self.optimizer.set_lr(1 / (1 + iteration))  # another rate every step
            size = 2 if iteration in odd else batch
            batches = self.batches(iteration, size, partly=iteration in odd)
            metrics.append(self.step(batches, iteration))
        return torch.stack(metrics)

    def batches(self, iteration, size, partly=False):
        generator = torch.Generator().manual_seed(iteration)
        length = 2 * self.model.frames_per_segment
        for index in range(self.accumulation):
            # An odd step of several micro-batches begins as usual.
            own = 3 if partly and index == 0 and self.accumulation > 1 else size
            shape = (own, length, 32, 32, 3)
            clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            labels = torch.randint(0, 3, (own,), generator=generator)
            yield Batch(clips, labels, torch.arange(own))

    def state(self):
        """Everything that a checkpoint holds."""
        scaler = self.precision.scaler.state_dict()
        momentum = {f"momentum.{k}": v for k, v in self.optimizer.state_dict().items()}
        return {**self.model.state_dict(), **momentum, **scaler}


def _assert_same(one, other):
    mine, others = one.state(), other.state()
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_ten_replayed_steps_are_ten_eager_steps(mode, accumulation):
    eager, graphed = Run(mode, accumulation), Run(mode, accumulation, graphs=True)
    assert torch.equal(eager.train(10), graphed.train(10))
    _assert_same(eager, graphed)
    tape = graphed.tape
    assert tape.side == WARM_UP_STEPS * accumulation
    assert tape.captures == min(accumulation, 3)  # first, middle, last; or one for all
    assert tape.replays == (10 - WARM_UP_STEPS) * accumulation
    if mode == "fp16":  # the scale has grown inside the graph
        assert graphed.precision.scaler.get_scale() == 2.0**12


def test_other_networks_and_an_auxiliary_head_too():
    # Not TDN: the tape keeps every tensor, and then autograd adds other gradients in place.
    for name in ("masnet", "amsnet"):
        eager, graphed = Run(name=name), Run(name=name, graphs=True)
        assert torch.equal(eager.train(5), graphed.train(5)), name
        _assert_same(eager, graphed)


def test_an_overflow_inside_a_graph_is_skipped_and_lowers_the_scale():
    eager, graphed = Run("fp16"), Run("fp16", graphs=True)
    for run in (eager, graphed):
        run.train(5)
        run.precision.scaler._scale.fill_(2.0**127)
    metrics = graphed.train(1, start=5)
    torch.testing.assert_close(eager.train(1, start=5), metrics, rtol=0, atol=0, equal_nan=True)
    assert metrics[0, 2] == 1
    assert graphed.precision.scaler.get_scale() == 2.0**126
    _assert_same(eager, graphed)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_batch_of_another_shape_runs_eagerly(accumulation):
    eager, graphed = Run(accumulation=accumulation), Run(accumulation=accumulation, graphs=True)
    odd = (1, 5, 7)  # one while warming up
    assert torch.equal(eager.train(9, odd=odd), graphed.train(9, odd=odd))
    _assert_same(eager, graphed)
    first = accumulation > 1  # the first micro-batch of an odd step was replayed already
    assert graphed.tape.replays == 3 * accumulation + 2 * first
    assert graphed.replay.problem is None


def test_a_run_continued_in_a_new_process_has_the_same_bits():
    whole = Run("fp16", graphs=True)
    expected = whole.train(9)
    begun = Run("fp16", graphs=True)
    begun.train(5)
    stored = {k: v.clone() if torch.is_tensor(v) else v for k, v in begun.state().items()}
    resumed = Run("fp16", graphs=True)
    resumed.model.load_state_dict({k: stored[k] for k in resumed.model.state_dict()})
    momentum = {k: stored[f"momentum.{k}"] for k in resumed.optimizer.state_dict()}
    resumed.optimizer.load_state_dict(momentum)
    scaler = resumed.precision.scaler
    scaler.load_state_dict({k: stored[k] for k in scaler.state_dict()})
    assert torch.equal(resumed.train(4, start=5), expected[5:])
    _assert_same(whole, resumed)


def _waiting_loss(run):
    forward = run.step._forward

    def waits(batch):
        loss = forward(batch)
        run.last = loss.item()  # as a careless module might
        return loss

    run.step._forward = waits


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_that_waits_is_not_captured_at_all(accumulation, caplog):
    eager = Run("fp16", accumulation)
    graphed = Run("fp16", accumulation, graphs=True, broken=_waiting_loss)
    assert torch.equal(eager.train(6), graphed.train(6))
    _assert_same(eager, graphed)
    assert graphed.tape.captures == 0 and graphed.tape.side == WARM_UP_STEPS * accumulation
    assert [r.getMessage() for r in caplog.records] == [
        "steps run eagerly, a CUDA graph cannot be made: item waits for the device"
    ]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_that_cannot_be_captured_goes_on_eagerly_with_the_reason(accumulation, caplog):
    eager = Run("fp16", accumulation)
    graphed = Run("fp16", accumulation, graphs=True, broken=_waiting_loss, blind=True)
    assert torch.equal(eager.train(6), graphed.train(6))
    _assert_same(eager, graphed)
    assert graphed.tape.captures == 1
    assert [r.getMessage() for r in caplog.records] == [
        "steps run eagerly, a CUDA graph cannot be made: operation not permitted when stream is "
        "capturing"
    ]


def test_a_capture_that_fails_late_takes_back_what_the_host_remembers():
    """The scaler has unscaled, the last micro-batch has added: as if nothing had happened."""

    def broken(run):
        restore = StepStatistics.restore_if

        class Waits(StepStatistics):
            def restore_if(self, skipped):
                restore(self, skipped)
                bool(skipped)

        run.step._statistics.__class__ = Waits

    eager = Run("fp16", 3)
    graphed = Run("fp16", 3, graphs=True, broken=broken, blind=True)
    assert torch.equal(eager.train(6), graphed.train(6))
    _assert_same(eager, graphed)
    assert graphed.tape.captures == 3 and graphed.replay.problem


@pytest.mark.parametrize("blind", [True, False])
def test_several_processes_do_not_fall_back_one_by_one(blind):
    graphed = Run(graphs=True, broken=_waiting_loss, blind=blind)
    graphed.replay._fall_back = False
    graphed.train(WARM_UP_STEPS - (not blind))
    with pytest.raises(AccelError, match=r"train\.execution: the step cannot be captured"):
        graphed.train(1)


def test_the_tape_would_show_a_rate_or_an_input_that_is_frozen():
    eager, frozen_rate = Run(), Run(graphs=True)
    for settings in frozen_rate.optimizer.sgd.param_groups:
        settings["lr"] = float(settings["lr"])
    assert not torch.equal(eager.train(6), frozen_rate.train(6))
    eager, frozen_input = Run(), Run(graphs=True)
    take = frozen_input.replay._take
    frozen_input.replay._take = lambda batch: frozen_input.replay._static is not None or take(batch)
    assert not torch.equal(eager.train(6), frozen_input.train(6))
