"""MAS-Net: modules, block, network, optimizer."""

import numpy as np
import torch
from comparison import Family, Results
from goldens import Case, CaseError
from module_case import CALIBRATION_ARGS, PLAIN_ARGS, run_module
from torch import Tensor
from torch.nn import functional as F

import kernels
from accel.engine.schedule import ScheduleConfig, lr_factor
from accel.models import build_model
from accel.models.convert import TABLES
from accel.models.masnet import (
    MotionAccumulation,
    MotionAppearance,
    MotionSelection,
)
from accel.models.param_groups import parameter_groups
from accel.models.resnet import Bottleneck
from accel.models.tsm import Shift

rename = TABLES["masnet"].rename


def _require(case: Case, **expected: object) -> None:
    for name, value in expected.items():
        if case.args[name] != value:
            raise CaseError(f"{name} other than {value!r} is not supported")


def _same(name: str) -> str:
    return name


def run_mam(case: Case) -> Results:
    args = case.args
    mam = MotionAccumulation(
        args["channels"],
        args["num_segments"],
        reduction=args["reduction"],
        alpha=args["alpha"],
    )
    return run_module(case, mam, published=_same, forward=lambda x: {"y": mam.conv3(mam(x))})


def run_msm(case: Case) -> Results:
    args = case.args
    _require(case, attention_mode="Spatial", kernel_size=[1, 3, 3])
    channels, num_segments = args["channels"], args["num_segments"]
    msm = MotionSelection(
        channels,
        faithful=args["bypass_single_clip"],
        reduction=args["reduction"],
        groups=args["groups"],
    )

    def forward(motion: Tensor, appearance: Tensor) -> dict[str, Tensor]:
        means = [x.unflatten(0, (-1, num_segments)).mean(1) for x in (motion, appearance)]
        logits = msm(means[0] + means[1])  # [N, 2C, H, W]
        # The operator takes motion as a product of up to 32 channels; here the motion is given
        # itself, in slices, and the taps leave the frames as they are.
        taps = motion.new_tensor([0.0, 1.0, 0.0]).expand(channels, 3)
        parts = []
        for start in range(0, channels, 32):
            part = slice(start, start + 32)
            x, m = appearance[:, part], motion[:, part]
            d = logits.unflatten(1, (2, -1))[:, :, part].flatten(1, 2)
            x, m, d = (v.contiguous(memory_format=torch.channels_last) for v in (x, m, d))
            identity = torch.eye(x.shape[1], dtype=x.dtype)
            parts.append(kernels.mas_fuse(x, m, identity, d, taps[part], num_segments=num_segments))
        return {"y": torch.cat(parts, dim=1)}

    return run_module(case, msm, published=_same, forward=forward)


def run_tim(case: Case) -> Results:
    args = case.args
    _require(case, kernel_size=3)
    tim = Shift(args["channels"], args["num_segments"])
    return run_module(case, tim, published=_same, forward=lambda x: {"y": tim(x)})


def run_bottleneck(case: Case) -> Results:
    args = case.args
    _require(case, attention_mode="Spatial", mam_reduction=64, mam_alpha=0.5)
    block = Bottleneck(
        args["inplanes"],
        args["planes"],
        stride=args["stride"],
        downsample=args["downsample"],
        bias=args["conv_bias"],
        temporal=MotionAppearance(
            args["planes"], args["num_segments"], faithful=args["bypass_single_clip"]
        ),
    )

    def published(name: str) -> str | None:
        full = rename(f"trunk.layer1.0.{name}", "accel", "original")
        return full and full.removeprefix("base_model.layer1.0.")

    return run_module(case, block, published=published, forward=lambda x: {"y": block(x)})


def run_network(case: Case) -> Results:
    args = case.args
    _require(
        case,
        in_channels=3,
        consensus="avg",
        before_softmax=True,
        mam_reduction=64,
        mam_alpha=0.5,
        attention_mode="Spatial",
    )
    if args["loss"] not in ("none", "cross_entropy"):
        raise CaseError(f"loss {args['loss']!r} is not known")
    layout = "original" if args["dropout"] > 0 else "original_fc"
    model = build_model(
        "masnet",
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=args["num_segments"],
        dropout=args["dropout"],
        faithful=args["bypass_single_clip"],
    )
    model.head.dropout.p = args["dropout_at_run"]

    def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs["logits"], torch.tensor(args["labels"]))}

    features = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return run_module(
        case,
        model,
        published=lambda name: rename(name, "accel", layout),
        forward=lambda x: {"logits": model(x.reshape(-1, 3, *x.shape[-2:]))},
        features={f"base_model.{name}": f"trunk.{name}" for name in features},
        losses=losses if args["loss"] == "cross_entropy" else None,
    )


# The schedules of the released code as ours: factors from each milestone on (empty: powers of 0.1).
_FACTORS = {"mas_lr": (0.1, 0.01, 0.005, 0.001), "mas_step": ()}


def run_optimizer(case: Case) -> Results:
    args = case.args
    _require(case, fc_lr5=False)
    model = build_model(
        "masnet",
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=args["num_segments"],
        dropout=args["dropout"],
        partial_bn=args["partial_bn"],
    )
    groups = parameter_groups(model, "masnet_original")
    layout = "original" if args["dropout"] > 0 else "original_fc"
    index = {rename(n, "accel", layout): i for i, g in enumerate(groups) for n in g.params}
    rates = np.array([group.lr_mult for group in groups])
    decays = np.array([group.decay_mult for group in groups])
    results = Results()
    results.expect("groups", [group.name for group in groups], args["groups"])
    results.expect(
        "parameters",
        sorted(str(rename(name, "accel", layout)) for name, _ in model.named_parameters()),
        sorted(case.content["param_order"]),
    )
    order = [index.get(name, -1) for name in case.content["param_order"]]
    results.expect_array(case, args["group_index_array"], order)
    results.expect_array(case, args["lr_mult_array"], rates, rtol=args["rtol"])
    results.expect_array(case, args["decay_mult_array"], decays, rtol=args["rtol"])
    for record in args["schedules"]:
        if record["warmup_epochs"]:
            raise CaseError("warmup_epochs other than 0 is not supported")
        schedule = ScheduleConfig(
            epochs=record["epochs"],
            milestones=tuple(record["milestones"]),
            factors=_FACTORS[record["policy"]],
        )
        factors = np.array([lr_factor(schedule, epoch, 1) for epoch in range(record["epochs"])])
        lr = record["base_lr"] * factors[:, None] * rates
        results.expect_array(case, record["lr_array"], lr, rtol=args["rtol"])
        decay = record["weight_decay"] * decays
        results.expect_array(case, record["decay_array"], decay, rtol=args["rtol"])
    return results


_SELECTION = frozenset("attention_mode bypass_single_clip".split())

FAMILIES = {
    "masnet.mam": Family(
        run_mam, PLAIN_ARGS | set("channels num_segments reduction alpha".split())
    ),
    "masnet.msm": Family(
        run_msm,
        PLAIN_ARGS
        | _SELECTION
        | set("channels num_segments num_clips kernel_size reduction groups".split()),
    ),
    "masnet.tim": Family(run_tim, PLAIN_ARGS | set("channels num_segments kernel_size".split())),
    "masnet.bottleneck": Family(
        run_bottleneck,
        PLAIN_ARGS
        | _SELECTION
        | set(
            "inplanes planes stride downsample num_segments conv_bias mam_reduction "
            "mam_alpha".split()
        ),
    ),
    "masnet.optimizer": Family(
        run_optimizer,
        frozenset(
            "depth num_classes num_segments dropout partial_bn fc_lr5 groups group_index_array "
            "lr_mult_array decay_mult_array param_order schedules rtol".split()
        ),
    ),
    "masnet.network": Family(
        run_network,
        PLAIN_ARGS
        | _SELECTION
        | CALIBRATION_ARGS
        | set(
            "depth num_segments num_classes in_channels batch size dropout consensus "
            "before_softmax mam_reduction mam_alpha loss labels param_order".split()
        ),
    ),
}
