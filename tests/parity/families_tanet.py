"""TANet: module, block, network, optimizer groups, name map."""

from comparison import Family, Results
from goldens import Case, CaseError
from module_case import COMMON_ARGS, run_module
from torch import Tensor

from accel.models import build_model
from accel.models.convert import TABLES
from accel.models.param_groups import parameter_groups
from accel.models.resnet import Bottleneck
from accel.models.tanet import TAM

rename = TABLES["tanet"].rename


def _layout(layout: str, *, dropout: float) -> str:
    """Our name of a case's layout: without dropout the authors' classifier is `base_model.fc`."""
    if layout not in ("original", "mmaction2"):
        raise CaseError(f'layout "{layout}" is not known')
    return "original_fc" if layout == "original" and dropout == 0 else layout


def run_tam(case: Case) -> Results:
    args = case.args
    if (args["kernel_size"], args["stride"], args["padding"]) != (3, 1, 1):
        raise CaseError("kernel_size, stride, padding other than 3, 1, 1 are not supported")
    tam = TAM(args["in_channels"], args["num_segments"], alpha=args["alpha"], beta=args["beta"])
    return run_module(case, tam, published=lambda name: name, forward=lambda x: {"output": tam(x)})


def run_block(case: Case) -> Results:
    args = case.args
    layout = _layout(args["layout"], dropout=1.0)
    block = Bottleneck(
        args["inplanes"],
        args["planes"],
        stride=args["stride"],
        downsample=args["downsample"],
        temporal=TAM(args["planes"], args["num_segments"]),
    )
    prefix = {"original": "base_model.layer1.0.", "mmaction2": "backbone.layer1.0."}[layout]

    def published(name: str) -> str | None:
        full = rename(f"trunk.layer1.0.{name}", "accel", layout)
        return full and full.removeprefix(prefix)

    return run_module(case, block, published=published, forward=lambda x: {"output": block(x)})


def run_network(case: Case) -> Results:
    args = case.args
    layouts = {
        ("original", "new_fc"): "original",
        ("original", "base_model.fc"): "original_fc",
        ("mmaction2", "cls_head.fc_cls"): "mmaction2",
    }
    layout = layouts.get((args["layout"], args["classifier"]))
    if layout is None or args["consensus"] != "avg":
        raise CaseError("layout, classifier or consensus is not known")
    if args["input_layout"] not in ("N,T*C,H,W", "N,V*T,C,H,W"):
        raise CaseError(f"input_layout {args['input_layout']!r} is not known")
    model = build_model(
        "tanet",
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=args["num_segments"],
        dropout=args["dropout"],
        partial_bn=args["partial_bn"],
    )
    model.head.dropout.p = args["dropout_at_run"]

    def forward(x: Tensor) -> dict[str, Tensor]:
        # Both input layouts are frame-major, so folding is a plain reshape.
        frames = x.reshape(-1, 3, *x.shape[-2:])  # [N*V*T, 3, H, W]
        logits = model(frames)  # [N*V, K]
        views = logits.unflatten(0, (-1, args["num_views"]))  # [N, V, K]
        if args["average_views"] == "prob":
            views = views.softmax(dim=-1)
        elif args["average_views"] != "logits":
            raise CaseError(f"average_views {args['average_views']!r} is not known")
        return {"logits": logits, "scores": views.mean(dim=1)}  # [N*V, K], [N, K]

    return run_module(
        case,
        model,
        published=lambda name: rename(name, "accel", layout),
        forward=forward,
        features={
            name: f"trunk.{name}" for name in ("maxpool", "layer1", "layer2", "layer3", "layer4")
        },
    )


def run_optim_groups(case: Case) -> Results:
    args = case.args
    layout = _layout(args["layout"], dropout=args["dropout"])
    model = build_model(
        "tanet",
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=args["num_segments"],
        dropout=args["dropout"],
        partial_bn=args["partial_bn"],
    )
    groups = [
        {
            "name": group.name,
            "lr_mult": group.lr_mult,
            "decay_mult": group.decay_mult,
            "count": len(group.params),
            "numel": sum(parameter.numel() for parameter in group.params.values()),
            "params": [rename(name, "accel", layout) for name in group.params],
        }
        for group in parameter_groups(model, f"tanet_{args['layout']}", fc_lr5=args["fc_lr5"])
    ]
    grouped = {name for group in groups for name in group["params"]}
    names = [rename(name, "accel", layout) for name, _ in model.named_parameters()]
    results = Results()
    results.expect("number of groups", len(groups), len(case.content["groups"]))
    for ours, expected in zip(groups, case.content["groups"], strict=False):
        for key in ours.keys() | expected.keys():
            results.expect(f"{expected.get('name')}: {key}", ours.get(key), expected.get(key))
    left_out = [name for name in names if name not in grouped]
    results.expect("in_no_group", left_out, case.content["in_no_group"])
    return results


def run_name_map(case: Case) -> Results:
    args = case.args
    source, target = args["from_layout"], args["to_layout"]
    layouts = ("original", "mmaction2")
    if source not in layouts or target not in layouts:
        raise CaseError(f"from_layout, to_layout must be of {layouts}")
    model = build_model(
        "tanet",
        depth=args["depth"],
        num_classes=args["num_classes"],
        num_segments=args["num_segments"],
    )
    expected = {name: value for name, value in case.content.items() if name != "case"}
    results = Results()
    ours = {rename(name, "accel", source) for name in model.state_dict()}
    results.expect("names", sorted(ours - {None}), sorted(expected))
    for name, value in expected.items():
        results.expect(name, rename(name, source, target), value)
        results.expect(value, rename(value, target, source), name)
    return results


FAMILIES = {
    "tanet.tam": Family(
        run_tam,
        COMMON_ARGS
        | set("in_channels num_segments kernel_size stride padding alpha beta num_clips".split()),
    ),
    "tanet.block": Family(
        run_block,
        COMMON_ARGS
        | set("layout inplanes planes stride downsample num_segments num_clips".split()),
    ),
    "tanet.network": Family(
        run_network,
        COMMON_ARGS
        | set(
            "layout depth num_segments num_classes num_clips num_views size input_layout dropout "
            "dropout_at_run classifier consensus average_views partial_bn".split()
        ),
    ),
    "tanet.optim_groups": Family(
        run_optim_groups,
        frozenset(
            "layout depth num_segments num_classes dropout partial_bn fc_lr5 "
            "applied_by_training_loop".split()
        ),
    ),
    "tanet.name_map": Family(
        run_name_map, frozenset("from_layout to_layout depth num_segments num_classes".split())
    ),
}
