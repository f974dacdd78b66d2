"""AMS-Net: temporal blocks, CPTM, the parts of the neck, the neck, networks."""

import math
from collections.abc import Callable

import torch
from comparison import Family, Results
from goldens import Case, CaseError
from module_case import CALIBRATION_ARGS, PLAIN_ARGS, Feature, run_module
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models import build_model
from accel.models.amsnet import AUXILIARY_WEIGHT, CPTM_BLOCKS
from accel.models.convert import TABLES
from accel.models.cptm import (
    BranchAttention,
    ConvNorm,
    CPTMBottleneck,
    CPTMCore,
    MultiscaleTemporal,
    clip_view,
    frame_view,
)
from accel.models.cstp import (
    CSTP,
    AuxiliaryHead,
    TemporalModulation,
    compete,
    concat_weighted,
)
from accel.models.heads import AuxiliaryLogits

TABLE = TABLES["amsnet"]
# Every convolution of these modules has a 3-D kernel in the authors' code ...
IN_3D = TABLES["amsnet_slowonly"].published_shape


def _require(case: Case, **expected: object) -> None:
    for name, value in expected.items():
        if case.args[name] != value:
            raise CaseError(f"{name} other than {value!r} is not supported")


def _same(name: str) -> str:
    return name


def _within(ours: str, published: str) -> Callable[[str], str | None]:
    """The name map of a submodule that the network has at `ours`, the authors at `published`."""

    def rename(name: str) -> str | None:
        full = TABLE.rename(ours + name, "accel", "original")
        return full and full.removeprefix(published)

    return rename


def _frames(clips: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N*T, C, H, W]."""
    return clips.transpose(1, 2).flatten(0, 1)


def _clips(frames: Tensor, num_segments: int) -> Tensor:
    """[N*T, C, H, W] -> [N, C, T, H, W]."""
    return frames.unflatten(0, (-1, num_segments)).transpose(1, 2)


def _on_clips(module: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
    """`module`, which works on [N, C, T, H*W], applied to [N, C, T, H, W] as in the network."""
    num_segments, height, width = clips.shape[2:]
    y = module(clip_view(_frames(clips), num_segments))  # [N, C', T', H*W]
    return _clips(frame_view(y, height, width), y.shape[2])


def run_temporal_block(case: Case) -> Results:
    args = case.args
    kernel = args["kernel_size"]
    _require(case, kernel_size=[kernel[0], 1, 1])
    block = ConvNorm(args["channels"], args["channels"], (kernel[0], 1), relu=args["relu"])
    return run_module(
        case,
        block,
        published=_same,
        published_shape=IN_3D,
        forward=lambda x: {"y": _on_clips(block, x)},
    )


def run_core(case: Case) -> Results:
    args = case.args
    _require(case, branches=3)
    core = CPTMCore(
        args["channels"],
        rate=args["rate"],
        min_dim=args["min_dim"],
        gamma=args["gamma"],
        relu=args["temporal_relu"],
    )

    def forward(x: Tensor) -> dict[str, Tensor]:
        y = _on_clips(core, x)
        return {"y": _frames(y) if args["fold_output"] else y}

    return run_module(
        case,
        core,
        published=_within("trunk.cptm.layer1.core.", "backbone.multiScale_res2.cptm_bottleneck."),
        published_shape=IN_3D,
        forward=forward,
    )


def run_bottleneck_2d(case: Case) -> Results:
    args = case.args
    _require(case, branches=3)
    module = CPTMBottleneck(
        args["channels"],
        args["num_segments"],
        inner=int(args["channels"] * args["percent"]),
        rate=args["rate"],
        min_dim=args["min_dim"],
        gamma=args["gamma"],
    )
    return run_module(
        case,
        module,
        published=_within("trunk.cptm.layer1.", "backbone.multiScale_res2."),
        published_shape=TABLE.published_shape,
        forward=lambda x: {"y": module(x)},
    )


def run_bottleneck_3d(case: Case) -> Results:
    args = case.args
    _require(case, branches=3)
    num_segments = args["inputs"][0]["shape"][2]
    module = CPTMBottleneck(
        args["channels"],
        num_segments,
        inner=int(args["channels"] * args["percent"] / (args["stage"] // 2)),
        restore=args["dim_restore"],
        restore_relu=args["relu_out"],
        temporal_relu=args["temporal_relu"],
        shortcut=args["short_cut"],
        rate=args["rate"],
        min_dim=args["min_dim"],
        gamma=args["gamma"],
    )
    return run_module(
        case,
        module,
        published=_within("trunk.layer3.1.conv1.", "backbone.layer3.1.conv1."),
        published_shape=IN_3D,
        forward=lambda x: {"y": _clips(module(_frames(x)), num_segments)},
    )


def run_multiscale(case: Case) -> Results:
    args = case.args
    module = MultiscaleTemporal(args["channels"], args["num_segments"], blocks=args["blocks"])

    def published(name: str) -> str:
        _, index, rest = name.split(".", 2)
        return f"temporal.Temporal_Block_{int(index) + 1}.{rest}"

    return run_module(
        case,
        module,
        published=published,
        published_shape=IN_3D,
        forward=lambda x: {"y": module(x)},
    )


def run_stage(case: Case) -> Results:
    """Both fusions of the neck: the first gives its branches back in two halves."""
    args = case.args
    attention = BranchAttention(
        args["channels"],
        args["branches"],
        rate=args["rate"],
        min_dim=args["min_dim"],
        gamma=args["gamma"],
    )

    def forward(**inputs: Tensor) -> dict[str, Tensor]:
        size = inputs["x0"].shape[-2:]
        branches = [inputs[f"x{i}"].flatten(3) for i in range(args["branches"])]
        shares = compete(attention, branches)
        if case.family.endswith("stage2"):
            return {"y": concat_weighted(branches, shares).unflatten(3, size)}
        half = args["branches"] // 2
        halves = (slice(None, half), slice(half, None))
        return {
            f"y{i}": concat_weighted(branches[part], shares[:, part]).unflatten(3, size)
            for i, part in enumerate(halves)
        }

    return run_module(case, attention, published=_same, forward=forward)


def run_spatial_modulation(case: Case) -> Results:
    args = case.args
    levels = nn.ModuleList()
    for channels in args["in_channels"]:
        level = nn.Sequential()
        while channels < args["out_channels"]:
            level.append(ConvNorm(channels, 2 * channels, (3, 3), stride=2))
            channels *= 2
        levels.append(level)

    def forward(**inputs: Tensor) -> dict[str, Tensor]:
        return {
            f"y{i}": _clips(level(_frames(inputs[f"x{i}"])), inputs[f"x{i}"].shape[2])
            for i, level in enumerate(levels)
        }

    return run_module(
        case,
        levels,
        published=lambda name: f"spatial_modulation.{name}",
        published_shape=IN_3D,
        forward=forward,
    )


def run_temporal_modulation(case: Case) -> Results:
    args = case.args
    _require(case, ceil_mode=True)
    module = TemporalModulation(
        args["in_channels"],
        args["out_channels"],
        scale=args["downsample_scale"],
        groups=args["groups"],
    )
    return run_module(
        case,
        module,
        published=lambda name: f"conv.{name}",
        published_shape=IN_3D,
        forward=lambda x: {"y": _on_clips(module, x)},
    )


def run_level_fusion(case: Case) -> Results:
    args = case.args
    _require(case, downsample_scales=[[1, 1, 1]] * len(args["in_channels"]))
    levels = nn.ModuleList(
        ConvNorm(channels, middle, groups=args["groups"])
        for channels, middle in zip(args["in_channels"], args["mid_channels"], strict=True)
    )
    return run_module(
        case,
        levels,
        published=_within("neck.top_down_levels.", "neck.level_fusion_1."),
        published_shape=IN_3D,
        forward=lambda **inputs: {
            f"y{i}": _on_clips(level, inputs[f"x{i}"]) for i, level in enumerate(levels)
        },
    )


def _check_neck(case: Case, middle: int, channels: int) -> None:
    width = channels // 2
    _require(
        case,
        neck_in_channels=[middle, channels],
        neck_out_channels=width,
        neck_flow_type="parallel",
        spatial_modulation_in_channels=[middle, channels],
        spatial_modulation_out_channels=channels,
        upsample_scale_factor=[1, 1, 1],
        downsample_scale=[1, 1, 1],
        level_fusion_in_channels=[width, width],
        level_fusion_mid_channels=[width, width],
        level_fusion_out_channels=channels,
        level_fusion_downsample_scales=[[1, 1, 1], [1, 1, 1]],
        aux_loss_weight=AUXILIARY_WEIGHT,
    )


def run_neck(case: Case) -> Results:
    args = case.args
    _, middle, num_segments = args["inputs"][0]["shape"][:3]
    channels = args["inputs"][1]["shape"][1]
    _check_neck(case, middle, channels)
    with_loss = args["loss"] == "sum_y_times_cotangent_plus_loss_aux"
    if not with_loss and args["loss"] != "sum_y_times_cotangent":
        raise CaseError(f"loss {args['loss']!r} is not known")
    scales = tuple(args["temporal_downsample_scales"])
    parts = nn.ModuleDict(
        {
            "neck": CSTP(middle, channels, num_segments, scales=scales, gamma=args["neck_gamma"]),
            "aux_head": AuxiliaryHead(
                middle,
                channels,
                args["aux_num_classes"],
                clip_len=num_segments,
                dropout=args["dropout_at_run"],
                init_std=0.01,
            ),
        }
    )

    def forward(res4: Tensor, res5: Tensor) -> dict[str, Tensor]:
        y = parts["neck"](_frames(res4), _frames(res5))
        outputs = {"y": _clips(y, math.ceil(num_segments / scales[0]))}
        if with_loss:
            outputs["auxiliary"] = parts["aux_head"](_frames(res4))
        return outputs

    def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = torch.tensor(args["labels"])
        loss = F.cross_entropy(outputs["auxiliary"], labels)
        return {"loss_aux": args["aux_loss_weight"] * loss}

    return run_module(
        case,
        parts,
        published=_within("", "neck."),
        published_shape=TABLE.published_shape,
        forward=forward,
        losses=losses if with_loss else None,
    )


def _round_as_stored(model: nn.Module) -> None:
    """Run PyTorch's convolutions and 2-D norms on contiguous maps, as the stored arrays were made.

    In channels_last they sum in other orders, the norms also by the number of threads. In float64
    that changes a stage by 1e-15, and a calibrated network multiplies it by 1e6: more than the
    cases allow. Between these layers, and in our operators, everything stays channels_last.
    """

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].contiguous(), *inputs[1:]

    def after(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, Tensor]):
        if isinstance(output, Tensor):
            return output.contiguous(memory_format=torch.channels_last)
        return after(_module, _inputs, output[0]), output[1]  # a norm's map and its mean

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
            module.weight.data = module.weight.data.contiguous()


def run_network(case: Case) -> Results:
    args = case.args
    slowonly = case.family == "amsnet.network_slowonly"
    _require(
        case,
        out_indices=[2, 3],
        norm_eval=False,
        cptm_percent=0.25,
        head_spatial_type="avg",
        consensus="avg",
        average_clips="prob",
    )
    if slowonly:
        _require(
            case,
            conv1_kernel=[1, 7, 7],
            conv1_stride_t=1,
            pool1_stride_t=1,
            inflate=[0, 0, 1, 1],
            cptm_blocks=[f"{s}.{block}" for s, blocks in CPTM_BLOCKS.items() for block in blocks],
            cptm_dim_restore=False,
            cptm_temporal_relu=False,
            cptm_short_cut=True,
        )
        num_segments, frames_per_segment, variant = args["num_frames"], 1, "slowonly"
    else:
        num_segments, frames_per_segment = args["num_segments"], args["new_length"]
        _require(case, competitive_fusion=True, temporal_block_indices=[0, 2])
        if frames_per_segment not in (1, 3):
            raise CaseError(f"new_length {frames_per_segment} is not supported")
        variant = "2d" if frames_per_segment == 1 else "snippet"
    if args["loss"] not in ("none", "loss_cls_plus_loss_aux"):
        raise CaseError(f"loss {args['loss']!r} is not known")

    model = build_model(
        "amsnet",
        variant=variant,
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=num_segments,
        dropout=args["dropout_ratio"],
    )
    _check_neck(case, model.trunk.middle_channels, args["head_in_channels"])
    if args["aux_num_classes"] != args["num_classes"]:
        model.aux_head.reset_classifier(args["aux_num_classes"])
    for part, gamma in ((model.trunk, args["cptm_gamma"]), (model.neck, args["neck_gamma"])):
        for module in part.modules():
            if isinstance(module, BranchAttention):
                module.gamma = gamma
    for module, scale in zip(
        model.neck.temporal_modulation, args["temporal_downsample_scales"], strict=True
    ):
        module.scale = scale
    model.head.num_segments = math.ceil(num_segments / args["temporal_downsample_scales"][0])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args["dropout_at_run"]
    _round_as_stored(model)

    def forward(imgs: Tensor) -> dict[str, Tensor]:
        if slowonly:
            imgs = imgs.transpose(2, 3)  # [B, V, T, 3, H, W]
        frames = imgs.reshape(-1, 3 * frames_per_segment, *imgs.shape[-2:])  # [B*V*T, 3*L, H, W]
        output = model(frames)
        if isinstance(output, AuxiliaryLogits):
            return {"view_scores": output.logits, "auxiliary": output.auxiliary}
        prob = output.softmax(dim=-1).unflatten(0, (-1, args["views"])).mean(dim=1)
        # The authors' two test paths compute the same; ours is one.
        return {"view_scores": output, "prob": prob, "prob_non_fcn": prob}

    def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = torch.tensor(args["labels"])
        main = F.cross_entropy(outputs["view_scores"], labels)
        auxiliary = args["aux_loss_weight"] * F.cross_entropy(outputs["auxiliary"], labels)
        return {"loss_cls": main, "loss_aux": auxiliary, "loss": main + auxiliary}

    def as_clips(frames: Tensor) -> Tensor:
        return _clips(frames, num_segments)

    layers = ("layer1", "layer2", "layer3", "layer4")
    paths = {"conv1": "bn1", "maxpool": "maxpool"} | {name: name for name in layers}
    if not slowonly:
        paths |= {"multiScale_res2": "cptm.layer1", "multiScale_res4": "cptm.layer3"}
    features = {
        f"backbone.{name}": Feature(f"trunk.{path}", view=as_clips if slowonly else _identity)
        for name, path in paths.items()
    }
    features["neck"] = Feature("neck", view=lambda y: _clips(y, model.head.num_segments))
    table = TABLES[model.system]
    return run_module(
        case,
        model,
        published=lambda name: table.rename(name, "accel", "original"),
        published_shape=table.published_shape,
        forward=forward,
        features=features,
        losses=losses if args["loss"] != "none" else None,
    )


def _identity(value: Tensor) -> Tensor:
    return value


_ATTENTION = frozenset("channels branches rate min_dim gamma".split())
_NECK = frozenset(
    "neck_in_channels neck_out_channels neck_flow_type spatial_modulation_in_channels "
    "spatial_modulation_out_channels temporal_downsample_scales upsample_scale_factor "
    "downsample_scale level_fusion_in_channels level_fusion_mid_channels level_fusion_out_channels "
    "level_fusion_downsample_scales aux_num_classes aux_loss_weight neck_gamma loss labels "
    "param_order".split()
)
_NETWORK = (
    PLAIN_ARGS
    | CALIBRATION_ARGS
    | _NECK
    | set(
        "num_classes batch views size depth out_indices norm_eval cptm_gamma cptm_percent "
        "head_in_channels head_spatial_type consensus dropout_ratio average_clips fcn_test "
        "calibration_labels".split()
    )
)
_NETWORK_2D = Family(
    run_network,
    _NETWORK | set("num_segments competitive_fusion temporal_block_indices new_length".split()),
)

FAMILIES = {
    "amsnet.temporal_block": Family(
        run_temporal_block, PLAIN_ARGS | set("channels kernel_size relu".split())
    ),
    "amsnet.cptm_core": Family(
        run_core, PLAIN_ARGS | _ATTENTION | set("temporal_relu fold_output".split())
    ),
    "amsnet.cptm_bottleneck2d": Family(
        run_bottleneck_2d, PLAIN_ARGS | _ATTENTION | set("num_segments percent".split())
    ),
    "amsnet.cptm_bottleneck3d": Family(
        run_bottleneck_3d,
        PLAIN_ARGS
        | _ATTENTION
        | set("stage percent dim_restore relu_out temporal_relu short_cut reconstruction".split()),
    ),
    "amsnet.multiscale_temporal": Family(
        run_multiscale, PLAIN_ARGS | set("channels num_segments blocks".split())
    ),
    "amsnet.cstp_stage1": Family(run_stage, PLAIN_ARGS | _ATTENTION),
    "amsnet.cstp_stage2": Family(run_stage, PLAIN_ARGS | _ATTENTION),
    "amsnet.spatial_modulation": Family(
        run_spatial_modulation, PLAIN_ARGS | set("in_channels out_channels".split())
    ),
    "amsnet.temporal_modulation": Family(
        run_temporal_modulation,
        PLAIN_ARGS | set("in_channels out_channels downsample_scale groups ceil_mode".split()),
    ),
    "amsnet.level_fusion": Family(
        run_level_fusion,
        PLAIN_ARGS | set("in_channels mid_channels out_channels downsample_scales groups".split()),
    ),
    "amsnet.cstp_neck": Family(run_neck, PLAIN_ARGS | _NECK),
    "amsnet.network2d": _NETWORK_2D,
    "amsnet.network_snippet": _NETWORK_2D,
    "amsnet.network_slowonly": Family(
        run_network,
        _NETWORK
        | set(
            "num_frames conv1_kernel conv1_stride_t pool1_stride_t inflate trunk_sync_bn "
            "cptm_blocks cptm_dim_restore cptm_temporal_relu cptm_short_cut "
            "reconstruction".split()
        ),
    ),
}
