"""MSN: properties and quirks; the golden cases are in tests/parity."""

import pytest
import torch
from torch.nn import functional as F

from accel.errors import ConfigError
from accel.models import build_model
from accel.models.msn import DeformConv, DifferencePyramid, MotionModule, MotionShift
from accel.models.param_groups import parameter_groups


def _model(num_segments=8, depth=18, **options):
    torch.manual_seed(0)
    options = {"width": 8, "stages": 2} | options
    return build_model("msn", depth=depth, num_classes=5, num_segments=num_segments, **options)


def _clips(num_clips, num_segments=8, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_clips * num_segments, 15, size, size, generator=generator)


def _deformable(model):
    return [module for module in model.modules() if isinstance(module, DeformConv)]


@pytest.mark.parametrize(("group", "num_rows"), [(8, 8), (8, 24), (4, 8)])
def test_pyramid_norms_run_once_per_segment_index(group, num_rows):
    stem = DifferencePyramid(8, group=group)
    frames = torch.randn(num_rows, 15, 16, 16)
    inputs = []
    for norm in (stem.bn_diff_1, stem.bn_diff_2):
        norm.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    together = stem(frames)
    assert len(inputs) == 2 * group
    assert all(len(part) == num_rows // group for part in inputs)
    assert stem.bn_diff_1.num_batches_tracked == stem.bn_diff_2.num_batches_tracked == group
    apart = [stem(frames[i::group].repeat_interleave(group, 0))[::group] for i in range(group)]
    torch.testing.assert_close(together, torch.stack(apart, 1).flatten(0, 1), rtol=1e-4, atol=1e-5)
    stem.eval()
    stem(frames)
    assert len(inputs[2 * group + 2 * group * group :]) == 2  # one batch of all rows


def test_linear_convolutions_take_differences():
    """As written in the paper's code: each convolution on each frame, then the differences."""
    stem = DifferencePyramid(8, group=8).double().eval()
    x = torch.randn(8, 15, 16, 24, dtype=torch.float64)
    f1, f3, f5 = x[:, :3], x[:, 6:9], x[:, 12:]
    g, h, pool = stem.conv_1, stem.conv_2, stem.maxpool
    d1 = stem.bn_diff_1(stem.conv_diff_1(pool(x[:, 3:] - x[:, :-3])))
    d2 = stem.conv_diff_2(pool(torch.cat([g(f5) - g(f3), g(f3) - g(f1)], 1)))
    d3 = pool(h(g(f5)) - h(g(f1)))
    torch.testing.assert_close(stem(x), d1 + stem.bn_diff_2(d2) + d3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_segments", [8, 16])
@pytest.mark.parametrize("num_clips", [1, 3])
def test_any_number_of_clips(num_clips, num_segments):
    """The released code fails with a single clip of 8 segments."""
    model = _model(num_segments)
    model(_clips(num_clips, num_segments)).sum().backward()
    assert model.eval()(_clips(num_clips, num_segments)).shape == (num_clips, 5)


def test_groups_of_8_rows_whatever_the_number_of_segments_is():
    for num_segments, faithful, group in ((16, True, 8), (16, False, 16), (4, False, 4)):
        model = _model(num_segments, faithful=faithful)
        assert model.trunk.difference_stem.group == group
        assert {m.group for m in model.modules() if isinstance(m, MotionModule)} == {group}
        assert model(_clips(2, num_segments)).shape == (2, 5)
    with pytest.raises(ValueError, match="must be a multiple of 8, got 4 rows"):
        _model(4)(_clips(1, 4))
    with pytest.raises(ConfigError, match="needs at least 2 segments"):
        _model(1, faithful=False)


@pytest.mark.parametrize("group", [8, 16])
def test_motion_of_one_group_does_not_reach_another(group):
    torch.manual_seed(0)
    module = MotionModule(16, group=group).eval()
    x = torch.randn(32, 16, 6, 6)
    changed = x.clone()
    changed[:8] += torch.randn(8, 16, 6, 6)
    differs = (module(x) != module(changed)).any(1)
    assert differs[:group].any() and not differs[group:].any()
    assert differs[8:16].any() == (group == 16)


def test_deformable_kernels_are_frozen_in_the_released_training():
    frozen, trained = _model(), _model(faithful=False)
    assert len(_deformable(frozen)) == 2 * 2
    for model, train in ((frozen, False), (trained, True)):
        model(_clips(1)).sum().backward()
        for conv in _deformable(model):
            assert conv.weight.requires_grad == conv.bias.requires_grad == train
            assert (conv.weight.grad is not None) == train
            assert conv.conv_offset.weight.grad.isfinite().all()
        for policy in ("msn_original", "plain"):
            listed = {n for group in parameter_groups(model, policy) for n in group.params}
            kernels = {name for name, _ in model.named_parameters() if _is_kernel(name)}
            assert len(kernels) == 8
            assert kernels & listed == (kernels if train else set())


def _is_kernel(name):
    return "motion_offset" in name and "conv_offset" not in name


def test_offsets_start_random_in_the_released_code_and_at_zero_otherwise():
    for conv in _deformable(_model(width=64)):
        k = conv.weight.shape[-1]
        expected = (2 / (2 * k**4)) ** 0.5  # 0.111 and 0.04
        assert conv.conv_offset.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert not conv.conv_offset.bias.any()
    for conv in _deformable(_model(faithful=False)):
        assert not conv.conv_offset.weight.any() and not conv.conv_offset.bias.any()
        x = torch.randn(2, conv.weight.shape[1], 7, 5)
        expected = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_biases_that_cancel_are_frozen():
    model = _model()
    stem = model.trunk.difference_stem
    assert not stem.conv_1.bias.requires_grad and not stem.conv_2.bias.requires_grad
    before = model.eval()(_clips(1))
    with torch.no_grad():
        stem.conv_1.bias.add_(3)
    assert torch.equal(model(_clips(1)), before)


def test_fusion_weights():
    for num_segments, first in ((8, 0.5), (16, 0.25)):
        trunk = _model(num_segments).trunk
        assert (trunk.fuse_stem.share, trunk.fuse_layer1.share) == (first, 0.25)


def test_gate_is_one_number_per_row_and_channel_in_float32():
    module = MotionShift(16, 8, group=8)
    x = torch.randn(8, 16, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate = module.motion_layer(x.bfloat16())
        y = module(x.bfloat16())
    assert gate.shape == (8, 16) and gate.dtype == torch.float32
    assert gate.min() > 0.5 and gate.max() < 1.5
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_parameter_count_is_the_published_one():
    for num_classes, count in ((174, 31_017_762), (400, 31_480_836)):
        with torch.device("meta"):
            model = build_model("msn", depth=50, num_classes=num_classes, num_segments=8)
        norm = 2 * 64 + 1  # running statistics are no parameters, but are kept too
        unused = sum(value.numel() for value in model.trunk.unused.buffers()) - norm
        assert unused == 9472 + 37_760
        assert sum(parameter.numel() for parameter in model.parameters()) == count - unused
        frozen = sum(p.numel() for n, p in model.named_parameters() if _is_kernel(n))
        assert frozen == 2_647_808


def test_bf16_autocast_trains_near_fp32():
    results = []
    for enabled in (False, True):
        model = _model()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(_clips(2))
        F.cross_entropy(logits, torch.tensor([1, 3])).backward()
        results.append((logits.detach(), model.head.fc.weight.grad))
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients)
    (full, full_grad), (half, half_grad) = results
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1 * full.abs().max().item())
    assert (half_grad - full_grad).norm() < 0.1 * full_grad.norm()
