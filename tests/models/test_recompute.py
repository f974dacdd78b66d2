"""Activation checkpointing changes memory and nothing else."""

import pytest
import torch
from torch import nn

from accel.models import build_model
from accel.models.detectors import build_detector
from accel.models.norm import synchronize
from accel.models.recompute import recompute_activations

CLIPS, SEGMENTS = 4, 4


def _network(name, **options):
    torch.manual_seed(0)
    small = {"depth": 18, "width": 8, "stages": 3} | options
    return build_model(name, num_classes=3, num_segments=SEGMENTS, **small)


def _trained(model, what, autocast=False):
    """Outputs, gradients and buffers after two passes with the same draws."""
    recompute_activations(model, what)
    length = model.frames_per_segment
    for seed in range(2):
        torch.manual_seed(seed)
        frames = torch.randn(CLIPS * SEGMENTS, 3 * length, 32, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(frames)
        logits = getattr(output, "logits", output)
        extra = output.auxiliary.float().square().mean() if logits is not output else 0
        (logits.float().square().mean() + extra).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits, gradients, dict(model.named_buffers())


@pytest.mark.parametrize("what", ["block", "stage"])
@pytest.mark.parametrize("name", ["tsn", "tanet", "tsm", "masnet", "amsnet", "msn", "tdn"])
def test_outputs_gradients_and_running_statistics_are_the_same(name, what):
    expected = _trained(_network(name), "none")
    found = _trained(_network(name), what)
    assert torch.equal(found[0], expected[0])
    for mine, others in zip(found[1:], expected[1:], strict=True):
        assert mine.keys() == others.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, others[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("options", [{"batch_norm": "fused"}, {"partial_bn": True}, {"depth": 50}])
def test_other_norms_and_blocks_too(options):
    expected = _trained(_network("tanet", **options), "none", autocast=True)
    found = _trained(_network("tanet", **options), "block", autocast=True)
    assert torch.equal(found[0], expected[0])
    for mine, others in zip(found[1:], expected[1:], strict=True):
        for key, value in mine.items():
            assert torch.equal(value, others[key]), key


def test_synchronized_norms_too():
    results = []
    for what in ("none", "block"):
        model = _network("tanet", batch_norm="fused")
        synchronize(model, lambda values: values.mul_(2))  # as if another process had the same
        results.append(_trained(model, what))
    for mine, others in zip(results[1][1:], results[0][1:], strict=True):
        for key, value in mine.items():
            torch.testing.assert_close(value, others[key], rtol=1e-4, atol=1e-5, msg=key)


def _kept_bytes(model):
    """Activations that the backward pass will find, besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    frames = torch.randn(CLIPS * SEGMENTS, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(frames)
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


def test_less_is_kept():
    kept = {}
    for what in ("none", "block", "stage"):
        model = _network("tsn")
        recompute_activations(model, what)
        kept[what] = _kept_bytes(model)
    assert kept["stage"] < kept["block"] < 0.7 * kept["none"]


def test_dropout_inside_a_block_draws_the_same_again():
    results = []
    for what in ("none", "block"):
        model = _network("tsn")
        for block in model.trunk.layer1:
            block.bn1 = nn.Sequential(block.bn1, nn.Dropout(0.5))
        results.append(_trained(model, what)[1])
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_an_evaluation_computes_once():
    model = _network("tanet")
    recompute_activations(model, "block")
    model.eval()
    calls = []
    model.trunk.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(SEGMENTS, 3, 32, 32)).sum().backward()
    assert len(calls) == 1
    model.train()(torch.randn(2 * SEGMENTS, 3, 32, 32)).sum().backward()
    assert len(calls) == 3


def test_a_network_without_blocks_is_named():
    with pytest.raises(ValueError, match="has no residual blocks"):
        recompute_activations(build_detector("ssd300", num_classes=3, width=4, levels=2), "block")
