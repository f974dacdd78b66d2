"""AMTNet: priors, box coding, matching, losses, suppression, and the windows of the heads."""

import numpy as np
import torch
from comparison import Family, Results
from goldens import Case, CaseError, fill_input
from torch import Tensor

import kernels
from accel.detection import boxes as box_functions
from accel.detection import priors as prior_boxes
from accel.detection.boxes import decode, encode
from accel.detection.losses import multibox_loss
from accel.detection.matching import match
from accel.detection.mining import hard_negatives
from accel.detection.priors import ssd300_priors
from accel.models.amtnet_heads import window_convolution
from accel.models.convert.amtnet_heads import convolution_from_linear, linear_from_convolution


def _results(**arrays: Tensor) -> Results:
    values = {("output", name): value.detach().numpy() for name, value in arrays.items()}
    return Results(arrays=values)


def _inputs(case: Case) -> dict[str, Tensor]:
    """The filled inputs, in float64, requiring gradients."""
    return {
        record["arg"]: torch.from_numpy(
            fill_input(record["fill"], record["shape"]) * record["scale"]
        ).requires_grad_()
        for record in case.args["inputs"]
    }


def _check(case: Case, **expected: object) -> None:
    """Raise CaseError for settings that the published recipes never change."""
    for name, value in expected.items():
        if case.args[name] != value:
            raise CaseError(f"{name} must be {value}, got {case.args[name]}")


def _priors(case: Case) -> Tensor:
    _check(case, dtype="float64", priors_dtype="float32")
    return ssd300_priors().double()


def _check_variances(case: Case) -> None:
    _check(case, variances=[box_functions.CENTER_VARIANCE, box_functions.SIZE_VARIANCE])


def run_priors(case: Case) -> Results:
    _check(
        case,
        ssd_dim=prior_boxes.IMAGE_SIZE,
        feature_maps=list(prior_boxes.MAP_SIZES),
        steps=list(prior_boxes.STEPS),
        min_sizes=list(prior_boxes.BOX_SIZES[:-1]),
        max_sizes=list(prior_boxes.BOX_SIZES[1:]),
        aspect_ratios=[list(ratios) for ratios in prior_boxes.ASPECT_RATIOS],
        clip=True,
    )
    priors = ssd300_priors()
    repeated = priors.double().repeat(1, case.args["seq_len"])
    sizes = zip(prior_boxes.MAP_SIZES, prior_boxes.BOXES_PER_CELL, strict=True)
    per_level = [0] + [size**2 * boxes for size, boxes in sizes]
    return _results(
        priors4=priors,
        full_sum=repeated.sum(0),
        level_offsets=torch.tensor(per_level).cumsum(0),
        first_row=repeated[0],
    )


def run_box_coding(case: Case) -> Results:
    _check_variances(case)
    priors, loc = _priors(case), _inputs(case)["loc"]
    boxes = decode(loc, priors)  # [P, T, 4]
    columns = boxes.flatten(1)
    error = (encode(boxes, priors) - loc).abs().max()
    return _results(
        decoded=columns[:: case.args["row_stride"]],
        decoded_sum=columns.sum(0),
        decoded_l2=columns.square().sum(0).sqrt(),
        roundtrip_max_error=error,
    )


def run_match(case: Case) -> Results:
    _check_variances(case)
    args, stored = case.args, case.arrays()
    boxes = torch.from_numpy(stored["gt"]).view(1, args["num_microtubes"], args["seq_len"], 4)
    labels = torch.from_numpy(stored["gt_labels"]).view(1, -1, args["seq_len"])[..., 0]
    # Padding in front of, between and behind the boxes must not change the labels.
    padded = torch.full((1, 2 * labels.shape[1] + 1), -1)
    padded[:, 1::2] = labels
    anything = torch.full((1, padded.shape[1], args["seq_len"], 4), 0.5, dtype=boxes.dtype)
    anything[:, 1::2] = boxes
    found = match(anything, padded, _priors(case), iou_threshold=args["iou_threshold"])
    found_labels, targets = found.labels[0], found.targets[0]
    positive = found_labels.nonzero()[:, 0]
    # Background priors that overlap nothing have the first box, of the padding here.
    plain = match(boxes, labels, _priors(case), iou_threshold=args["iou_threshold"])
    results = _results(
        positive_index=positive,
        positive_label=found_labels[positive],
        positive_loc=targets[positive],
        num_positive=(found_labels > 0).sum(),
        loc_sum=plain.targets[0].sum(0),
        loc_sample=plain.targets[0, :: args["loc_row_stride"]],
    )
    results.facts += 1
    if not torch.equal(plain.labels, found.labels):
        results.differences.append("labels: padding changes them")
    return results


def run_multibox_loss(case: Case) -> Results:
    args, stored = case.args, case.arrays()
    inputs = _inputs(case)
    conf, loc = inputs["conf"], inputs["loc"]
    labels = torch.from_numpy(stored["labels"].astype(np.int64))
    # Targets elsewhere do not matter, not even when they are not finite.
    targets = torch.full(loc.shape, torch.nan, dtype=loc.dtype)
    targets[labels > 0] = torch.from_numpy(stored["gt_loc_pos"])
    ratio = args["neg_pos_ratio"]
    loss_loc, loss_conf = multibox_loss(conf, loc, labels, targets, negatives_per_positive=ratio)
    (loss_loc + loss_conf).backward()
    negatives = hard_negatives(-conf.log_softmax(-1)[..., 0], labels, ratio=ratio)
    neg_index, pos_index = negatives.nonzero(), (labels > 0).nonzero()
    sample = neg_index[: args["grad_conf_rows"]]
    return _results(
        loss_loc=loss_loc,
        loss_conf=loss_conf,
        num_pos=(labels > 0).sum(1),
        neg_index=neg_index,
        pos_index=pos_index,
        grad_conf_sample=conf.grad[sample[:, 0], sample[:, 1]],
        grad_conf_l2=conf.grad.norm(),
        grad_loc_pos=loc.grad[labels > 0],
        grad_loc_l2=loc.grad.norm(),
    )


def run_ssd_multibox_loss(case: Case) -> Results:
    _check_variances(case)
    args, stored = case.args, case.arrays()
    inputs = _inputs(case)
    conf, loc = inputs["conf"], inputs["loc"]
    given = [torch.from_numpy(stored[f"gt{i}"]) for i in range(args["num_items"])]
    most = max(map(len, given))
    boxes = torch.zeros(len(given), most, 1, 4, dtype=torch.float64)
    labels = torch.full((len(given), most), -1)
    for i, rows in enumerate(given):
        boxes[i, : len(rows), 0], labels[i, : len(rows)] = rows[:, :4], rows[:, 4].long()
    matches = match(boxes, labels, _priors(case), iou_threshold=args["iou_threshold"])
    losses = multibox_loss(conf, loc, *matches, negatives_per_positive=args["neg_pos_ratio"])
    sum(losses).backward()
    return _results(
        loss_loc=losses[0],
        loss_conf=losses[1],
        used_index=conf.grad.abs().sum(-1).nonzero(),
        grad_conf_l2=conf.grad.norm(),
        grad_loc_l2=loc.grad.norm(),
    )


def run_nms(case: Case) -> Results:
    _check(case, index_base=0)
    stored = case.arrays()
    indices, counts = kernels.nms(
        torch.from_numpy(stored["boxes"])[None],
        torch.from_numpy(stored["scores"])[None],
        iou_threshold=case.args["iou_threshold"],
        top_k=case.args["topk"],
    )
    return _results(keep=indices[0, : counts.item()])


def run_feat_pooling(case: Case) -> Results:
    """The windows themselves: a head whose linear layer is the identity."""
    _check(case, kd=3, window_fusion="cat", mode="eval", dtype="float64")
    args = case.args
    x = _inputs(case)["x"]
    identity = torch.eye(args["seq_len"] * 9 * args["channels"], dtype=x.dtype)
    weight = convolution_from_linear(identity, args["seq_len"])
    y = window_convolution(x, weight, None, args["seq_len"]).flatten(1, 2)  # [N, H*W, T*9*C]
    (cotangent,) = args["cotangents"]
    grad = torch.from_numpy(fill_input(cotangent["fill"], cotangent["shape"]))
    (grad_x,) = torch.autograd.grad(y, x, grad)
    results = _results(y=y, grad_x=grad_x)
    results.facts += 1
    if not torch.equal(linear_from_convolution(weight, args["seq_len"]), identity):
        results.differences.append("linear_from_convolution does not invert")
    return results


FAMILIES = {
    "amtnet.priors": Family(
        run_priors,
        frozenset(
            "seq_len ssd_dim feature_maps steps min_sizes max_sizes aspect_ratios clip dtype "
            "outputs".split()
        ),
    ),
    "amtnet.box_coding": Family(
        run_box_coding,
        frozenset("seq_len variances row_stride dtype priors_dtype inputs outputs".split()),
    ),
    "amtnet.match": Family(
        run_match,
        frozenset(
            "seq_len iou_threshold variances num_microtubes loc_row_stride dtype priors_dtype "
            "outputs".split()
        ),
    ),
    "amtnet.multibox_loss": Family(
        run_multibox_loss,
        frozenset(
            "num_classes seq_len num_items neg_pos_ratio grad_conf_rows dtype inputs "
            "outputs".split()
        ),
    ),
    "amtnet.ssd_multibox_loss": Family(
        run_ssd_multibox_loss,
        frozenset(
            "num_classes num_items neg_pos_ratio iou_threshold variances dtype priors_dtype inputs "
            "outputs".split()
        ),
    ),
    "amtnet.nms": Family(run_nms, frozenset("iou_threshold topk index_base outputs".split())),
    "amtnet.feat_pooling": Family(
        run_feat_pooling,
        frozenset(
            "channels map_size seq_len kd window_fusion num_items mode dtype inputs cotangents "
            "outputs".split()
        ),
    ),
}
