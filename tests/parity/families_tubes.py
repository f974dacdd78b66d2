"""Detections, frame-AP, tubes and video-mAP of AMTNet and ROAD."""

from typing import Any

import numpy as np
import torch
from comparison import Family, Results
from goldens import Case, CaseError, fill_input, read_case

from accel.detection.average_precision import (
    FrameBoxes,
    frame_ap,
    frame_boxes,
    frame_detection_boxes,
)
from accel.detection.candidates import (
    Candidates,
    FilterRule,
    background_last,
    filter_boxes,
    pixel_boxes,
    suppress,
)
from accel.detection.detect import detect
from accel.detection.fusion import fused_candidates
from accel.detection.labelling import (
    LabelRule,
    Tube,
    is_kept,
    label_sequences,
    mean_of_best,
    trim,
)
from accel.detection.linking import LinkRule, Path, link
from accel.detection.priors import ssd300_priors
from accel.detection.video_ap import TruthTube, tube_iou, video_map

COSTS = {"score": "score", "scrSim": "similarity", "scrMinusSim": "score_and_similarity"}


def _results(**arrays: Any) -> Results:
    return Results(arrays={("output", name): np.asarray(value) for name, value in arrays.items()})


def _named(arrays: dict[str, Any]) -> Results:
    return Results(arrays={("output", name): np.asarray(value) for name, value in arrays.items()})


def _filter_rule(args: dict[str, Any]) -> FilterRule:
    return FilterRule(
        score_threshold=args["score_threshold"],
        candidates=args["pre_nms_topk"],
        iou_threshold=args["nms_iou"],
        keep=args["post_nms_topk"],
    )


def _link_rule(args: dict[str, Any]) -> LinkRule:
    return LinkRule(
        cost=COSTS[args["cost"]],
        iou_threshold=args["link_iou"],
        jump_gap=args["jump_gap"],
        min_found=args["min_count_gap"] + 1,
    )


def _size(args: dict[str, Any]) -> tuple[int, int]:
    width, height, *again = args["boxes_scale"]
    if again != [width, height]:
        raise CaseError(f"boxes_scale must repeat itself, got {args['boxes_scale']}")
    return width, height


def _path_arrays(paths: list[list[Path]], prefix: str) -> dict[str, Any]:
    """The stored form of paths, classes in order."""
    every = [path for own in paths for path in own]
    rows = [
        [
            path.label + 1,
            path.frames[0] + 1,
            path.frames[-1] + 1,
            len(path.frames),
            path.misses,
            path.total,
            len(path.scores),
            len(path.frames),
            path.all_scores.sum(),
        ]
        for path in every
    ]
    return {
        f"{prefix}:paths": np.array(rows, dtype=np.float64).reshape(-1, 9),
        f"{prefix}:scores": np.concatenate([path.scores for path in every]),
        f"{prefix}:boxes": np.concatenate([path.boxes for path in every]).astype(np.float32),
        f"{prefix}:foundAT": np.concatenate([path.frames for path in every]) + 1,
    }


def run_detect(case: Case) -> Results:
    args = case.args
    filled = {
        record["arg"]: torch.from_numpy(
            fill_input(record["fill"], record["shape"]) * record["scale"]
        )
        for record in args["inputs"]
    }
    found = detect(
        filled["conf"],
        filled["loc"][None],
        ssd300_priors().double(),
        score_threshold=args["conf_thresh"],
        iou_threshold=args["nms_thresh"],
        top_k=args["topk"],
        drop_single=args["drop_single"],
    )
    counts = found.counts[0]
    above = (filled["conf"][0].softmax(-1)[:, 1:] > args["conf_thresh"]).sum(0)
    rows = [
        torch.cat(
            [
                args["image_size"] * found.boxes[0, a, :n, args["box_frame"]],
                found.scores[0, a, :n, None],
            ],
            dim=1,
        )
        for a, n in enumerate(counts.tolist())
    ]
    dropped = ((above == 1) & (counts == 0)).sum()
    return _results(
        above_threshold=above, kept=counts, detections=torch.cat(rows), single_drop=dropped
    )


def run_frame_ap(case: Case) -> Results:
    args, stored = case.args, case.arrays()
    found, truth = stored["detections"], stored["gt"]
    truth = truth[truth[:, 5] != args["no_gt_class"]]
    result = frame_ap(
        FrameBoxes(
            found[:, 1].astype(int),
            found[:, 0].astype(int),
            found[:, 2:6].astype(np.float32),
            found[:, 6].astype(np.float32),
        ),
        FrameBoxes(
            truth[:, 0].astype(int),
            truth[:, 5].astype(int),
            truth[:, 1:5].astype(np.float32),
            np.ones(len(truth)),
        ),
        num_classes=args["num_classes"],
        iou_threshold=args["iou_threshold"],
    )
    return _results(
        ap=result.ap,
        mAP=result.ap.astype(np.float32).mean(),
        num_gt=np.maximum(result.num_truth, 1),
        num_det=result.num_found,
    )


def run_tube_data(case: Case) -> Results:
    """Inputs of other cases: they are there, and of the declared shapes."""
    args, stored = case.args, case.arrays()
    results = Results()
    for v, num_frames in enumerate(args["num_frames"]):
        for stream in args["streams"]:
            scores = stored[f"det:{v}:{stream}:scores"]
            shape = (num_frames, scores.shape[1], 1 + args["num_classes"])
            results.expect(f"video {v} {stream}: scores", scores.shape, shape)
        for t in range(args["num_gt_tubes"][v]):
            first, last, label = stored[f"gt:{v}:{t}"]
            results.expect(f"gt:{v}:{t}", len(stored[f"gt:{v}:{t}:boxes"]), last - first + 1)
            results.expect(f"gt:{v}:{t}: class", 1 <= label <= args["num_classes"], True)
    return results


def _detections(case: Case) -> Case:
    data = read_case(case.path.with_name(f"{case.args['detections']}.json"))
    if data is None or data.family != "amtnet.tube_data":
        raise CaseError(f"{case.args['detections']}: is no case of family amtnet.tube_data")
    return data


def _truth(stored: dict[str, np.ndarray], video: int, count: int) -> list[TruthTube]:
    tubes = []
    for t in range(count):
        first, _, label = stored[f"gt:{video}:{t}"]
        tubes.append(TruthTube(int(label) - 1, int(first) - 1, stored[f"gt:{video}:{t}:boxes"]))
    return tubes


def run_tubes(case: Case) -> Results:
    args, data = case.args, _detections(case)
    stored, num_classes = data.arrays(), args["num_classes"]
    arrays: dict[str, Any] = {}
    videos = range(len(data.args["videos"]))
    paths, truth = [], []
    for v in videos:
        streams = [
            (
                pixel_boxes(stored[f"det:{v}:{stream}:loc"], _size(args)),
                background_last(stored[f"det:{v}:{stream}:scores"]),
            )
            for stream in args["streams"]
        ]
        candidates = fused_candidates(
            streams, args["fusion"], _filter_rule(args), num_classes, boost_iou=args["boost_iou"]
        )
        paths.append(link(candidates, _link_rule(args)))
        truth.append(_truth(stored, v, data.args["num_gt_tubes"][v]))
        arrays |= _path_arrays(paths[-1], f"v{v}")
    results, class_ap = [], []
    for alpha in args["alphas"]:
        rule = _label_rule(args, alpha)
        tubes = [
            [trim([p for own in video for p in own], rule, num_classes) for video in paths][v]
            for v in videos
        ]
        arrays[f"alpha{alpha:g}:tubes"] = [
            [
                v,
                tube.label + 1,
                tube.path_start + 1,
                tube.start - tube.path_start + 1,
                tube.start - tube.path_start + len(tube.boxes),
                tube.path_score,
                tube.labelling_score,
            ]
            for v in videos
            for tube in tubes[v]
        ]
        scores = video_map(
            [[tube for tube in video if is_kept(tube, rule)] for video in tubes],
            truth,
            num_classes=num_classes,
            thresholds=args["iou_thresholds"],
        )
        for i, threshold in enumerate(scores.thresholds):
            means = [scores.mean_iou[i], scores.mean_ap[i], scores.accuracy]
            results.append([threshold, alpha, alpha, *means])
        class_ap.append(scores.class_ap)
    return _named(arrays | {"results": results, "class_ap": np.concatenate(class_ap)})


def _label_rule(args: dict[str, Any], alpha: float) -> LabelRule:
    return LabelRule(
        change_cost=alpha,
        offset=args["score_offset"],
        min_frames=args["min_num_frames"] + 2,
        best_scores=args["topk"],
        score_threshold=args["score_floor"],
    )


def run_frame_ap_matlab(case: Case) -> Results:
    args, data = case.args, _detections(case)
    stored = data.arrays()
    truth = []
    for v, frames in enumerate(np.cumsum([0, *data.args["num_frames"][:-1]])):
        for tube in _truth(stored, v, data.args["num_gt_tubes"][v]):
            boxes = tube.boxes_xywh.astype(np.float64)
            number = np.arange(len(boxes)) + tube.start + frames
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            truth.append((number, np.full(len(boxes), tube.label), corners, np.ones(len(boxes))))
    columns = []
    for column in args["columns"]:
        found = []
        for v, first in enumerate(np.cumsum([0, *data.args["num_frames"][:-1]])):
            streams = [
                (
                    frame_detection_boxes(stored[f"det:{v}:{stream}:loc"], _size(args)),
                    background_last(stored[f"det:{v}:{stream}:scores"]),
                )
                for stream in column["streams"]
            ]
            candidates = fused_candidates(
                streams,
                column["fusion"],
                _filter_rule(args),
                args["num_classes"],
                boost_iou=args["boost_iou"],
                frame_detection=True,
            )
            found.append(frame_boxes(candidates, first))
        fields = ("frames", "labels", "boxes", "scores")
        columns.append(
            frame_ap(
                FrameBoxes(*(np.concatenate([getattr(f, name) for f in found]) for name in fields)),
                FrameBoxes(*(np.concatenate(part) for part in zip(*truth, strict=True))),
                num_classes=args["num_classes"],
                iou_threshold=args["iou_threshold"],
                integration="matlab",
            )
        )
    return _results(
        ap=np.stack([c.ap for c in columns], 1),
        num_det=np.stack([c.num_found for c in columns], 1),
        num_gt=np.stack([c.num_truth for c in columns], 1),
    )


def run_linking(case: Case) -> Results:
    args, stored = case.args, case.arrays()
    frames = range(1, args["num_frames"] + 1)
    most = max(len(stored[f"f{n}:boxes"].reshape(-1, 4)) for n in frames)
    num_scores = max(stored[f"f{n}:allScores"].shape[-1] for n in frames)
    boxes = np.zeros((len(frames), 1, most, 4))
    all_scores = np.zeros((len(frames), 1, most, num_scores))
    counts = np.zeros((len(frames), 1), dtype=np.int64)
    for i, n in enumerate(frames):
        count = counts[i, 0] = len(stored[f"f{n}:boxes"].reshape(-1, 4))
        boxes[i, 0, :count] = stored[f"f{n}:boxes"].reshape(-1, 4)
        all_scores[i, 0, :count] = stored[f"f{n}:allScores"].reshape(count, num_scores)
    candidates = Candidates(boxes, all_scores[..., args["class_column"]], all_scores, counts)
    arrays: dict[str, Any] = {}
    runs = {}
    for run in args["runs"]:
        runs[run["prefix"]] = link(candidates, _link_rule(run))
        arrays |= _path_arrays(runs[run["prefix"]], run["prefix"])
    for run in args["trim"]:
        rule = LabelRule(change_cost=run["alpha"], offset=run["score_offset"])
        paths = runs[run["run"]][0]
        if run["label"] != 1:
            raise CaseError("a single class is linked, whose label is 1")
        tubes = trim(paths, rule, run["num_actions"])
        rows = [
            [
                tube.path_start + 1,
                tube.start - tube.path_start + 1,
                tube.start - tube.path_start + len(tube.boxes),
                run["label"],
            ]
            for tube in tubes
        ]
        arrays[run["array"]] = np.array(rows).T
    return _named(arrays)


def run_linking_dense(case: Case) -> Results:
    args, stored = case.args, case.arrays()
    candidates = filter_boxes(
        pixel_boxes(stored["loc"], _size(args)),
        background_last(stored["scores"]),
        _filter_rule(args),
        args["num_classes"],
    )
    return _named(_path_arrays(link(candidates, _link_rule(args)), "linked"))


def run_nms_matlab(case: Case) -> Results:
    stored = case.arrays()
    boxes, scores = stored["boxes"][:, :4], stored["boxes"][:, 4]
    arrays = {}
    for run in case.args["runs"]:
        kept = suppress(boxes, scores, run["iou_threshold"])
        arrays[run["array"]] = kept[kept >= 0] + case.args["index_base"]
    return _named(arrays)


def run_temporal_labelling(case: Case) -> Results:
    arrays = {}
    for matrix in case.args["matrices"]:
        name = matrix["array"]
        scores = case.arrays()[name].T + matrix["score_offset"]
        for alpha in case.args["alphas"]:
            found = label_sequences(scores[None], np.array([len(scores)]), alpha)
            base = case.args["index_base"]
            arrays[f"{name}:alpha{alpha:g}:path"] = found.labels[0] + base
            arrays[f"{name}:alpha{alpha:g}:last"] = found.totals[0]
    return _named(arrays)


def run_st_iou(case: Case) -> Results:
    stored = case.arrays()
    values = []
    for k in range(case.args["num_pairs"]):
        frames = stored[f"{k}:frames"].astype(int).tolist()
        truth = TruthTube(0, frames[0], stored[f"{k}:gt"])
        values.append(tube_iou(truth, frames[2], stored[f"{k}:dt"]))
    return _results(iou=values)


def run_video_map(case: Case) -> Results:
    args, stored = case.args, case.arrays()
    rule = LabelRule(
        min_frames=args["min_num_frames"] + 2,
        best_scores=args["topk"],
        score_threshold=args["score_floor"],
    )
    found: dict[str, list[Tube]] = {name: [] for name in args["videos"]}
    offset = 0
    for row, video in zip(stored["tubes"].astype(int), stored["tube_video"], strict=True):
        start, begin, end, label, length = row.tolist()
        part = slice(offset + begin - 1, offset + end)
        scores = stored["tube_scores"][part]
        tube = Tube(
            label - 1,
            start + begin - 2,
            stored["tube_boxes"][part],
            scores,
            mean_of_best(scores, rule.best_scores),
            start - 1,
            float(stored["tube_scores"][offset : offset + length].mean()),
            0.0,
        )
        if is_kept(tube, rule):
            found[str(video)].append(tube)
        offset += length
    truth = [_truth(stored, v, count) for v, count in enumerate(args["num_gt_tubes"])]
    scores = video_map(
        list(found.values()),
        truth,
        num_classes=args["num_classes"],
        thresholds=args["iou_thresholds"],
    )
    rows = [
        [v + 1, tube.label + 1, tube.score, tube.start + 1, tube.start + len(tube.boxes)]
        for v, tubes in enumerate(found.values())
        for tube in tubes
    ]
    results = [
        [threshold, scores.mean_ap[i], scores.mean_iou[i], scores.accuracy]
        for i, threshold in enumerate(scores.thresholds)
    ]
    return _results(eval_tubes=rows, results=results, class_ap=scores.class_ap)


def _args(names: str) -> frozenset[str]:
    return frozenset(names.split())


_FILTER = "boxes_scale score_threshold pre_nms_topk nms_iou post_nms_topk "
_LINK = "cost link_iou jump_gap min_count_gap "
_TUBES = "min_num_frames topk score_floor iou_thresholds outputs "

FAMILIES = {
    "amtnet.detect": Family(
        run_detect,
        _args(
            "num_classes seq_len box_frame conf_thresh nms_thresh topk variances image_size "
            "drop_single dtype priors_dtype inputs outputs"
        ),
    ),
    "amtnet.frame_ap": Family(
        run_frame_ap, _args("num_classes num_frames iou_threshold no_gt_class outputs")
    ),
    "amtnet.tube_data": Family(
        run_tube_data,
        _args("num_classes streams videos num_frames num_gt_tubes background frame_size outputs"),
    ),
    "amtnet.tubes": Family(
        run_tubes,
        _args(
            "fusion streams detections num_classes boost_iou alphas score_offset frame_size "
            "videos_with_path_boxes " + _FILTER + _LINK + _TUBES
        ),
    ),
    "amtnet.frame_ap_matlab": Family(
        run_frame_ap_matlab,
        _args("num_classes detections iou_threshold boost_iou columns outputs " + _FILTER),
    ),
    "amtnet.linking": Family(
        run_linking, _args("num_frames num_classes class_column background runs trim outputs")
    ),
    "amtnet.linking_dense": Family(
        run_linking_dense, _args("num_classes num_frames num_boxes outputs " + _FILTER + _LINK)
    ),
    "amtnet.nms_matlab": Family(run_nms_matlab, _args("runs index_base outputs")),
    "amtnet.temporal_labelling": Family(
        run_temporal_labelling, _args("alphas matrices index_base outputs")
    ),
    "amtnet.st_iou": Family(run_st_iou, _args("num_pairs outputs")),
    "amtnet.video_map": Family(run_video_map, _args("num_classes videos num_gt_tubes " + _TUBES)),
}
