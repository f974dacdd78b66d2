"""TDN and MSN: modules, blocks, networks, optimizer groups."""

from collections.abc import Callable, Iterable

from comparison import Family, Results
from goldens import Case, CaseError
from module_case import COMMON_ARGS, run_module
from torch import Tensor, channels_last, tensor

from accel.models import build_model
from accel.models.convert import TABLES
from accel.models.convert.names import OURS
from accel.models.msn import DeformConv, DifferencePyramid, MotionModule, MotionShift
from accel.models.network import ClipNetwork
from accel.models.param_groups import parameter_groups
from accel.models.resnet import Bottleneck
from accel.models.tdn import LongTermModule, MSEModule
from accel.models.tsm import Shift


def _same(name: str) -> str:
    return name


def _published(system: str, ours: str, original: str) -> Callable[[str], str]:
    """Published name of a submodule's tensor, given the prefix of the submodule in both layouts."""

    def name(inner: str) -> str:
        full = TABLES[system].rename(ours + inner, OURS, "original")
        assert full is not None, inner
        return full.removeprefix(original)

    return name


def run_mse(case: Case) -> Results:
    args = case.args
    if args["reduction"] != 16:
        raise CaseError("reduction other than 16 is not supported")
    mse = MSEModule(args["channels"], args["num_segments"])

    def forward(x: Tensor) -> dict[str, Tensor]:
        identity = tensor([0.0, 1.0, 0.0], dtype=x.dtype).expand(args["channels"], 3)
        return {"output": mse(x, identity)}

    return run_module(case, mse, published=_same, forward=forward)


def run_shift(case: Case) -> Results:
    args = case.args
    if args["kernel_size"] != 3:
        raise CaseError("kernel_size other than 3 is not supported")
    shift = Shift(args["channels"], args["num_segments"])

    def forward(x: Tensor) -> dict[str, Tensor]:
        return {"output": shift(x.contiguous(memory_format=channels_last))}

    return run_module(case, shift, published=_same, forward=forward)


def run_deform_conv(case: Case) -> Results:
    args = case.args
    fixed = {"stride": 1, "dilation": 1, "groups": 1, "deformable_groups": 1, "modulated": False}
    if any(args[key] != value for key, value in fixed.items()):
        raise CaseError(f"values other than {fixed} are not supported")
    if args["padding"] != args["kernel_size"] // 2 or args["in_channels"] != args["out_channels"]:
        raise CaseError("only convolutions that keep size and channels are supported")
    conv = DeformConv(args["in_channels"], args["kernel_size"])
    return run_module(case, conv, published=_same, forward=lambda x: {"output": conv(x)})


def run_motion(case: Case) -> Results:
    args = case.args
    if args["inter_channels"] * 4 != args["in_channels"]:
        raise CaseError("inter_channels must be a quarter of in_channels")
    motion = MotionModule(args["in_channels"], group=args["group_size"])

    def forward(x: Tensor) -> dict[str, Tensor]:
        return {"output": x * motion(x)[..., None, None]}

    return run_module(case, motion, published=_same, forward=forward)


def run_pyramid(case: Case) -> Results:
    args = case.args
    if args["frames_per_segment"] != 5:
        raise CaseError("frames_per_segment other than 5 is not supported")
    pyramid = DifferencePyramid(64, group=args["group_size"])

    return run_module(
        case,
        pyramid.requires_grad_(),
        published=_published("msn", "trunk.difference_stem.", "base_model."),
        forward=lambda x: {"output": pyramid(x)},
    )


def run_block(case: Case) -> Results:
    args = case.args
    channels, num_segments = args["planes"], args["num_segments"]
    system = case.family.split(".")[0]
    temporal = (
        LongTermModule(channels, num_segments)
        if system == "tdn"
        else MotionShift(channels, num_segments, group=args["motion_group_size"])
    )
    block = Bottleneck(
        args["inplanes"],
        channels,
        stride=args["stride"],
        downsample=args["downsample"],
        bias=True,
        temporal=temporal,
    )
    return run_module(
        case,
        block,
        published=_published(system, "trunk.layer2.0.", "base_model.layer2_bak.0."),
        forward=lambda x: {"output": block(x)},
    )


_LAYOUTS = {
    "new_fc": "original",
    "base_model.fc": "original_fc",
    "base_model.classifier": "original_older",
}


def _network(case: Case) -> ClipNetwork:
    args = case.args
    system = case.family.split(".")[0]
    released = args.get("motion_group_size", 8) == args.get("pyramid_group_size", 8) == 8
    model = build_model(
        system,
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=args["num_segments"],
        dropout=args["dropout"],
        partial_bn=args["partial_bn"],
        faithful=released,
    )
    return model


def run_network(case: Case) -> Results:
    args = case.args
    layout = _LAYOUTS.get(args["classifier"])
    if args["layout"] != "original" or layout is None or args["consensus"] != "avg":
        raise CaseError("layout, classifier or consensus is not known")
    if args["input_layout"] != "N,T*F*C,H,W" or args["frames_per_segment"] != 5:
        raise CaseError("input_layout or frames_per_segment is not known")
    model = _network(case)
    trunk = model.trunk
    shares = [trunk.fuse_stem.share, trunk.fuse_layer1.share]
    second = args.get("fusion2_alpha", args["alpha"]), args.get("fusion2_beta", args["beta"])
    if [(args["alpha"], args["beta"]), second] != [(1 - share, share) for share in shares]:
        raise CaseError(f"the network's fusion weights are {shares}")
    if case.family == "msn.network":
        for key, group in (
            ("pyramid_group_size", trunk.difference_stem.group),
            ("motion_group_size", trunk.layer2[0].temporal.motion_layer.group),
        ):
            if args[key] != group:
                raise CaseError(f"{key} is {group}")
    # The released code computes gradients of what it never trains.
    model.requires_grad_()
    model.head.dropout.p = args["dropout_at_run"]
    table = TABLES[model.system]
    results = run_module(
        case,
        model,
        published=lambda name: table.rename(name, OURS, layout),
        # Segment, then frame, then RGB: folding is a plain reshape.
        forward=lambda x: {"logits": model(x.reshape(-1, 15, *x.shape[-2:]))},
        features={
            "short_diff_stem": "trunk.difference_stem",
            "short_diff_layer1": "trunk.difference_layer1",
            "fused_stem": "trunk.fuse_stem",
            "fused_layer1": "trunk.fuse_layer1",
            **{f"layer{i}_bak": f"trunk.layer{i}" for i in (2, 3, 4)},
        },
    )
    for name in _idle(model):  # the published code calls them parameters
        results.arrays["grad_param", table.rename(name, OURS, layout)] = None
    return results


def _idle(model: ClipNetwork) -> list[str]:
    """Our names of tensors that the published code trains although nothing depends on them."""
    biases = [f"trunk.difference_stem.conv_{i}.bias" for i in (1, 2)]
    return [k for k in model.state_dict() if k.startswith("trunk.unused.") or k in biases]


def run_optim_groups(case: Case) -> Results:
    """Compares names without order: our blocks list their temporal module last."""
    args = case.args
    model = _network(case)
    layout = "original_fc" if args["dropout"] == 0 else "original"
    table = TABLES[model.system]

    def published(names: Iterable[str]) -> dict[str, int]:
        state = model.state_dict()
        return {table.rename(name, OURS, layout): state[name].numel() for name in names}

    groups = parameter_groups(model, f"{model.system}_original", fc_lr5=args["fc_lr5"])
    idle = published(_idle(model))
    results = Results()
    _expect(results, "applied", args["applied_by_training_loop"], False)
    names = [group["name"] for group in case.content["groups"]]
    _expect(results, "groups", [group.name for group in groups], names)
    for group, expected in zip(groups, case.content["groups"], strict=False):
        listed = published(group.params)
        listed |= {name: idle[name] for name in expected["params"] if name in idle}
        found = {
            "name": group.name,
            "lr_mult": group.unapplied[0],
            "decay_mult": group.unapplied[1],
            "count": len(listed),
            "numel": sum(listed.values()),
            "params": sorted(listed),
        }
        for key, value in (expected | {"params": sorted(expected["params"])}).items():
            _expect(results, f"{group.name}: {key}", found.get(key), value)
    grouped = {name for group in groups for name in group.params}
    left_out = published(name for name, _ in model.named_parameters() if name not in grouped)
    left_out = sorted(left_out.keys() - idle)
    _expect(results, "in_no_group", left_out, sorted(case.content["in_no_group"]))
    return results


def _expect(results: Results, what: str, value: object, expected: object) -> None:
    results.facts += 1
    if value != expected:
        results.differences.append(
            f"{what}: got {str(value)[:200]}, expected {str(expected)[:200]}"
        )


_BLOCK_ARGS = COMMON_ARGS | set("num_segments inplanes planes stride downsample num_clips".split())
_NETWORK_ARGS = COMMON_ARGS | set(
    "layout depth num_segments num_classes num_clips size frames_per_segment input_layout alpha "
    "beta dropout dropout_at_run classifier consensus partial_bn".split()
)
_OPTIM_ARGS = frozenset(
    "layout depth num_segments num_classes dropout partial_bn fc_lr5 "
    "applied_by_training_loop".split()
)
FAMILIES = {
    "tdn.mse": Family(
        run_mse, COMMON_ARGS | set("channels reduction num_segments num_clips".split())
    ),
    "msn.shift": Family(
        run_shift, COMMON_ARGS | set("channels num_segments kernel_size num_clips".split())
    ),
    "msn.deform_conv": Family(
        run_deform_conv,
        COMMON_ARGS
        | set(
            "in_channels out_channels kernel_size stride padding dilation groups "
            "deformable_groups modulated".split()
        ),
    ),
    "msn.motion": Family(
        run_motion,
        COMMON_ARGS | set("in_channels inter_channels group_size num_segments num_clips".split()),
    ),
    "msn.pyramid": Family(
        run_pyramid,
        COMMON_ARGS | set("num_segments group_size frames_per_segment num_clips".split()),
    ),
    "tdn.block": Family(run_block, _BLOCK_ARGS),
    "msn.block": Family(run_block, _BLOCK_ARGS | {"motion_group_size"}),
    "tdn.network": Family(run_network, _NETWORK_ARGS),
    "msn.network": Family(
        run_network,
        _NETWORK_ARGS
        | set("fusion2_alpha fusion2_beta motion_group_size pyramid_group_size".split()),
    ),
    "tdn.optim_groups": Family(run_optim_groups, _OPTIM_ARGS),
    "msn.optim_groups": Family(run_optim_groups, _OPTIM_ARGS),
}
