"""Learning-rate factors against closed forms."""

import itertools
import math

import pytest

from accel.engine.schedule import ScheduleConfig, lr_factor


def test_step_decays_at_the_start_of_each_milestone_epoch():
    config = ScheduleConfig(kind="step", epochs=50, milestones=(30, 40, 45))
    factors = [lr_factor(config, epoch * 10, 10) for epoch in (0, 29, 30, 39, 40, 45, 49)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001, 0.001], rel=1e-12)
    assert lr_factor(config, 299, 10) == 1
    assert lr_factor(config, 300, 10) == pytest.approx(0.1)


def test_step_may_state_its_factors():
    config = ScheduleConfig(kind="step", epochs=5, milestones=(2, 3), factors=(0.5, 0.1))
    assert [lr_factor(config, i, 1) for i in range(5)] == [1, 1, 0.5, 0.1, 0.1]
    with pytest.raises(ValueError, match=r"one per milestone \(2\), got 1"):
        ScheduleConfig(kind="step", epochs=5, milestones=(2, 3), factors=(0.5,))
    with pytest.raises(ValueError, match=r"factors: must be in \(0, 1\]"):
        ScheduleConfig(kind="step", epochs=5, milestones=(2,), factors=(1.5,))


def test_cosine_is_constant_within_an_epoch():
    config = ScheduleConfig(kind="cosine", epochs=4, final_factor=0.0)
    assert lr_factor(config, 0, 5) == 1
    assert lr_factor(config, 14, 5) == lr_factor(config, 10, 5) == pytest.approx(0.5)
    assert lr_factor(config, 19, 5) == pytest.approx((1 + math.cos(math.pi * 0.75)) / 2)


def test_onecycle_rises_to_one_and_ends_at_the_final_factor():
    config = ScheduleConfig(kind="onecycle", epochs=10, warmup_fraction=0.25)
    factors = [lr_factor(config, i, 10) for i in range(100)]
    assert factors[0] == pytest.approx(config.start_factor)
    assert max(factors) == pytest.approx(1, abs=1e-3)
    assert factors.index(max(factors)) in (24, 25)
    assert factors[-1] == pytest.approx(config.final_factor)
    assert all(a < b for a, b in itertools.pairwise(factors[:25]))
    assert all(a > b for a, b in itertools.pairwise(factors[25:]))


def test_a_single_step_has_a_rate():
    for kind in ("constant", "step", "cosine", "onecycle"):
        assert lr_factor(ScheduleConfig(kind=kind, epochs=1), 0, 1) > 0
