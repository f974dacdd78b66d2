"""AMS-Net: views of clips, competition, variants, initialization, imports, training outputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from accel.engine.step import training_loss
from accel.errors import ConfigError
from accel.models import build_model
from accel.models.amsnet import CPTM_BLOCKS, TemporalConv
from accel.models.convert import TABLES
from accel.models.convert.names import IMAGENET, OURS
from accel.models.cptm import BranchAttention, CPTMBottleneck, CPTMCore, clip_view, frame_view
from accel.models.heads import AuxiliaryLogits
from accel.models.weights import export_weights, import_weights

VARIANTS = ["2d", "snippet", "slowonly"]


def _network(variant="2d", *, num_segments=4, seed=0, **options):
    torch.manual_seed(seed)
    options = {"depth": 50, "width": 8, "num_classes": 5} | options
    return build_model("amsnet", variant=variant, num_segments=num_segments, **options)


def _clips(model, clips=2, size=64):
    generator = torch.Generator().manual_seed(1)
    rows, channels = clips * model.num_segments, 3 * model.frames_per_segment
    return torch.randn(rows, channels, size, size, generator=generator)


def _away_from_start(model):
    """Every tensor different from its initial value, so that no term is 0 or 1."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape))
    return model


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 1, 4, 3), (6, 5, 1, 1)])
def test_clips_are_views_of_the_frames(shape):
    frames = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    clips = clip_view(frames, 3)
    assert clips.data_ptr() == frames.data_ptr()
    assert clips.is_contiguous(memory_format=torch.channels_last)
    expected = frames.unflatten(0, (2, 3)).transpose(1, 2).flatten(3)  # [N, C, T, H*W]
    assert torch.equal(clips, expected)
    back = frame_view(clips, *shape[2:])
    assert back.data_ptr() == frames.data_ptr()
    assert torch.equal(back, frames)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_cptm_core_is_its_formula(relu, training):
    """The published text: 3-D convolutions, an averaged map, its global mean, a softmax."""
    torch.manual_seed(0)
    core = _away_from_start(CPTMCore(6, gamma=1.5, relu=relu)).double().train(training)
    x = torch.randn(3, 6, 4, 5, 2, dtype=torch.float64)  # [N, C, T, H, W]

    branches, f = [], x
    for block in core.temporal_blocks:
        f = nn.functional.conv3d(f, block.conv.weight[..., None], padding=(1, 0, 0))
        norm = block.bn
        statistics = (None, None) if training else (norm.running_mean, norm.running_var)
        f = nn.functional.batch_norm(f, *statistics, norm.weight, norm.bias, training)
        f = f.relu() if relu else f
        branches.append(f)
    averaged = (branches[0] + branches[1] + branches[2]) / 3
    attention = core.attention
    u = averaged.mean(dim=(2, 3, 4)) @ attention.fc.weight.T + attention.fc.bias
    norm = attention.bn
    mean, var = (
        (u.mean(0), u.var(0, correction=0)) if training else (norm.running_mean, norm.running_var)
    )
    z = ((u - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias).relu()
    logits = torch.stack([z @ fc.weight.T + fc.bias for fc in attention.fcs])  # [K, N, C]
    shares = (1.5 * logits).softmax(dim=0)[..., None, None, None]
    expected = sum(share * f for share, f in zip(shares, branches, strict=True))

    y = core(clip_view(x.transpose(1, 2).flatten(0, 1), 4))  # [N, C, T, H*W]
    torch.testing.assert_close(y.unflatten(3, (5, 2)), expected, rtol=1e-12, atol=1e-12)


def test_the_bias_before_a_norm_takes_no_rounding_errors():
    torch.manual_seed(0)
    attention = BranchAttention(8, 3, rate=8)
    pooled = torch.randn(3, 8)
    attention(pooled)[:, 0].sum().backward()
    assert attention.fc.bias.grad is not None
    assert not attention.fc.bias.grad.any()
    assert attention.fc.weight.grad.any()
    hidden = pooled @ attention.fc.weight.T + attention.fc.bias
    torch.testing.assert_close(attention.bn.running_mean, 0.1 * hidden.mean(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_clip_cannot_be_trained_but_evaluated(variant):
    model = _network(variant)
    with pytest.raises(ConfigError, match=r"at least 2 clips per process.*got 1.*micro_batch"):
        model(_clips(model, 1))
    assert model.eval()(_clips(model, 1)).shape == (1, 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_training_and_evaluation(variant):
    model = _network(variant)
    frames = _clips(model)
    calls = []
    model.aux_head.register_forward_hook(lambda *_: calls.append(1))
    output = model(frames)
    assert isinstance(output, AuxiliaryLogits)
    assert output.logits.shape == output.auxiliary.shape == (2, 5)
    assert output.weight == 0.5
    training_loss(output, torch.tensor([1, 3])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert calls == [1]
    model.eval()
    assert model(frames).shape == (2, 5)
    assert model.forward_features(frames).shape == (2, model.trunk.out_channels, 2, 2)
    assert calls == [1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_convolution_is_2d_and_reads_channels_last(variant):
    model = _network(variant)
    assert not any(isinstance(module, nn.Conv3d) for module in model.modules())
    layouts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _m, inputs, output, name=name: layouts.update(
                    {
                        name: inputs[0].is_contiguous(memory_format=torch.channels_last)
                        and output.is_contiguous(memory_format=torch.channels_last)
                    }
                )
            )
    model(_clips(model).contiguous(memory_format=torch.channels_last))
    assert len(layouts) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert all(layouts.values()), [name for name, good in layouts.items() if not good]


@pytest.mark.parametrize("variant", VARIANTS)
def test_clips_do_not_mix_and_time_has_an_order(variant):
    model = _away_from_start(_network(variant)).eval().double()
    frames = _clips(model, 3).double()
    together = model(frames)
    apart = torch.cat([model(clip) for clip in frames.split(4)])
    torch.testing.assert_close(together, apart)
    reversed_time = frames.unflatten(0, (3, 4)).flip(1).flatten(0, 1)
    assert not torch.allclose(model(reversed_time), together, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_do_not_depend_on_the_number_of_segments(variant):
    short, long = _network(variant, num_segments=8), _network(variant, num_segments=16, seed=1)
    long.load_state_dict(short.state_dict())
    assert long.eval()(_clips(long)).shape == (2, 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_autocast_is_finite_and_near_fp32(variant):
    model = _network(variant, dropout=0.0)
    frames, labels = _clips(model, 4), torch.tensor([0, 1, 2, 3])
    full = training_loss(model(frames), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(frames)
        half = training_loss(output, labels)
    assert output.auxiliary.dtype == torch.float32
    half.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert half.item() == pytest.approx(full.item(), rel=0.05)


@pytest.mark.parametrize(("variant", "depth"), [("2d", 18), ("slowonly", 50)])
@pytest.mark.slow
def test_compile_as_one_graph(variant, depth):
    model = _network(variant, depth=depth, dropout=0.0)
    frames, labels = _clips(model), torch.tensor([1, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(frames)
    assert isinstance(output, AuxiliaryLogits)
    training_loss(output, labels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(compiled(frames), model(frames))


@pytest.mark.parametrize(("variant", "depth"), [("2d", 18), ("slowonly", 50)])
@pytest.mark.slow
def test_export(variant, depth):
    model = _network(variant, depth=depth).eval()
    frames = _clips(model)
    exported = torch.export.export(model, (frames,))
    torch.testing.assert_close(exported.module()(frames), model(frames))


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("depth", [18, 50])
def test_smaller_networks_keep_their_temporal_modules(depth, stages):
    model = _network(depth=depth, stages=stages)
    assert [*model.trunk.cptm] == [f"layer{i}" for i in sorted({1, stages - 1})]
    assert model.eval()(_clips(model)).shape == (2, 5)


def test_sizes_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match=r"model\.stages: got 1, expected 2\.\.4"):
        _network(stages=1)
    with pytest.raises(ConfigError, match=r"model\.stages: got 2, expected 3\.\.4"):
        _network("slowonly", stages=2)
    with pytest.raises(ConfigError, match=r'model\.variant: got "slowonly".* depth 18'):
        _network("slowonly", depth=18)


def test_the_stem_of_a_snippet_starts_as_one_random_kernel_repeated():
    kernel = _network("snippet").trunk.conv1.weight
    assert kernel.shape == (8, 9, 7, 7)
    assert torch.equal(kernel[:, :3], kernel[:, 3:6])
    assert torch.equal(kernel[:, :3], kernel[:, 6:])
    assert kernel.std().item() == pytest.approx((2 / (8 * 49)) ** 0.5, rel=0.1)  # fan out


def test_initialization_of_the_2d_variant():
    model = _network()
    for head in (model.head, model.aux_head):
        assert head.fc.weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert not head.fc.bias.any()
    kernel = model.neck.fusion.conv.weight  # Xavier: uniform
    limit = (6 / (kernel.shape[0] + kernel.shape[1])) ** 0.5
    assert kernel.abs().max().item() == pytest.approx(limit, rel=0.01)
    cptm = model.trunk.cptm["layer3"]  # PyTorch's defaults
    for kernel in (cptm.reduce.conv.weight, cptm.core.temporal_blocks[0].conv.weight):
        limit = kernel[0].numel() ** -0.5
        assert limit * 0.98 < kernel.abs().max().item() <= limit
    assert all(
        (norm.weight == 1).all() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)
    )


def test_slowonly_starts_without_time_in_its_cptm():
    model = _network("slowonly")
    found = [
        f"{stage}.{index}"
        for stage, blocks in CPTM_BLOCKS.items()
        for index in blocks
        if isinstance(model.get_submodule(f"trunk.{stage}.{index}.conv1"), CPTMBottleneck)
    ]
    assert found == ["layer3.1", "layer3.3", "layer3.5", "layer4.2"]
    assert sum(isinstance(m, CPTMBottleneck) for m in model.modules()) == 4
    assert sum(isinstance(m, TemporalConv) for m in model.modules()) == 9 - 4
    cptm = model.trunk.layer3[1].conv1
    x = torch.randn(8, 128, 4, 4)
    assert torch.equal(cptm(x), cptm.eval().reduce.train()(x))
    assert not model.trunk.layer1[0].bn3.weight.any()


@pytest.mark.slow
def test_the_start_does_not_depend_on_the_process():
    """Hashes of strings differ between processes; an order taken from a set would too."""
    code = (
        "import torch; from accel.models import build_model; torch.manual_seed(0); model = "
        "build_model('amsnet', variant='slowonly', depth=50, width=8, num_classes=5, "
        "num_segments=4); print(sum((i + 1) * float(p.double().sum()) for i, p in "
        "enumerate(model.parameters())))"
    )
    root = Path(__file__).resolve().parents[2]
    sums = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(sums) == 1


def _imagenet():
    """The state dict of a torchvision ResNet of our test width, values from 0 to 1."""
    state = {}
    for name, value in _network(seed=2).state_dict().items():
        there = TABLES["amsnet"].rename(name, OURS, IMAGENET)
        if there and not there.startswith("fc."):
            state[there] = torch.rand(value.shape) if value.is_floating_point() else value
    return state | {"fc.weight": torch.rand(1000, 256), "fc.bias": torch.rand(1000)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_imagenet_fills_the_trunk_alone(variant, tmp_path):
    model = _network(variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = _imagenet()
    torch.save(state, tmp_path / "resnet.pth")
    report = import_weights(model, tmp_path / "resnet.pth")
    assert report.layout == IMAGENET
    after = model.state_dict()
    for name in report.kept:
        assert torch.equal(after[name], before[name])
    kept = {name for name in report.kept if name.startswith("trunk.")}
    expected = {name for name in after if ".core." in name or ".cptm." in name}
    assert kept == expected | ({"trunk.conv1.weight"} if variant == "snippet" else set())
    for name in report.loaded:
        value = state[TABLES["amsnet"].rename(name, OURS, IMAGENET)]
        if after[name].shape != value.shape:  # inflated
            assert after[name].shape[2:] == (3, 1)
            torch.testing.assert_close(after[name].sum(2, keepdim=True), value)
            value = value.expand(-1, -1, 3, -1) / 3
        assert torch.equal(after[name], value)
    inflated = [n for n in report.loaded if after[n].shape[2:] == (3, 1)]
    assert len(inflated) == (5 if variant == "slowonly" else 0)
    if variant == "slowonly":
        assert torch.equal(
            model.trunk.layer3[1].conv1.reduce.bn.running_var, state["layer3.1.bn1.running_var"]
        )


@pytest.mark.parametrize("layout", ["original", "prerelease"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_layouts_have_3d_kernels_and_come_back(variant, layout, tmp_path):
    source = _away_from_start(_network(variant)).eval()
    state = export_weights(source, layout)
    kernels_3d = {name for name, value in state.items() if value.dim() == 5}
    kernels_2d = {name for name, value in state.items() if value.dim() == 4}
    assert {n for n in kernels_3d if n.startswith("neck.")} == {
        n for n in state if n.startswith("neck.") and state[n].dim() > 2
    }
    assert bool(kernels_2d) == (variant != "slowonly")
    state["cls_head.new_cls.weight"] = torch.zeros(5, 256, 1, 1, 1)  # the stale copy
    state["cls_head.new_cls.bias"] = torch.zeros(5)
    torch.save({"meta": {"epoch": 110}, "state_dict": state}, tmp_path / "published.pth")
    model = _network(variant, seed=1).eval()
    report = import_weights(model, tmp_path / "published.pth")
    assert (report.layout, report.kept) == (layout, ())
    assert torch.equal(model(_clips(model)), source(_clips(source)))


def test_another_class_count_keeps_both_new_classifiers(tmp_path):
    torch.save(_network(num_classes=7).state_dict(), tmp_path / "ours.pt")
    model = _network(seed=1)
    report = import_weights(model, tmp_path / "ours.pt", allow_classifier_mismatch=True)
    assert set(report.kept) == set(TABLES["amsnet"].classifier)
    model.reset_classifier(7)
    model.train()
    assert model(_clips(model)).logits.shape == model(_clips(model)).auxiliary.shape == (2, 7)


def test_partial_bn_freezes_the_norms_of_neck_and_auxiliary_head():
    model = _network(partial_bn=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms[0] is model.trunk.bn1
    assert [norm.training for norm in norms] == [True] + [False] * (len(norms) - 1)
    assert model.neck.fusion.bn in norms and model.aux_head.conv.bn in norms
