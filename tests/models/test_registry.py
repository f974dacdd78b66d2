"""Every registered network, and the recipe section that describes it."""

import dataclasses

import pytest
import torch

from accel.engine.step import training_loss
from accel.errors import ConfigError
from accel.models import ModelConfig, build_model, list_models
from accel.models.heads import AuxiliaryLogits, ConsensusHead
from accel.models.network import ClipNetwork
from accel.models.resnet import ResNet
from accel.models.tanet import TAM

NETWORKS = [(name, depth) for name in list_models() for depth in (18, 50)]


def _small(name="tanet", depth=18, *, num_segments=2, **options):
    torch.manual_seed(0)
    num_segments = 8 if name == "msn" else num_segments
    options = {"width": 8, "stages": 2} | options
    return build_model(name, depth=depth, num_classes=5, num_segments=num_segments, **options)


def _frames(num_frames, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_frames, 3, size, size, generator=generator)


def _clips(model, size=32):
    """Input of two clips."""
    generator = torch.Generator().manual_seed(1)
    rows, channels = 2 * model.num_segments, 3 * model.frames_per_segment
    return torch.randn(rows, channels, size, size, generator=generator)


def _norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize(("name", "depth"), NETWORKS)
def test_forward_and_backward(name, depth):
    model = _small(name, depth, stages=4)
    output = model(_clips(model))
    logits = output.logits if isinstance(output, AuxiliaryLogits) else output
    assert logits.shape == (2, 5)
    training_loss(output, torch.tensor([1, 3])).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    assert model.trunk.conv1.weight.grad.any()


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize(("name", "depth"), NETWORKS)
def test_channels_last_is_kept(name, depth, stem):
    model = _small(name, depth, stem=stem)
    seen = []

    def check(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output  # norm with its mean
        if output.dim() == 4:
            seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.trunk.modules():
        module.register_forward_hook(check)
    model(_clips(model))
    assert seen
    assert all(seen)
    assert model.trunk.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "depth"), NETWORKS)
def test_evaluation_is_deterministic_and_keeps_buffers(name, depth):
    model = _small(name, depth).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(model(_clips(model)), model(_clips(model)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "depth"), NETWORKS)
def test_bf16_autocast_is_near_fp32(name, depth):
    model = _small(name, depth).eval()
    with torch.no_grad():
        full = model(_clips(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.forward_features(_clips(model))
            half = model.forward_head(features)
    assert features.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05 * full.abs().max().item())


@pytest.mark.parametrize("name", list_models())
def test_bf16_training_is_near_fp32(name):
    model = _small(name, dropout=0.0)
    frames, labels = _clips(model), torch.tensor([1, 3])
    full = training_loss(model(frames), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = training_loss(model(frames), labels)
    half.backward()
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("num_segments", [1, 2, 3, 16])
def test_any_number_of_segments(num_segments):
    model = _small(num_segments=num_segments)
    assert model.num_segments == num_segments
    assert model(_frames(2 * num_segments)).shape == (2, 5)


def test_clips_do_not_mix():
    model = _small().eval()
    frames = _frames(6)
    together = model(frames)
    apart = torch.cat([model(frames[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(together, apart)


def test_tsn_ignores_the_order_of_frames_and_tanet_does_not():
    frames = _frames(4)
    order = [3, 1, 2, 0]
    for name, equal in (("tsn", True), ("tanet", False)):
        model = _small(name, num_segments=4).eval()
        assert torch.allclose(model(frames), model(frames[order]), atol=1e-8) == equal


def test_tanet_without_its_module_is_tsn():
    plain = _small("tanet", temporal="none")
    assert not any(isinstance(module, TAM) for module in plain.modules())
    assert plain.state_dict().keys() == _small("tsn").state_dict().keys()


def test_reset_classifier():
    model = _small()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(_frames(4)).shape == (2, 7)
    assert model.head.fc.weight.std().item() == pytest.approx(0.001, rel=0.3)
    assert not model.head.fc.bias.any()


def test_wrong_frames_are_named():
    with pytest.raises(ValueError, match=r"\[N\*T, 3, H, W\] with T = 2, got \[3, 3, 32, 32\]"):
        _small()(_frames(3))


def test_frames_of_a_segment_are_stacked_in_the_channels():
    trunk = ResNet(18, width=8, stages=1, in_channels=15)
    head = ConsensusHead(trunk.out_channels, 5, num_segments=2, dropout=0.0)
    model = ClipNetwork(trunk, head, system="tsn", num_segments=2, frames_per_segment=5)
    assert model(torch.randn(4, 15, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\[N\*T, 15, H, W\] with T = 2, got \[4, 3, 32, 32\]"):
        model(_frames(4))


def test_train_returns_the_model():
    model = _small(partial_bn=True)
    assert model.train() is model
    assert model.eval() is model


def test_partial_bn_freezes_all_2d_norms_but_the_first():
    model = _small(partial_bn=True).train()
    first, *later = _norms(model)
    tam_norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert first.training and first.weight.requires_grad
    assert not any(norm.training or norm.weight.requires_grad for norm in later)
    assert all(norm.training and norm.weight.requires_grad for norm in tam_norms)

    before = [norm.running_mean.clone() for norm in _norms(model)]
    model(_frames(4)).sum().backward()
    moved = [not torch.equal(n.running_mean, b) for n, b in zip(_norms(model), before, strict=True)]
    assert moved == [True] + [False] * len(later)

    model.set_partial_bn(False)
    assert all(norm.training and norm.weight.requires_grad for norm in _norms(model))


@pytest.mark.parametrize(
    ("depth", "num_classes", "num_segments", "count"),
    [
        (50, 174, 8, 25_127_246),
        (50, 174, 16, 25_134_670),
        (50, 400, 8, 25_590_320),
        (50, 400, 16, 25_597_744),
        (101, 174, 8, 45_239_198),
        (101, 174, 16, 45_254_510),
        (101, 400, 8, 45_702_272),
        (101, 400, 16, 45_717_584),
    ],
)
def test_parameter_count_is_the_published_one(depth, num_classes, num_segments, count):
    with torch.device("meta"):
        model = build_model(
            "tanet", depth=depth, num_classes=num_classes, num_segments=num_segments
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amsnet", "masnet", "tanet", "tsm"])
def test_compile_as_one_graph(name):
    torch.compiler.reset()
    model = _small(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    frames = _clips(model)
    model.eval()
    torch.testing.assert_close(compiled(frames), model(frames))
    model.train()
    training_loss(compiled(frames), torch.tensor([1, 3])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amsnet", "masnet", "tanet", "tsm"])
def test_export(name):
    model = _small(name).eval()
    frames = _clips(model)
    exported = torch.export.export(model, (frames,))
    torch.testing.assert_close(exported.module()(frames), model(frames))


def test_config_builds_the_same_model():
    config = ModelConfig(depth=18, width=8, stages=2)
    model = build_model(**dataclasses.asdict(config), num_classes=5, num_segments=2)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in _small().state_dict().items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "other"}, "model.name: got 'other'"),
        ({"depth": 20}, "model.depth: got 20"),
        ({"width": 3}, "model.width: got 3"),
        ({"stages": 5}, "model.stages: got 5"),
        ({"stem": "large"}, "model.stem: got 'large'"),
        ({"temporal": "tsm"}, "model.temporal: got 'tsm'"),
        ({"dropout": 1.0}, "model.dropout: got 1.0"),
        ({"dropout": float("nan")}, "model.dropout: got nan"),
        ({"name": "tsn", "temporal": "tam"}, 'model.temporal: got "tam" with model.name "tsn"'),
        ({"variant": "other"}, "model.variant: got 'other'"),
        ({"variant": "snippet"}, 'model.variant: got "snippet" with model.name "tanet"'),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ModelConfig(**options)


@pytest.mark.parametrize("key", ["num_classes", "num_segments"])
def test_build_rejects_empty_sizes(key):
    with pytest.raises(ConfigError, match=f"{key}: got 0"):
        build_model("tanet", **({"num_classes": 5, "num_segments": 2} | {key: 0}))
