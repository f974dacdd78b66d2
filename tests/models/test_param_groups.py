"""Properties of the parameter groups; the published listings are golden cases."""

from itertools import chain

import pytest
import torch

from accel.models import build_model, list_models
from accel.models.param_groups import parameter_groups

POLICIES = [
    "tanet_original",
    "tanet_mmaction2",
    "masnet_original",
    "tdn_original",
    "msn_original",
    "amsnet_original",
    "amsnet_gym",
    "plain",
]


def _model(name="tanet", depth=18, **options):
    return build_model(
        name, depth=depth, width=8, stages=2, num_classes=5, num_segments=2, **options
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("depth", [18, 50])
def test_every_parameter_is_in_one_group(name, depth, policy):
    model = _model(name, depth)
    listed = list(chain(*(group.params for group in parameter_groups(model, policy))))
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert sorted(listed) == sorted(trained)
    for group in parameter_groups(model, policy):
        assert all(model.get_parameter(key) is value for key, value in group.params.items())


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_norms_are_in_no_group(policy):
    model = _model(partial_bn=True)
    listed = set(chain(*(group.params for group in parameter_groups(model, policy))))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    tam_norms = {name for name in trained if ".G.1." in name or ".L.1." in name}
    assert tam_norms
    assert trained - listed == (tam_norms if policy == "tanet_original" else set())
    assert not listed - trained


def test_only_the_authors_raise_the_rate_of_the_global_branch():
    model = _model()
    for policy, count in (("tanet_original", 2 * 4 + 1), ("tanet_mmaction2", 1)):
        rates = {group.name: group for group in parameter_groups(model, policy)}
        assert len(rates["lr5_weight"].params) == count
        assert [*rates["lr10_bias"].params] == ["head.fc.bias"]


def test_masnet_has_no_faster_classifier():
    groups = {g.name: g for g in parameter_groups(_model("masnet"), "masnet_original")}
    assert "head.fc.weight" in groups["normal_weight"].params
    assert groups["normal_bias"].lr_mult == 2 and groups["normal_bias"].decay_mult == 0
    taps = [name for name in groups["normal_weight"].params if name.endswith("tim.conv.weight")]
    assert len(taps) == 4
    assert max(group.lr_mult for group in groups.values()) == 2


@pytest.mark.parametrize("policy", POLICIES[:2])
def test_without_lr5_linear_layers_join_the_others(policy):
    groups = {g.name: g for g in parameter_groups(_model(), policy, fc_lr5=False)}
    assert not groups["lr5_weight"].params and not groups["lr10_bias"].params
    assert "head.fc.weight" in groups["normal_weight"].params
    assert "head.fc.bias" in groups["normal_bias"].params


@pytest.mark.parametrize("fc_lr5", [True, False])
def test_tdn_and_msn_list_factors_that_they_do_not_apply(fc_lr5):
    groups = parameter_groups(_model("tdn"), "tdn_original", fc_lr5=fc_lr5)
    assert {(group.lr_mult, group.decay_mult) for group in groups} == {(1, 1)}
    listed = {group.name: group.unapplied for group in groups}
    assert listed["normal_bias"] == (2, 0)
    assert listed["BN scale/shift"] == (1, 0)
    assert ("lr5_weight" in listed) == fc_lr5


def test_amsnet_decays_everything_but_the_classifiers_of_gym():
    model = _model("amsnet")
    (everything,) = parameter_groups(model, "amsnet_original")
    assert (everything.lr_mult, everything.decay_mult) == (1, 1)
    others, classifier = parameter_groups(model, "amsnet_gym")
    assert (others.lr_mult, others.decay_mult) == (1, 1)
    assert (classifier.lr_mult, classifier.decay_mult) == (5, 0)
    heads = [f"{head}.fc.{leaf}" for head in ("head", "aux_head") for leaf in ("weight", "bias")]
    assert sorted(classifier.params) == sorted(heads)


def test_plain_decays_weights_only():
    decay, no_decay = parameter_groups(_model(), "plain")
    assert (decay.decay_mult, no_decay.decay_mult) == (1, 0)
    assert all(value.dim() >= 2 for value in decay.params.values())
    assert all(value.dim() == 1 for value in no_decay.params.values())


def test_errors():
    model = _model()
    with pytest.raises(ValueError, match="policy must be one of"):
        parameter_groups(model, "other")
    model.trunk.extra = torch.nn.LayerNorm(3)
    with pytest.raises(ValueError, match=r"no rule for LayerNorm \(trunk.extra\)"):
        parameter_groups(model, "tanet_original")
