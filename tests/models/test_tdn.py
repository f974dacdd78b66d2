"""TDN: properties and quirks; the golden cases are in tests/parity."""

import pytest
import torch
from torch.nn import functional as F

from accel.models import build_model
from accel.models.convert import TABLES
from accel.models.difference import Fusion, inflate_kernel
from accel.models.tdn import DifferenceStem, LongTermModule, MSEModule
from accel.models.tsm import Shift
from accel.models.weights import import_weights


def _model(num_segments=8, depth=18, **options):
    torch.manual_seed(0)
    options = {"width": 8, "stages": 3} | options
    return build_model("tdn", depth=depth, num_classes=5, num_segments=num_segments, **options)


def _clips(num_clips, num_segments=8, size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_clips * num_segments, 15, size, size, generator=generator)


def _module(channels=32, num_segments=4):
    torch.manual_seed(0)
    module = LongTermModule(channels, num_segments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


def _published(module, x):
    """Output of the module as the published chain computes it, with all maps formed."""
    mse, clips = module.mse, (-1, module.mse.num_segments)
    b = mse.bn1(mse.conv1(x))
    d = mse.conv2(b).unflatten(0, clips)
    b = b.unflatten(0, clips)
    zero = torch.zeros_like(b[:, :1])
    gate = 0
    for z in (
        torch.cat([d[:, 1:] - b[:, :-1], zero], 1),
        torch.cat([zero, d[:, :-1] - b[:, 1:]], 1),
    ):
        z = z.flatten(0, 1)
        half = mse.bn3_smallscale2(mse.conv3_smallscale2(F.avg_pool2d(z, 2)))
        half = F.interpolate(half, size=z.shape[-2:])
        full = mse.bn3_smallscale4(mse.conv3_smallscale4(z))
        gate = gate + 0.5 * (torch.sigmoid(mse.bn3(mse.conv3(z / 3 + half / 3 + full / 3))) - 0.5)
    y = (x + x * gate).unflatten(0, clips)
    y = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 1))
    taps = module.shift.conv.weight[:, 0, :, None, None]
    y = y[:, :-2] * taps[:, 0] + y[:, 1:-1] * taps[:, 1] + y[:, 2:] * taps[:, 2]
    return y.flatten(0, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_clips", "size"), [(1, (7, 6)), (3, (8, 8)), (2, (2, 5))])
def test_folded_norm_equals_the_published_chain(training, num_clips, size):
    ours, chain = _module().double(), _module().double()
    x = torch.randn(num_clips * 4, 32, *size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours.train(training)(inputs[0]), _published(chain.train(training), inputs[1])]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(x)
    for y in outputs:
        (y * cotangent).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-11)
    for (name, a), b in zip(ours.named_parameters(), chain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, a), b in zip(ours.named_buffers(), chain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_float32_statistics_survive_a_large_mean():
    """A covariance from raw second moments would lose all digits here."""
    module = _module().mse
    y = torch.randn(16, 2, 14, 14) + 1000
    exact = _module().mse.double()
    m, c = module._fold(y)
    expected_m, expected_c = exact._fold(y.double())
    torch.testing.assert_close(m, expected_m.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(c, expected_c.float(), rtol=1e-4, atol=0.2)


def test_shared_norms_are_updated_twice_and_bn1_once():
    module = _module()
    module(torch.randn(8, 32, 6, 6))
    counts = {
        name: int(value) for name, value in module.named_buffers() if name.endswith("tracked")
    }
    assert counts == {
        "mse.bn1.num_batches_tracked": 1,
        "mse.bn3.num_batches_tracked": 2,
        "mse.bn3_smallscale2.num_batches_tracked": 2,
        "mse.bn3_smallscale4.num_batches_tracked": 2,
    }


def test_forward_differences_update_before_backward_ones():
    """With momentum 1 the statistics of the last call stay."""
    module = _module()
    module.mse.bn3_smallscale4.momentum = 1.0
    seen = []
    module.mse.conv3_smallscale4.register_forward_hook(lambda *call: seen.append(call[2]))
    module(torch.randn(8, 32, 6, 6))
    forward, backward = seen
    last = module.mse.bn3_smallscale4.running_mean
    torch.testing.assert_close(last, backward.mean((0, 2, 3)))
    assert not torch.allclose(last, forward.mean((0, 2, 3)))


def test_shift_starts_as_a_shift():
    x = torch.arange(1.0, 5).reshape(4, 1, 1, 1).expand(4, 16, 2, 2)
    y = Shift(16, 4)(x.contiguous(memory_format=torch.channels_last))[:, :, 0, 0]
    assert y[:, :2].tolist() == [[t, t] for t in (2, 3, 4, 0)]
    assert y[:, 2:4].tolist() == [[t, t] for t in (0, 1, 2, 3)]
    assert y[:, 4:].tolist() == [[t] * 12 for t in (1, 2, 3, 4)]


def test_fusion_enlarges_to_the_nearest_pixel():
    x, s = torch.zeros(1, 1, 7, 1), torch.tensor([0.0, 4, 8]).reshape(1, 1, 3, 1)
    assert Fusion(0.25)(x, s).flatten().tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert torch.equal(Fusion(0.25)(x, x + 1), x + 0.25)


@pytest.mark.parametrize(("num_segments", "share"), [(4, 0.25), (8, 0.5), (16, 0.25)])
def test_share_of_the_differences_depends_on_whether_there_are_8_segments(num_segments, share):
    trunk = _model(num_segments).trunk
    assert (trunk.fuse_stem.share, trunk.fuse_layer1.share) == (share, share)


def test_only_the_middle_frame_shows_appearance():
    trunk = _model().trunk.eval()
    frames = _clips(1)
    seen = []
    trunk.conv1.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    trunk(frames)
    assert torch.equal(seen[0], frames[:, 6:9])


def test_stem_sees_differences_only():
    stem = DifferenceStem(8).eval()
    frames = _clips(1, size=32)
    brighter = frames + torch.randn(1, 3, 1, 1).repeat(1, 5, 1, 1)
    torch.testing.assert_close(stem(frames), stem(brighter), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stem(frames), stem(frames.flip(1)), atol=1e-3)


def test_stages_2_to_4_hold_the_module():
    model = _model(stages=4, depth=50)
    places = {name.split(".")[1] for name, m in model.named_modules() if isinstance(m, MSEModule)}
    assert places == {"layer2", "layer3", "layer4"}
    assert sum(isinstance(m, MSEModule) for m in model.modules()) == 13


@pytest.mark.parametrize(
    ("depth", "num_classes", "count"),
    [(50, 174, 24_420_046), (50, 400, 24_883_120), (101, 174, 43_681_726)],
)
def test_parameter_count_is_the_published_one(depth, num_classes, count):
    with torch.device("meta"):
        model = build_model("tdn", depth=depth, num_classes=num_classes, num_segments=8)
    unused = sum(value.numel() for value in model.trunk.unused.buffers())
    assert unused == 9472
    assert sum(parameter.numel() for parameter in model.parameters()) == count - unused


def test_start_of_the_weights():
    model = _model(depth=50, width=64, stages=2)
    trunk = model.trunk
    assert trunk.layer1[0].conv2.weight.std().item() == pytest.approx((2 / 9 / 64) ** 0.5, rel=0.05)
    assert trunk.layer1[0].conv2.bias.abs().max() <= 1 / 24
    assert not torch.equal(trunk.layer1[0].conv2.weight, trunk.difference_layer1[0].conv2.weight)
    kernel = trunk.unused.conv1_temp_weight
    assert torch.equal(trunk.difference_stem.conv.weight, inflate_kernel(kernel, 12))
    mse = trunk.layer2[1].temporal.mse
    assert mse.conv3.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    assert mse.bn3.weight.all()  # nothing is zero at the start: the module acts at once


@pytest.mark.parametrize("name", ["tdn", "msn"])
def test_imagenet_fills_both_copies_of_the_first_stage_and_the_stem(name, tmp_path):
    options = {"depth": 50, "width": 8, "stages": 2, "num_classes": 5, "num_segments": 8}
    source = build_model("tsn", **options)
    torch.nn.init.normal_(source.trunk.bn1.weight)
    state = {key.removeprefix("trunk."): v for key, v in source.trunk.state_dict().items()}
    torch.save(
        state | {"fc.weight": torch.ones(1000, 64), "fc.bias": torch.ones(1000)}, tmp_path / "i"
    )
    torch.manual_seed(3)
    model = build_model(name, **options)
    biases = model.trunk.layer1[0].conv1.bias.clone()
    report = import_weights(model, tmp_path / "i")
    ours, theirs = model.trunk.state_dict(), source.trunk.state_dict()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
        if key.startswith("layer1."):
            assert torch.equal(ours[f"difference_{key}"], value), key
    kernel = theirs["conv1.weight"]
    inflated = {"tdn": "difference_stem.conv.weight", "msn": "unused.conv1_5_conv_weight"}[name]
    assert torch.equal(ours["unused.conv1_temp_weight"], kernel)
    assert torch.equal(ours[inflated], inflate_kernel(kernel, 12))
    assert f"trunk.{inflated}" in report.loaded
    assert torch.equal(model.trunk.layer1[0].conv1.bias, biases)  # ImageNet's network has none


@pytest.mark.parametrize("layout", ["original", "original_older", "original_fc"])
@pytest.mark.parametrize("name", ["tdn", "msn"])
def test_published_files_lose_nothing(name, layout, tmp_path):
    options = {"depth": 50, "width": 8, "stages": 2, "num_classes": 5, "num_segments": 8}
    rename = TABLES[name].rename
    source = build_model(name, **options)
    published = {
        rename(key, "accel", layout): torch.rand(value.shape) if value.dim() else value
        for key, value in source.state_dict().items()
    }
    assert "base_model.conv1_temp.bias" in published
    assert "base_model.conv1_5.1.running_var" in published
    file = {"state_dict": {f"module.{key}": value for key, value in published.items()}}
    torch.save(file, tmp_path / "file")
    model = build_model(name, **options)
    assert import_weights(model, tmp_path / "file").kept == ()
    back = {rename(key, "accel", layout): value for key, value in model.state_dict().items()}
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], value) for key, value in published.items())


def test_unused_tensors_are_no_parameters():
    model = _model()
    assert not any("unused" in name for name, _ in model.named_parameters())
    assert {"trunk.unused.conv1_temp_weight", "trunk.unused.conv1_temp_bias"} < set(
        model.state_dict()
    )


@pytest.mark.parametrize("num_segments", [1, 4, 16])
@pytest.mark.parametrize("num_clips", [1, 2])
def test_any_number_of_clips_and_segments(num_clips, num_segments):
    model = _model(num_segments)
    assert model(_clips(num_clips, num_segments)).shape == (num_clips, 5)


def test_small_maps():
    """At 32 pixels the last maps are single pixels, which cannot be halved."""
    model = _model(4, depth=50, stages=4)
    assert model(_clips(1, 4, size=32)).isfinite().all()


def test_clips_do_not_mix():
    model = _model(4).eval()
    frames = _clips(2, 4)
    apart = torch.cat([model(half) for half in frames.chunk(2)])
    torch.testing.assert_close(model(frames), apart)


def test_bf16_autocast_trains_near_fp32():
    results = []
    for enabled in (False, True):
        model = _model()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(_clips(2))
        F.cross_entropy(logits, torch.tensor([1, 3])).backward()
        results.append((logits.detach(), model.head.fc.weight.grad))
        gradients = [p.grad for p in model.parameters()]
        assert all(
            g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients
        )
    (full, full_grad), (half, half_grad) = results
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1 * full.abs().max().item())
    assert (half_grad - full_grad).norm() < 0.1 * full_grad.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tdn", "msn"])
def test_compile_as_one_graph_and_export(name):
    torch.manual_seed(0)
    model = build_model(name, depth=18, width=8, stages=2, num_classes=5, num_segments=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    frames = _clips(1, size=32)
    model.eval()
    torch.testing.assert_close(compiled(frames), model(frames))
    exported = torch.export.export(model, (frames,))
    torch.testing.assert_close(exported.module()(frames), model(frames))
    model.train()
    before = {key: value.clone() for key, value in model.named_buffers()}
    compiled(frames).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    counted = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert "trunk.layer2.0.bn1.num_batches_tracked" in counted
