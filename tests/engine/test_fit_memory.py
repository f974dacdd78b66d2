"""The batch-size finder, with a measure of its own in place of a GPU's memory."""

import logging
import types

import pytest
import torch

from accel.engine import distributed, fit_memory, trainer
from accel.engine.config import load_recipe, split_overrides
from accel.engine.distributed import World
from accel.engine.fit_memory import (
    StepMemory,
    cap_bytes,
    fit_micro_batch,
    largest_that_fits,
    limit_memory,
    sizes,
)
from accel.engine.trainer import Trainer
from accel.errors import ConfigError

CPU = torch.device("cpu")


def test_micro_batches_add_up_to_the_global_batch():
    assert sizes(48, 1) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert sizes(48, 2) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert sizes(7, 1) == [1, 7] and sizes(6, 4) == []


@pytest.mark.parametrize("candidates", [[1], sizes(48, 1), sizes(360, 1), list(range(1, 65))])
def test_doubling_and_bisection_find_the_limit_in_few_trials(candidates):
    for limit in range(candidates[-1] + 2):
        tried = []

        def fits(clips, limit=limit, tried=tried):
            tried.append(clips)
            return clips <= limit

        expected = max((n for n in candidates if n <= limit), default=None)
        assert largest_that_fits(candidates, fits) == expected
        assert len(tried) == len(set(tried)) <= 2 * len(candidates).bit_length() + 1
    assert tried[:3] == [n for n in (1, 2, 4) if n in candidates]


def test_limits():
    assert cap_bytes("card") is None and cap_bytes("") is None
    assert cap_bytes("11GB") == 11 * 10**9 and cap_bytes("10.5GiB") == int(10.5 * 2**30)
    for wrong in ("11", "-1GB", "auto", "11 GB", "1e3GB"):
        with pytest.raises(ConfigError, match=r"run\.fit_memory"):
            load_recipe("demo_motion8", {"run.fit_memory": wrong})
    with pytest.raises(ConfigError, match=r"run\.fit_memory: detectors are not measured"):
        load_recipe("demo_tubes", {"run.fit_memory": "card"})


def test_the_option_alone_means_the_card():
    key = "run.fit_memory"
    assert split_overrides(["--run.fit-memory"]) == ([], {key: "card"})
    assert split_overrides(["--run.fit-memory", "--json"]) == (["--json"], {key: "card"})
    assert split_overrides(["--run.fit-memory", "11GB"])[1] == {key: "11GB"}
    with pytest.raises(ConfigError, match="expected a value"):
        split_overrides(["--run.seed"])


def _gigabytes(clips):
    """1 GB and half of one per clip; 20 GB are there at all."""
    taken = 10**9 + clips * 5 * 10**8
    return taken if taken <= 20 * 10**9 else None


def test_the_global_batch_stays_and_a_tenth_is_left(caplog):
    caplog.set_level(logging.INFO)
    recipe = load_recipe("demo_motion8", {"train.global_batch": "48", "train.micro_batch": "4"})
    fitted = fit_micro_batch(recipe, World(), 11 * 10**9, _gigabytes)
    assert (fitted.train.micro_batch, fitted.train.global_batch) == (16, 48)  # 9.0 of 9.9 GB
    assert "train.micro_batch 16, accumulated 3 times; batch norm sees 16 clips" in caplog.text
    assert "16: 9.00 GB" in caplog.text and "48: does not fit" in caplog.text
    assert fitted.optim == recipe.optim
    assert fit_micro_batch(recipe, World(), 10 * 10**9, _gigabytes).train.micro_batch == 16
    assert fit_micro_batch(recipe, World(), 99 * 10**8, _gigabytes).train.micro_batch == 12
    with pytest.raises(ConfigError, match="not even 1 clip per forward fits 90%"):
        fit_micro_batch(recipe, World(), 10**9, _gigabytes)


def test_without_a_gpu_it_says_so(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, {"run.fit_memory": "11GB"})
    with pytest.raises(ConfigError, match=r"run\.fit_memory: measures the memory of a GPU.*cpu"):
        Trainer(recipe, tmp_path / "run")


def test_a_run_keeps_what_it_found(tiny_recipe, tmp_path, monkeypatch, steps_of):
    """Also when it died before its first checkpoint; a checkpoint carries it to other folders."""
    asked = []

    class Memory:
        limit = 11 * 10**9

        def __init__(self, *_):
            asked.append(self)

        def __call__(self, clips):
            return clips * 4 * 10**9

    monkeypatch.setattr(trainer, "StepMemory", Memory)
    monkeypatch.setattr(trainer, "limit_memory", lambda *_: lambda: None)
    fit = {"run.fit_memory": "11GB", "checkpoint.every_steps": "2", "checkpoint.keep_last": "9"}

    def train(folder, overrides, **options):
        own = Trainer(load_recipe(tiny_recipe, overrides), tmp_path / folder, **options)
        try:
            own.fit()
        finally:
            own.close()
        return own

    begun = Trainer(load_recipe(tiny_recipe, fit), tmp_path / "run")
    assert (begun.recipe.train.micro_batch, begun.accumulation) == (2, 4)
    begun.folder.write_text("recipe.yaml", fit_memory.configs.dump(begun.recipe))
    begun.close()
    own = train("run", {**fit, "train.max_steps": "3"})
    assert own.recipe.train.micro_batch == 2
    train("run", fit)
    other = train("other", fit, resume=str(own.folder.checkpoints / "step_00000002.pt"))
    assert other.recipe.train.micro_batch == 2 and len(asked) == 1
    train("plain", {"train.micro_batch": "2"})
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "plain")


def test_the_measured_steps_are_real_ones(tiny_recipe, monkeypatch):
    recipe = load_recipe(tiny_recipe, {})
    memory = StepMemory(recipe, 8, CPU, 1)
    before = memory._model.trunk.conv1.weight.detach().clone()
    memory._run(2)
    assert not torch.equal(memory._model.trunk.conv1.weight, before)
    assert any(buffer.any() for buffer in memory._optimizer.state_dict().values())


class Gpu:
    """torch.cuda's memory of a GPU, in which a test says what is taken."""

    def __init__(self, patch):
        self.taken = 0
        self.fraction = 0.75
        properties = types.SimpleNamespace(total_memory=22 * 10**9)
        for name, stand_in in {
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": self._reset,
            "max_memory_reserved": lambda _: self.taken,
            "get_device_properties": lambda _: properties,
            "get_per_process_memory_fraction": lambda _: self.fraction,
            "set_per_process_memory_fraction": self._limit,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)

    def _reset(self, _):
        self.taken = 0

    def _limit(self, fraction, _):
        self.fraction = fraction


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


@pytest.fixture
def memory(tiny_recipe, gpu, monkeypatch):
    """Makes measures whose forwards take 100 per clip to train, 10 per clip to evaluate."""

    def make(overrides, processes=1):
        made = StepMemory(load_recipe(tiny_recipe, overrides), 8, CPU, processes)
        forward = type(made._model).forward

        def counted(self, frames):
            each = 100 if self.training else 10
            gpu.taken = max(gpu.taken, each * len(frames) // made._recipe.sampling.num_segments)
            return forward(self, frames)

        monkeypatch.setattr(type(made._model), "forward", counted)
        return made

    return make


def test_what_is_kept_beside_the_activations_is_added(memory):
    small = {"model.stages": "1"}
    assert memory({**small})(2) == 200
    assert memory({**small, "test.batch": "30"})(2) == 300
    assert memory({**small, "train.execution": "graph"})(2) == 220
    own = memory({**small, "train.execution": "auto"}, processes=2)
    assert own(2) == 220 + 4 * sum(p.numel() for p in own._model.parameters())
    assert own._model.training


def test_the_words_of_every_library_for_too_little_memory(memory, monkeypatch):
    own = memory({"model.stages": "1"})
    forward, now = type(own._model).forward, types.SimpleNamespace()

    def fails(self, frames):
        if self.training == now.training:
            now.raised = True
            raise now.error
        return forward(self, frames)

    monkeypatch.setattr(type(own._model), "forward", fails)
    for now.error, now.training in [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), False),
    ]:
        now.raised = False
        assert own(2) is None and now.raised and own._model.training


def test_other_errors_are_no_matter_of_memory(memory, monkeypatch):
    def fails(self, frames):
        raise RuntimeError("shapes do not fit")

    own = memory({"model.stages": "1"})
    monkeypatch.setattr(type(own._model), "forward", fails)
    with pytest.raises(RuntimeError, match="do not fit"):
        own(2)


def test_the_rank_with_the_least_memory_decides(monkeypatch):
    def gathered(numbers, mine):
        numbers[:] = [mine, 10 * 10**9]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gathered)
    monkeypatch.setattr(World, "share", lambda self, message: message)
    recipe = load_recipe("demo_motion8", {"train.global_batch": "96", "train.micro_batch": "4"})
    fitted = fit_micro_batch(recipe, World(size=2), 99 * 10**9, _gigabytes)
    assert fitted.train.micro_batch == 16  # 9.0 of 10 GB


def test_the_limit_ends_with_its_run(gpu):
    device = torch.device("cuda", 0)
    lift = limit_memory(load_recipe("demo_motion8", {"run.fit_memory": "11GB"}), device)
    assert gpu.fraction == 0.5
    lift()
    assert gpu.fraction == 0.75
    limit_memory(load_recipe("demo_motion8", {"run.fit_memory": "card"}), device)()
    assert gpu.fraction == 0.75
