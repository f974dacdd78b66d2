"""The batch-size finder, with a measure of its own in place of a GPU's memory."""

import logging

import pytest
import torch

from accel.engine import fit_memory, trainer
from accel.engine.config import load_recipe, split_overrides
from accel.engine.distributed import World
from accel.engine.fit_memory import StepMemory, cap_bytes, fit_micro_batch, largest_that_fits, sizes
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
    monkeypatch.setattr(trainer, "limit_memory", lambda *_: None)
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
    peak = 123
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: peak)
    assert memory(4) == peak and calls[0] == "reset_peak_memory_stats"

    def out_of_memory(self, frames):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(memory._model), "forward", out_of_memory)
    assert memory(4) is None
