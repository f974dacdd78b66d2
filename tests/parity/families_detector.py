"""AMTNet and ROAD's SSD: whole networks, the L2 norm, starting trunks, parameter groups."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from comparison import Family, Results
from goldens import Case, CaseError, fill_input, fill_value
from torch import Tensor
from torch.nn import functional as F

from accel.detection.priors import IMAGE_SIZE, ssd300_priors
from accel.models.convert import TABLES
from accel.models.convert.amtnet import fill_trunk
from accel.models.convert.names import OURS
from accel.models.detectors import Detector, build_detector, describe_detector
from accel.models.param_groups import detector_groups
from accel.models.vgg_ssd import NORM_FLOOR, ScaledL2Norm, SSDTrunk
from accel.models.weights import export_weights, import_weights


def _check(case: Case, **expected: object) -> None:
    for name, value in expected.items():
        if case.args[name] != value:
            raise CaseError(f"{name} must be {value}, got {case.args[name]}")


def _published_state(case: Case) -> dict[str, Tensor]:
    """The filled published checkpoint; tables of indices, which nothing reads, are zeros."""
    state = {}
    for name, shape in case.state_shapes.items():
        is_table = name.endswith((".ffm_index", ".counts"))
        value = np.zeros(shape, dtype=np.int64) if is_table else fill_value(name, shape)
        state[name] = torch.from_numpy(value)
    return state


def _import(case: Case, model: Detector, results: Results) -> None:
    """Fill the model as a user does: from a file in the published layout."""
    state = _published_state(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "published.pth"
        torch.save(state, path)
        import_weights(model, path)
    results.expect("layout of the names", TABLES[model.system].recognize(list(state)), "original")
    described = describe_detector(state, path, model.system)
    results.expect("classes in the file", described["num_classes"], case.args["num_classes"])
    exported = export_weights(model, "original")
    exported = {name.removeprefix("module."): value for name, value in exported.items()}
    shapes = {name: tuple(value.shape) for name, value in exported.items()}
    results.expect("exported names and shapes", shapes, case.state_shapes)
    floating = [name for name, value in state.items() if value.is_floating_point()]
    unequal = [name for name in floating if not torch.equal(exported[name], state[name])]
    results.expect("tensors that an export changes", unequal, [])


def run_network(case: Case) -> Results:
    args = case.args
    _check(case, kd=3, ssd_dim=IMAGE_SIZE, window_fusion="cat", mode="eval", dtype="float64")
    model = build_detector(
        "amtnet",
        num_classes=args["num_classes"],
        num_frames=args["seq_len"],
        fusion=args["fusion_type"],
        input_frames=args["input_frames_base"],
        extra_frames=args["input_frames_extra"] if args["fusion_type"] != "none" else 0,
    )
    model = model.double().eval()
    results = Results()
    _import(case, model, results)
    sources: list[Tensor] = []
    model.base.register_forward_hook(lambda _module, _inputs, output: sources.extend(output))
    inputs = {
        record["arg"]: torch.from_numpy(
            fill_input(record["fill"], record["shape"]) * record["scale"]
        ).requires_grad_()
        for record in args["inputs"]
    }
    with torch.set_grad_enabled(bool(args["cotangents"])):
        conf, loc = model(*(x.flatten(0, 1) for x in inputs.values()))
    outputs = {"conf": conf, "loc": loc}
    for name, value in outputs.items():
        results.arrays["output", name] = value.detach().numpy()
    for k, source in enumerate(sources):
        results.arrays["feature", f"source{k}"] = source.detach().numpy()
        results.arrays["feature", f"pooled{k}"] = _windows(source.detach(), args["seq_len"]).numpy()
    if args["cotangents"]:
        loss = sum(
            (outputs[c["output"]] * torch.from_numpy(fill_input(c["fill"], c["shape"]))).sum()
            for c in args["cotangents"]
        )
        loss.backward()
        for name, x in inputs.items():
            results.arrays["grad_input", name] = x.grad.numpy()
        table = TABLES[model.system]
        for name, parameter in model.named_parameters():
            there = table.rename(name, OURS, "original")
            gradient = table.to_published(name, parameter.grad)
            results.arrays["grad_param", there] = gradient.numpy()
    return results


def _windows(source: Tensor, num_frames: int) -> Tensor:
    """What the published network stores before its heads, which ours never does."""
    columns = F.unfold(F.pad(source, (1,) * 4, mode="replicate"), 3)  # [N*T, C*9, H*W]
    windows = columns.unflatten(1, (source.shape[1], 9)).permute(0, 3, 2, 1).flatten(2) / 9
    return torch.cat(windows.unflatten(0, (-1, num_frames)).unbind(1), dim=-1)


def run_ssd_network(case: Case) -> Results:
    args = case.args
    _check(case, ssd_dim=IMAGE_SIZE, mode="eval", dtype="float64", cotangents=[])
    model = build_detector(
        "ssd300", num_classes=args["num_classes"], input_frames=args["input_frames"]
    )
    model = model.double().eval()
    results = Results()
    _import(case, model, results)
    (record,) = args["inputs"]
    x = torch.from_numpy(fill_input(record["fill"], record["shape"]) * record["scale"])
    with torch.no_grad():
        conf, loc = model(x)
    for name, value in (("conf", conf), ("loc", loc), ("priors", ssd300_priors().double())):
        results.arrays["output", name] = value.numpy()
    return results


def run_l2norm(case: Case) -> Results:
    args = case.args
    _check(case, norm_floor=NORM_FLOOR, dtype="float64")
    norm = ScaledL2Norm(args["channels"]).double()
    results = Results()
    results.expect("scale of the start", norm.weight[0].item(), args["initial_scale"])
    (shape,) = case.state_shapes.values()
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(fill_value(next(iter(case.state_shapes)), shape)))
    (record,), (cotangent,) = args["inputs"], args["cotangents"]
    x = torch.from_numpy(fill_input(record["fill"], record["shape"]) * record["scale"])
    for item, row, column in args["zero_pixels"]:
        x[item, :, row, column] = 0
    x.requires_grad_()
    y = norm(x)
    (y * torch.from_numpy(fill_input(cotangent["fill"], cotangent["shape"]))).sum().backward()
    results.arrays["output", "y"] = y.detach().numpy()
    for kind, of in {(r["kind"], r["of"]) for r in args["outputs"]} - {("output", "y")}:
        gradient = x.grad if of in ("x", "grad_x") else norm.weight.grad
        results.arrays[kind, of] = gradient.numpy()
    return results


def run_import_core(case: Case) -> Results:
    args, expected = case.args, case.content["inputs"]
    trunk = SSDTrunk(3 * args["core_input_frames"])
    with torch.no_grad():
        for value in trunk.state_dict().values():
            value.fill_(args["core_initial_value"])
    prefix = args["key_prefix"]
    state = {}
    for name, shape in case.state_shapes.items():
        is_table = name.endswith((".ffm_index", ".counts"))
        value = np.zeros(shape) if is_table else fill_value(name.removeprefix(prefix), shape)
        state[name] = torch.from_numpy(value).float()
    report = fill_trunk(trunk, state, published_rule=True)
    results = Results()
    results.expect("loaded", list(report.loaded), expected["loaded"])
    left_out = [n for n in expected["not_loaded"] if not n.endswith((".ffm_index", ".counts"))]
    results.expect("not loaded", list(report.kept), left_out)
    results.expect("skipped", list(report.skipped), expected["checkpoint_keys_skipped"])
    own = {n.replace("norm.", "L2Norm."): v.double() for n, v in trunk.state_dict().items()}
    stats = [[own[n].sum().item(), own[n].norm().item()] for n in report.loaded]
    results.arrays["output", "loaded_stats"] = np.array(stats).reshape(-1, 2)
    results.arrays["output", "vgg0"] = own["vgg.0.weight"].numpy()
    if not report.loaded:  # files of one device: the released code finds nothing, ours does
        results.expect("found by ours", len(fill_trunk(trunk, state).loaded), len(report.kept))
    return results


def run_optim_groups(case: Case) -> Results:
    args = case.args
    _check(case, momentum=0.9, nesterov=False)
    with torch.device("meta"):
        model = build_detector(
            "amtnet",
            num_classes=args["num_classes"],
            num_frames=args["seq_len"],
            fusion=args["fusion_type"],
            input_frames=args["input_frames_base"],
            extra_frames=args["input_frames_extra"] if args["fusion_type"] != "none" else 0,
        )
    factors = {
        TABLES["amtnet"].rename(name, OURS, "original"): (group.lr_mult, group.decay_mult)
        for group in detector_groups(model)
        for name in group.params
    }
    prefix = "module." if args["data_parallel"] else ""
    names = [n.removeprefix(prefix) for n in case.state_shapes]
    names = [n for n in names if not n.endswith((".ffm_index", ".counts"))]
    results = Results()
    results.expect("parameters", sorted(factors), sorted(names))
    results.arrays["output", "lr"] = np.array([args["lr"] * factors[n][0] for n in names])
    results.arrays["output", "wd"] = np.array([args["weight_decay"] * factors[n][1] for n in names])
    return results


def _args(names: str) -> frozenset[str]:
    return frozenset(names.split())


_RUN = "mode dtype inputs cotangents outputs "

FAMILIES = {
    "amtnet.network": Family(
        run_network,
        _args(
            "fusion_type num_classes seq_len kd input_frames_base input_frames_extra ssd_dim "
            "window_fusion num_items " + _RUN
        ),
    ),
    "amtnet.ssd_network": Family(
        run_ssd_network, _args("num_classes input_frames ssd_dim num_items " + _RUN)
    ),
    "amtnet.l2norm": Family(
        run_l2norm, _args("channels initial_scale norm_floor zero_pixels " + _RUN)
    ),
    "amtnet.import_core": Family(
        run_import_core,
        _args(
            "checkpoint checkpoint_fusion_type checkpoint_num_classes key_prefix "
            "checkpoint_input_frames core_input_frames core_initial_value checkpoint_dtype outputs"
        ),
    ),
    "amtnet.optim_groups": Family(
        run_optim_groups,
        _args(
            "fusion_type num_classes seq_len input_frames_base input_frames_extra data_parallel "
            "lr weight_decay momentum nesterov outputs"
        ),
    ),
}
