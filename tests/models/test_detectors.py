"""AMTNet and SSD300 at a small width: shapes, fusions, names, starting trunks, groups."""

import pytest
import torch

from accel.cli.main import main as accel
from accel.cli.models import DETECTORS, describe_detector
from accel.detection.priors import MAP_SIZES, ssd300_priors
from accel.errors import ConfigError
from accel.models.convert.amtnet import fill_trunk
from accel.models.detectors import build_detector
from accel.models.param_groups import detector_groups
from accel.models.vgg_ssd import SSDTrunk, map_sizes
from accel.models.weights import export_weights, read_state_dict

STREAMS = [("none", 1, 0), ("sum", 1, 5), ("mean", 1, 1), ("cat", 1, 5), ("none", 5, 0)]


def _detector(fusion="none", frames=1, extra=0, **options):
    torch.manual_seed(0)
    options = {"num_classes": 4, "width": 2} | options
    return build_detector(
        "amtnet", fusion=fusion, input_frames=frames, extra_frames=extra, **options
    )


@pytest.mark.parametrize(("fusion", "frames", "extra"), STREAMS)
def test_every_fusion_gives_one_row_per_prior(fusion, frames, extra) -> None:
    model = _detector(fusion, frames, extra, num_frames=3)
    inputs = [torch.randn(6, 3 * n, 300, 300) for n in (frames, extra) if n]
    conf, loc = model(*inputs)
    assert conf.shape == (2, len(ssd300_priors()), 4)
    assert loc.shape == (2, len(ssd300_priors()), 12)
    (conf.sum() + loc.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_mean_is_half_the_sum_and_streams_are_demanded() -> None:
    both, mean = _detector("sum", 1, 1), _detector("mean", 1, 1)
    mean.load_state_dict(both.state_dict())
    for model in (both, mean):
        for head in model.heads:
            torch.nn.init.zeros_(head.conf.bias)
    frames, flow = torch.randn(2, 2, 3, 300, 300).unbind()
    with torch.no_grad():
        torch.testing.assert_close(both(frames, flow)[0], 2 * mean(frames, flow)[0])
        with pytest.raises(ValueError, match="extra is NoneType"):
            both(frames)
    for options in ({"fusion": "sum"}, {"extra_frames": 5}):
        with pytest.raises(ConfigError, match="second stream"):
            build_detector("amtnet", num_classes=4, **options)
    with pytest.raises(ConfigError, match="got 'ssd512', expected one of amtnet, ssd300"):
        build_detector("ssd512", num_classes=4)
    with pytest.raises(ConfigError, match="at least one class"):
        build_detector("ssd300", num_classes=1)


def test_map_sizes_are_those_of_the_layers() -> None:
    assert map_sizes(300) == MAP_SIZES
    trunk = SSDTrunk(width=1)
    for size in (300, 288, 333):
        with torch.no_grad():
            maps = trunk(torch.zeros(1, 3, size, size))
        assert tuple(x.shape[-1] for x in maps) == map_sizes(size)
    with pytest.raises(ValueError, match="too small for 6 maps"):
        map_sizes(96)
    assert map_sizes(96, 3) == (12, 6, 3)


@pytest.mark.parametrize("name", ["cat", "ssd300"])
def test_published_files_convert_both_ways(name, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    if name == "ssd300":
        model = build_detector("ssd300", num_classes=3)
    else:
        model = build_detector("amtnet", num_classes=3, fusion="cat", extra_frames=1)
    published, ours, back = (tmp_path / n for n in ("published.pth", "ours.pt", "back.pth"))
    torch.save(export_weights(model, "original"), published)
    options = ["--system", model.system]
    assert accel(["convert", str(published), *options, "--out", str(ours)]) == 0
    out = capsys.readouterr().out
    assert 'layout "original"' in out and (name != "cat" or "fusion cat" in out)
    content = torch.load(ours, weights_only=True)
    assert content["preprocessing"]["mean"] == [123.0, 117.0, 104.0]
    for key, value in model.state_dict().items():
        assert torch.equal(content["model"][key], value), key
    assert accel(["convert", str(ours), *options, "--to", "original", "--out", str(back)]) == 0
    first, second = read_state_dict(published), read_state_dict(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_narrow_network_has_no_published_layout(tmp_path, capsys) -> None:
    path = tmp_path / "narrow.pt"
    torch.save({"model": _detector(width=7).state_dict()}, path)
    arguments = ["convert", str(path), "--system", "amtnet", "--out", str(tmp_path / "out.pth")]
    assert accel([*arguments, "--to", "original"]) == 2
    assert "no published layout" in capsys.readouterr().err
    assert accel(arguments) == 0


@pytest.mark.parametrize("prefix", ["", "module.core_base.", "core_base.", "base."])
def test_a_trunk_starts_from_every_form_of_a_checkpoint(prefix) -> None:
    torch.manual_seed(1)
    source, flow = SSDTrunk(3, width=2), SSDTrunk(15, width=2)
    norm = "norm." if prefix == "base." else "L2Norm."
    state = {prefix + n.replace("norm.", norm): v for n, v in source.state_dict().items()}
    report = fill_trunk(flow, state | {"loc.0.weight": torch.zeros(1)})
    assert not report.kept and report.skipped == ("loc.0.weight",)
    for name, value in flow.state_dict().items():
        if name == "vgg.0.weight":
            value = value.unflatten(1, (5, 3)).sum(1)
        torch.testing.assert_close(value, source.state_dict()[name])


def test_groups_hold_every_parameter_once() -> None:
    model = _detector("cat", 1, 5, num_frames=4)
    groups = detector_groups(model)
    names = [name for group in groups for name in group.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [(group.lr_mult, group.decay_mult) for group in groups] == [
        (0.25, 1),
        (0.5, 0),
        (1, 1),
        (2, 0),
    ]


def test_parameters_are_the_published_numbers() -> None:
    rows = {network["title"]: describe_detector(**network) for network in DETECTORS}
    assert rows["amtnet"]["parameters"] == 31_764_638
    assert rows["amtnet, sum with flow x 5"]["parameters"] == 54_715_486
    assert rows["amtnet, cat with flow x 5"]["parameters"] == 63_535_198
    assert rows["amtnet"]["gmac"] > 2 * rows["ssd300"]["gmac"] * 0.95
