"""Which way a step is launched, and why not another one."""

import contextlib
import functools
import logging

import pytest
import torch

from accel.engine import execution
from accel.engine.checkpoint import CheckpointStore
from accel.engine.config import load_recipe
from accel.engine.distributed import World
from accel.engine.execution import Launcher, account, fastest, obstacle
from accel.engine.rehearsal import Rehearsal, random_batch
from accel.engine.trainer import Trainer
from accel.models import build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("way", "overrides", "device", "size", "accumulation", "reason"),
    [
        ("eager", {"log.profile": "nsys"}, CPU, 8, 1, None),
        ("graph", {}, CUDA, 1, 4, None),
        ("graph", {"train.execution": "graph"}, CUDA, 2, 1, None),
        ("graph+compile", {}, CUDA, 1, 1, None),
        ("compile", {}, CPU, 1, 1, None),
        ("graph", {}, CPU, 1, 1, "CUDA graphs need a GPU, this run is on cpu"),
        ("graph", {"log.profile": "nsys"}, CUDA, 1, 1, "marks the parts of a step"),
        ("graph", {}, CUDA, 2, 2, "several processes exchange gradients"),
        ("graph", {"train.execution": "auto"}, CUDA, 2, 1, "single processes"),
        ("compile", {}, CUDA, 2, 1, "single processes"),
        ("compile", {"train.checkpoint_activations": "block"}, CUDA, 1, 1, "cannot be compiled"),
        ("graph", {"optim.implementation": "apex"}, CUDA, 1, 1, "rates from the host"),
        ("compile", {"optim.implementation": "apex"}, CUDA, 1, 1, None),
        ("graph", {"train.checkpoint_activations": "block"}, CUDA, 1, 1, None),
    ],
)
def test_what_keeps_a_run_from_a_way(way, overrides, device, size, accumulation, reason):
    recipe = load_recipe("demo_motion8", overrides)
    found = obstacle(way, recipe, device, World(size=size), accumulation)
    assert found is None if reason is None else reason in found


def test_a_detector_runs_eagerly():
    assert "detector" in obstacle("compile", load_recipe("demo_tubes"), CUDA, World(), 1)


def test_the_fastest_is_chosen_when_it_is_worth_it():
    assert fastest({"eager": 1.0, "graph": 0.8, "compile": 0.7}) == "compile"
    assert fastest({"eager": 1.0, "graph": 0.96}) == "eager"
    assert fastest({"eager": 1.0}) == fastest({}) == "eager"
    times = {"eager": 0.1, "graph": 0.08}
    problems = {"compile": "no compiler", "graph+compile": "no compiler"}
    assert account("graph", times, problems) == (
        "graph, 1.25 x the rate of eager (measured: eager 100.0 ms, graph 80.0 ms); "
        "not compile, graph+compile: no compiler."
    )
    assert account("eager", {}, {"graph": "no GPU"}) == "eager; not graph: no GPU."


@pytest.fixture
def trainer(tiny_recipe, tmp_path):
    """Makes trainers on the tiny set; a second one of the same folder resumes."""
    with contextlib.ExitStack() as stack:

        def make(overrides, folder="run"):
            made = Trainer(load_recipe(tiny_recipe, overrides), tmp_path / folder)
            stack.callback(made.close)
            return made

        yield make


def _messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == execution.__name__]


def test_a_way_that_cannot_be_is_eager_with_the_reason_in_one_line(trainer, caplog):
    assert trainer({"train.execution": "graph"}).step.execution == "eager"
    assert _messages(caplog) == [
        "train.execution graph: steps run eagerly, because CUDA graphs need a GPU, this run is on "
        "cpu."
    ]


def _state(own):
    scaler = own.precision.scaler
    return [t.clone() for t in own.step.state()], dict(scaler.state_dict())


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_a_rehearsal_leaves_no_trace(trainer, mode):
    own = trainer({"precision.mode": mode})
    tensors, scale = _state(own)
    assert own._rehearse().seconds_per_step(2) > 0
    rehearsal = own._rehearse()
    with pytest.raises(ZeroDivisionError), rehearsal.untouched():
        rehearsal.run(1)
        own.step.underway = True
        moved, _ = _state(own)
        assert any(not torch.equal(a, b) for a, b in zip(moved, tensors, strict=True))
        _ = 1 / 0
    after, scale_after = _state(own)
    assert all(torch.equal(a, b) for a, b in zip(after, tensors, strict=True))
    assert scale_after == scale and not own.step.underway
    assert all(p.grad is None for p in own.model.parameters())


def test_random_batches_have_the_shapes_of_real_ones(trainer):
    for overrides in ({}, {"augment.color_jitter": "amsnet", "model.name": "tdn"}):
        own = trainer(overrides, folder="-".join(["run", *overrides]))
        real = next(own.train_loader.epoch(0))
        noise = random_batch(own.recipe, len(real.labels), own.dataset.num_classes, CPU)
        for name in ("clips", "labels", "sample_ids", "colors"):
            mine, other = getattr(noise, name), getattr(real, name)
            if other is not None or mine is not None:
                assert (mine.shape, mine.dtype) == (other.shape, other.dtype), name


def test_auto_measures_once_and_a_resumed_run_does_what_it_did(trainer, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    compiled, measured = [], []

    def compile_(model, **options):
        compiled.append(options)
        return torch.nn.Sequential(model)

    def seconds(self, warm_up):
        measured.append(self._step._model)
        return 1.0 / len(measured)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(execution, "not_worth_timing", lambda *_: None)  # as on a GPU
    monkeypatch.setattr(Rehearsal, "seconds_per_step", seconds)
    auto = {"train.execution": "auto"}
    own = trainer({**auto, "train.max_steps": "2"})
    assert own.step.execution == "compile" and own.step._model is measured[1] is not own.model
    assert compiled == [{"fullgraph": True, "dynamic": False}]
    assert _messages(caplog) == [
        "train.execution auto: timing eager, compile (compiling takes minutes).",
        "train.execution auto: compile, 2.00 x the rate of eager (measured: eager 1000.0 ms, "
        "compile 500.0 ms); not graph, graph+compile: CUDA graphs need a GPU, this run is on cpu.",
    ]
    assert own.fit()["execution"] == "compile"
    own.close()
    _, state = CheckpointStore(own.folder.checkpoints).load_latest()
    assert state["execution"] == "compile"
    resumed = trainer(auto)
    assert resumed.step.execution == "compile" and len(measured) == 2
    resumed.fit()


def test_auto_on_a_cpu_is_eager_at_once_and_says_why(trainer, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Trainer, "_rehearse", lambda _: pytest.fail("a step was tried"))
    assert trainer({"train.execution": "auto"}).step.execution == "eager"
    assert _messages(caplog) == [
        "train.execution auto: eager; not graph, graph+compile: CUDA graphs need a GPU, this run "
        "is on cpu; not compile: compiling for a CPU takes minutes, so it must be asked for by "
        "name."
    ]


def test_a_network_that_cannot_be_compiled_runs_eagerly(trainer, monkeypatch, caplog):
    def broken(model, **_):
        def call(*_):
            raise RuntimeError("no working\n compiler.")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    own = trainer({"train.execution": "compile"})
    assert own.step.execution == "eager" and own.step._model is own.model
    assert _messages(caplog) == [
        "train.execution compile: steps run eagerly, because no working compiler."
    ]
    caplog.clear()
    monkeypatch.setattr(execution, "not_worth_timing", lambda *_: None)
    own = trainer({"train.execution": "auto"}, folder="auto")
    assert own.step.execution == "eager"
    own.fit()


@pytest.mark.parametrize("name", ["tsn", "tanet", "tsm", "masnet", "amsnet", "tdn", "msn"])
def test_every_network_is_one_graph_to_the_compiler(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build_model(name, num_classes=3, num_segments=4, depth=18, width=8, stages=2)
    frames = torch.randn(8, 3 * model.frames_per_segment, 32, 32)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    output = compiled(frames)
    getattr(output, "logits", output).sum().backward()


def test_compiled_steps_have_the_losses_of_eager_ones(trainer, steps_of, monkeypatch):
    """Traced and differentiated ahead of time; Inductor's C++ takes minutes to build on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    small = {"model.stages": "1", "model.name": "tsn", "model.dropout": "0", "train.max_steps": "3"}
    losses = {}
    for way in ("eager", "compile"):
        own = trainer({**small, "train.execution": way}, folder=way)
        own.fit()
        assert own.step.execution == way
        losses[way] = [loss for _, loss, _, _ in steps_of(own.folder.path)]
    assert losses["compile"] == pytest.approx(losses["eager"], rel=1e-4)
    assert len(set(losses["eager"])) == 3


@pytest.mark.parametrize(
    ("way", "device", "size", "opened"),
    [
        ("graph", CUDA, 1, True),
        ("graph+compile", CUDA, 1, True),
        ("auto", CUDA, 1, True),
        ("graph", CUDA, 2, True),
        ("graph+compile", CUDA, 2, False),  # steps run eagerly: DDP belongs to the usual stream
        ("auto", CUDA, 2, False),
        ("eager", CUDA, 1, False),
        ("compile", CUDA, 1, False),
        ("graph", CPU, 1, False),
    ],
)
def test_graphs_are_opened_where_they_may_be_used(monkeypatch, way, device, size, opened):
    monkeypatch.setattr(execution, "DeviceGraphs", lambda device: ("graphs of", device))
    recipe = load_recipe("demo_motion8", {"train.execution": way})
    launcher = Launcher(recipe, device, World(size=size), 1)
    assert launcher.graphs == (("graphs of", device) if opened else None)


class Unable:
    """Graphs of a device that finds what they cannot record."""

    side_stream = staticmethod(contextlib.nullcontext)

    @contextlib.contextmanager
    def watch(self):
        yield ["net.py:7 waits for the device"]

    def new_pool(self):
        return None

    def capture(self, work, pool):
        raise AssertionError


def test_a_run_that_could_not_replay_says_and_stores_so(trainer, monkeypatch):
    wanted = {"train.execution": "graph", "model.stages": "1", "train.max_steps": "4"}
    monkeypatch.setattr(execution, "obstacle", lambda *_: None)
    monkeypatch.setattr(execution, "DeviceGraphs", lambda _: Unable())
    own = trainer(wanted)
    assert own.step.execution == "graph"  # as far as is known before the first step
    assert own.fit()["execution"] == "eager"
    own.close()
    _, state = CheckpointStore(own.folder.checkpoints).load_latest()
    assert state["execution"] == "eager"
    step = own.step
    monkeypatch.setattr(step, "_compiled", lambda: own.model)
    replay = step.launch("graph+compile", Unable())
    assert step.execution == "graph+compile"
    replay.problem = "no memory"
    assert step.execution == "compile"
