"""MAS-Net's module against the written formulas; the published outputs are golden cases."""

import pytest
import torch
from torch.nn import functional as F

from accel.models import build_model
from accel.models.masnet import MotionAppearance
from accel.models.tsm import shift_taps


def _module(channels=64, num_segments=3, **options):
    torch.manual_seed(0)
    module = MotionAppearance(channels, num_segments, **options).double()
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, dtype=value.dtype))
    return module.eval()


def _frames(num_frames, channels=64, size=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_frames, channels, size, size, dtype=torch.float64, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def _as_published(module, x):
    """Motion formed in full, 3-D convolutions of [N, C, 1, H, W], depthwise Conv1d over time."""
    mam, msm, tim, num_segments = module.mam, module.msm, module.tim, module.num_segments
    b = mam.bn1(mam.conv1(x)).unflatten(0, (-1, num_segments))
    mixed = torch.cat([(b[:, :-1] + 0.5 * b[:, 1:]) / 1.5, b[:, -1:]], dim=1)
    motion = mam.conv3(mixed.flatten(0, 1)).unflatten(0, (-1, num_segments))
    frames = x.unflatten(0, (-1, num_segments))  # [N, T, C, H, W]
    z = msm.conv_fc1((motion.mean(1) + frames.mean(1))[:, :, None])
    if not msm.faithful or len(frames) > 1:
        z = F.relu(
            F.batch_norm(
                z,
                msm.bn_fc1.running_mean,
                msm.bn_fc1.running_var,
                msm.bn_fc1.weight,
                msm.bn_fc1.bias,
            )
        )
    u, v = msm.conv_fc2(z).squeeze(2).chunk(2, dim=1)
    share = torch.sigmoid(u - v)[:, None]
    mixture = share * motion + (1 - share) * frames  # [N, T, C, H, W]
    lines = mixture.permute(0, 3, 4, 2, 1).flatten(0, 2)  # [N*H*W, C, T]
    y = tim.conv(lines).unflatten(0, (len(frames), *x.shape[-2:]))
    return y.permute(0, 4, 3, 1, 2).flatten(0, 1)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("channels", [8, 64, 128])
@pytest.mark.parametrize("num_clips", [1, 2])
@pytest.mark.parametrize("num_segments", [1, 3])
def test_the_formulas(num_segments, num_clips, channels, faithful):
    module = _module(channels, num_segments, faithful=faithful)
    x = _frames(num_clips * num_segments, channels)
    torch.testing.assert_close(module(x), _as_published(module, x), rtol=1e-12, atol=1e-12)


def test_a_single_clip_skips_norm_and_relu_unless_corrected():
    x = _frames(6)
    for faithful in (True, False):
        module = _module(faithful=faithful)
        alone, together = module(x[:3]), module(x)[:3]
        assert torch.allclose(alone, together) != faithful
        before = module.msm.bn_fc1.running_mean.clone()
        module.train()(x[:3])
        assert torch.equal(module.msm.bn_fc1.running_mean, before) == faithful


def test_gradients_reach_everything():
    module = _module().train()
    x = _frames(6).requires_grad_()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_taps_start_as_the_shift():
    taps = shift_taps(16)
    assert taps[0].tolist() == taps[1].tolist() == [0, 0, 1]
    assert taps[2].tolist() == taps[3].tolist() == [1, 0, 0]
    assert taps[4:].tolist() == [[0, 1, 0]] * 12
    assert torch.equal(MotionAppearance(16, 2).tim.taps, taps)


def test_initialization():
    torch.manual_seed(0)
    model = build_model("masnet", num_classes=5, num_segments=2)
    block = model.trunk.layer4[1]
    module = block.temporal
    # 2-D convolutions: normal, by fan out; 3-D ones: PyTorch's uniform, by fan in.
    assert block.conv1.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.01)
    assert module.mam.conv3.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    bound = (9 * 512 / 4) ** -0.5
    assert 0.99 * bound < module.msm.conv_fc1.weight.abs().max().item() <= bound
    assert 0.9 * 512**-0.5 < model.trunk.layer4[1].conv3.bias.abs().max().item() <= 512**-0.5
    assert torch.equal(module.tim.taps, shift_taps(512))


def test_plain_frames_have_no_module():
    model = build_model("masnet", num_classes=5, num_segments=2, temporal="none")
    assert not any(isinstance(module, MotionAppearance) for module in model.modules())
    assert model.trunk.conv1.bias is not None


@pytest.mark.parametrize("num_segments", [8, 16])
def test_parameter_count_is_the_published_one(num_segments):
    with torch.device("meta"):
        model = build_model("masnet", num_classes=174, num_segments=num_segments)
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_065_732
    trunk = sum(parameter.numel() for parameter in model.trunk.parameters())
    parts = {"mam": 39_414, "msm": 2_123_872, "tim": 11_328}
    assert trunk == 25_709_206
    for part, count in parts.items():
        found = [v.numel() for n, v in model.named_parameters() if f".temporal.{part}." in n]
        assert sum(found) == count
