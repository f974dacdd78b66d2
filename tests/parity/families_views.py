"""Crops, pixels, learning rates and metrics of the published data protocols."""

import math
from typing import Any

import numpy as np
import torch
from comparison import Family, Results
from goldens import Case, CaseError, fill_input

from accel.engine.metrics import (
    ClassificationMeter,
    average_views,
    combine_scores,
    mean_class_accuracy,
)
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.schedule import ScheduleConfig, lr_factor
from pipelines.color import apply_maps, jitter_matrix, pca_offset
from pipelines.fallback import apply_views
from pipelines.geometry import (
    View,
    evaluation_views,
    multiscale_offsets,
    multiscale_sizes,
    resized_short_side,
)

CONVENTIONS = {"truncate": "tsm", "half_up": "mmaction"}
CROPS = {"center": 1, "three": 3, "ten": 10}
AVERAGING = {
    "mean_logits": "logits",
    "mean_softmax": "probs",
    "sum_of_mean_logits": "logits",
    "relu_logit_sum_over_models_and_views_divided_by_views": "positive_logits",
}
ANTIALIAS = {"pil_bilinear": True, "opencv_bilinear": False}


def run_crops(case: Case) -> Results:
    """Sizes after scaling, and boxes of center, three and ten crops: exactly."""
    args, results = case.args, Results()
    for entry in case.content["cases"]:
        width, height = entry["w"], entry["h"]
        for record in args["size_fields"]:
            convention = CONVENTIONS[record["rounding"]]
            if convention != record["style"]:
                raise CaseError(f"no convention {record['style']!r} rounds by {record['rounding']}")
            size = resized_short_side(width, height, args["short"], convention)
            expected = entry["short256"][record["field"]]
            results.expect(f"{width} x {height} {convention}", list(size), expected)
        for record in args["crops"]:
            name = f"{width} x {height} {record['style']} {record['field']}"
            boxes = _boxes(width, height, args["short"], record)
            results.expect(name, boxes, entry[record["style"]][record["field"]])
    return results


def _boxes(width: int, height: int, short: int, record: dict[str, Any]) -> Any:
    try:
        views = evaluation_views(
            width,
            height,
            size=record["crop"],
            resize=short,
            num_crops=CROPS[record["op"]],
            convention=record["style"],
        )
    except ValueError:
        return {"error": "AssertionError"} if record["may_refuse"] else None
    if record["op"] == "ten":
        mirrored = views[1::2]
        views = views[::2]
        if [v.window for v in mirrored] != [v.window for v in views] or not all(
            v.flip for v in mirrored
        ):
            return "each crop must be followed by its mirror image"
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (view.window for view in views)]
    return boxes[0] if record["op"] == "center" else boxes


def run_multiscale(case: Case) -> Results:
    """The candidates of the multi-scale crop, in order."""
    args, results = case.args, Results()
    if args["max_distort"] != 1 or args["pair_order"] != "h_outer_w_inner":
        raise CaseError("max_distort and pair_order: only 1 and h_outer_w_inner are known")
    results.expect("number of places", len(multiscale_offsets(9, 9, 1, 1)), args["num_positions"])
    steps = [list(place) for place in multiscale_offsets(5, 5, 1, 1)]
    results.expect("places", steps, args["positions_in_quarter_steps"])
    for entry in case.content["cases"]:
        width, height = entry["w"], entry["h"]
        candidates = [
            [[w, h], [list(place) for place in multiscale_offsets(width, height, w, h)]]
            for w, h in multiscale_sizes(width, height, args["input_size"], args["scales"])
        ]
        results.expect(f"{width} x {height}", candidates, entry["tsm"])
        if not entry["mmaction_same_set"]:
            results.expect(f"{width} x {height} mmaction", candidates, entry["mmaction"])
    return results


def run_pixels(case: Case) -> Results:
    """Resizing by the reference path, normalization by the engine, color maps."""
    results, arrays = Results(), case.arrays()
    for step in case.args["steps"]:
        name, stored = step["array"], arrays[step["array"]]
        results.compared |= {name, step["input"]} - {""}
        pixels = arrays[step["input"]] if step["input"] else None
        value = PIXELS[step["op"]](step["params"], pixels)
        results.expect(f"{name}: shape", list(value.shape), step["shape"])
        results.expect(f"{name}: type", stored.dtype.name, step["dtype"])
        off = np.abs(value.astype(np.float64) - stored.astype(np.float64)).max()
        results.expect(f"{name}: off by {off:.3g}", bool(off <= step["atol"]), True)
    return results


def _resize_short(params: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    antialias = ANTIALIAS[params["backend"]]
    height, width = pixels.shape[:2]
    convention = "tsm" if antialias else "mmaction"
    resized = resized_short_side(width, height, params["short"], convention)
    # The reference path cuts squares out of the scaled frame: here, one of all there is and the
    # rest beside it.
    short, (right, below) = min(resized), (resized[0] - min(resized), resized[1] - min(resized))
    views = [View(resized, (x, y, short, short), False) for x, y in ((0, 0), (right, below))]
    first, last = apply_views(pixels[None], views, size=short, antialias=antialias)
    axis = 0 if below else 1
    rest = np.take(last[0], range(short - max(right, below), short), axis=axis)
    return np.concatenate([first[0], rest], axis=axis)


def _crop_resize(params: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = params["box"]
    size = params["size"][0]
    if params["size"] != [size, size]:
        raise CaseError("crops are scaled to squares here")
    view = View(pixels.shape[1::-1], (x0, y0, x1 - x0, y1 - y0), False)
    antialias = ANTIALIAS[params["backend"]]
    return apply_views(pixels[None], [view], size=size, antialias=antialias)[0][0]


def _normalise(params: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    frames, unit = params["frames"], 255 / params["divide_by"]
    stacked = params["layout"] == "(frames*3,H,W)"
    precision = Precision(
        PrecisionConfig(),
        torch.device("cpu"),
        mean=[value / unit for value in params["mean"]] if unit != 1 else params["mean"],
        std=[value / unit for value in params["std"]] if unit != 1 else params["std"],
        frames_per_segment=frames if stacked else 1,
    )
    clips = torch.from_numpy(np.stack([pixels] * frames))[None]  # [1, frames, H, W, 3]
    result = precision.network_input(clips).numpy()
    return result[0] if stacked else result


def _color_jitter(params: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    maps = jitter_matrix([(part, amount) for part, amount in params["steps"]])
    frames = torch.from_numpy(pixels)[None]
    return apply_maps(frames, torch.from_numpy(maps).float()[None])[0].numpy()


def _pca_offset(params: dict[str, Any], pixels: None) -> np.ndarray:
    return pca_offset(params["alpha"])


PIXELS: dict[str, Any] = {
    "resize_short": _resize_short,
    "crop_resize": _crop_resize,
    "normalise": _normalise,
    "colour_jitter": _color_jitter,
    "pca_offset": _pca_offset,
}


def run_schedules(case: Case) -> Results:
    """Every rate of every schedule."""
    results = Results()
    for record in case.args["schedules"]:
        stored = case.content["cases"][record["key"]][record["field"]]
        if record["encoding"] == "runlength":
            stored = [rate for rate, count in stored for _ in range(count)]
        config, per_epoch = schedule_of(record), record["iters_per_epoch"]
        rates = [
            record["base_lr"] * lr_factor(config, iteration, per_epoch)
            for iteration in range(record["epochs"] * per_epoch)
        ]
        results.expect(f"{record['key']}: rates", len(rates), len(stored))
        equal = np.allclose(rates, stored, rtol=case.args["rtol"], atol=0)
        results.expect(f"{record['key']}: {rates[:3]} ...", bool(equal), True)
    return results


def schedule_of(record: dict[str, Any]) -> ScheduleConfig:
    """The schedule section that stands for a published policy."""
    policy, milestones = record["policy"], tuple(record["milestones"])
    cosine = policy.endswith(("_cos", "_cosine"))
    four_steps = policy == "mas_lr" and len(milestones) == 4
    return ScheduleConfig(
        kind="cosine" if cosine else "step",
        per="iteration" if policy.startswith("msn_") else "epoch",
        epochs=record["epochs"],
        milestones=() if cosine else milestones,
        gamma=record["gamma"],
        factors=(0.1, 0.01, 0.005, 0.001) if four_steps else (),
        warmup_epochs=record["warmup_epochs"],
        start_factor=1 / record["warmup_multiplier"],
        final_factor=record["eta_min"] / record["base_lr"],
    )


def run_metrics(case: Case) -> Results:
    """Accuracies of given scores, and averages over views and models."""
    results = Results()
    for name, entry in case.content["metrics"].items():
        _compare_accuracies(case, name, entry, results)
    for name, entry in case.content["views"].items():
        logits = {
            key: torch.from_numpy(entry["scale"] * fill_input(entry[key], entry["shape"]))
            for key in ("views_input", "second_model_input")
        }
        for record in case.args["view_outputs"]:
            models = list(logits.values())[: record["models"]]
            scores = [average_views(model, AVERAGING[record["rule"]]) for model in models]
            total = combine_scores(scores, [1.0] * len(scores))
            expected = np.array(entry[record["field"]])
            off = np.abs(total.numpy() - expected).max()
            what = f"{name} {record['field']}"
            results.expect(f"{what}: off by {off:.3g}", bool(off <= record["atol"]), True)
            results.expect(f"{what}: argmax", total.argmax(1).tolist(), _field(entry, record))
    return results


def _field(entry: dict[str, Any], record: dict[str, Any]) -> Any:
    for key in record["argmax_field"].split("."):
        entry = entry[key]
    return entry


def _compare_accuracies(case: Case, name: str, entry: dict[str, Any], results: Results) -> None:
    scores = fill_input(entry["scores_input"], entry["scores_shape"])
    labels = np.array(entry["labels"])
    scores[np.arange(len(labels)), labels] += entry["boost_added_at_label"]
    meter = ClassificationMeter(scores.shape[1], torch.device("cpu"))
    meter.update(torch.from_numpy(scores), torch.from_numpy(labels))
    computed = meter.compute()
    values = {
        ("topk_accuracy", 1): computed.top1,
        ("topk_accuracy", 5): computed.top5,
        ("mean_class_accuracy_absent_is_zero", 1): computed.mean_class,
        ("mean_class_accuracy_absent_is_nan", 1): mean_class_accuracy(
            meter.confusion, absent="nan"
        ),
    }
    for record in case.args["metric_outputs"]:
        stored: Any = entry
        for key in record["field"].split("."):
            stored = stored[key]
        value = record["scale"] * values[record["rule"], record["k"]]
        fits = math.isnan(value) if stored is None else abs(value - stored) <= record["atol"]
        results.expect(f"{name} {record['field']}: {value} for {stored}", fits, True)


FAMILIES = {
    "sampling.crops": Family(
        run_crops, frozenset("box_format crops short size_fields store".split())
    ),
    "sampling.multiscale_crops": Family(
        run_multiscale,
        frozenset(
            "input_size max_distort num_positions pair_order positions_in_quarter_steps scales "
            "store".split()
        ),
    ),
    "sampling.transforms_pixels": Family(run_pixels, frozenset({"steps", "store"})),
    "sampling.lr_schedules": Family(run_schedules, frozenset({"rtol", "schedules", "store"})),
    "sampling.metrics": Family(
        run_metrics, frozenset("metric_outputs store topk view_outputs".split())
    ),
}
