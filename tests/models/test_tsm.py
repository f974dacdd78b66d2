"""TSM against the shift written out."""

import pytest
import torch

from accel.models import build_model
from accel.models.tsm import ShiftedConv


def _shifted(x, num_segments):
    """The published shift: C/8 channels from the next frame, C/8 from the previous one."""
    clips = x.unflatten(0, (-1, num_segments))
    fold = x.shape[1] // 8
    y = torch.zeros_like(clips)
    y[:, :-1, :fold] = clips[:, 1:, :fold]
    y[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    y[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return y.flatten(0, 1)


@pytest.mark.parametrize("num_segments", [1, 2, 4])
@pytest.mark.parametrize("channels", [4, 16, 20])
def test_the_convolution_sees_shifted_frames(channels, num_segments):
    conv = torch.nn.Conv2d(channels, 6, 1, bias=False)
    x = torch.randn(2 * num_segments, channels, 5, 5)
    torch.testing.assert_close(
        ShiftedConv(conv, num_segments)(x), conv(_shifted(x, num_segments)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("depth", "count"), [(18, 8), (50, 16), (101, 2 + 2 + 12 + 2)])
def test_which_blocks_shift(depth, count):
    with torch.device("meta"):
        model = build_model("tsm", depth=depth, num_classes=5, num_segments=8)
    shifted = [name for name, m in model.named_modules() if isinstance(m, ShiftedConv)]
    assert len(shifted) == count
    assert "trunk.layer1.0.conv1" in shifted
    assert ("trunk.layer3.1.conv1" in shifted) == (depth != 101)


def test_only_the_residual_branch_shifts_and_taps_are_no_state():
    model = build_model("tsm", width=8, stages=1, num_classes=5, num_segments=4).eval()
    plain = build_model("tsn", width=8, stages=1, num_classes=5, num_segments=4).eval()
    state = {name.replace("conv1.net.", "conv1."): v for name, v in model.state_dict().items()}
    plain.load_state_dict(state)
    still = torch.randn(1, 3, 32, 32).expand(4, 3, 32, 32)
    blocks, plain_blocks = model.trunk.layer1, plain.trunk.layer1
    x = torch.randn(4, 8, 8, 8)
    y, expected = blocks[0](x), plain_blocks[0](x)
    assert not torch.allclose(y, expected)
    # The middle frames of a clip that stands still see the same frame before and after.
    features = model.trunk.maxpool(model.trunk.bn1(model.trunk.conv1(still)))
    moved, unmoved = blocks[0](features), plain_blocks[0](features)
    torch.testing.assert_close(moved[1:3], unmoved[1:3])
    assert not torch.allclose(moved[0], unmoved[0])


def test_tsm_without_its_shift_is_tsn():
    plain = build_model("tsm", width=8, stages=2, num_classes=5, num_segments=2, temporal="none")
    tsn = build_model("tsn", width=8, stages=2, num_classes=5, num_segments=2)
    assert plain.state_dict().keys() == tsn.state_dict().keys()


def test_shift_follows_the_dtype_of_the_network():
    model = build_model("tsm", width=8, stages=1, num_classes=5, num_segments=2).double()
    assert model(torch.randn(4, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(torch.randn(4, 3, 32, 32)).isfinite().all()
