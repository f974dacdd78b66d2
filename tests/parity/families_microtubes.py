"""AMTNet's data: lists of micro-tubes, the images of a frame, SSD's augmentation."""

import numpy as np
from comparison import Family, Results
from goldens import Case, CaseError, fill_input

from pipelines.microtubes import (
    TRAIN_GAPS,
    Microtube,
    distinct_images,
    image_fractions,
    list_microtubes,
    stacked,
)
from pipelines.ssd_augment import MEAN_BGR, augment, resize
from pipelines.tubes import TubeAnnotation, VideoAnnotation

NOTHING = 9999  # stands for the label of an item without boxes


class Replay:
    """The recorded draws, which must be asked for in the recorded order with equal arguments."""

    def __init__(self, draws: list[list]) -> None:
        self._draws = iter(draws)

    def integer(self, below: int) -> int:
        kind, arguments, value = next(self._draws)
        if kind not in ("randint", "choice") or arguments != [below]:
            raise CaseError(f"asked for an integer below {below}, recorded is {kind} {arguments}")
        return int(value)

    def uniform(self, low: float, high: float) -> float:
        kind, arguments, value = next(self._draws)
        expected = [low] if len(arguments) == 1 and high == 1 else [low, high]
        if kind != "uniform" or not np.allclose(arguments, expected, rtol=1e-9, atol=1e-9):
            raise CaseError(f"asked for uniform {expected}, recorded is {kind} {arguments}")
        return float(value)

    def left(self) -> int:
        return len(list(self._draws))


def run_augment(case: Case) -> Results:
    args, stored = case.args, case.arrays()
    if tuple(args["mean_bgr"]) != MEAN_BGR:
        raise CaseError(f"mean_bgr must be {MEAN_BGR}, got {args['mean_bgr']}")
    (record,) = args["inputs"]
    values = record["offset"] + record["scale"] * fill_input(record["fill"], record["shape"])
    images = np.clip(values, *record["clip"]).astype(record["cast"])
    images = images.repeat(record["repeat"], axis=1).repeat(record["repeat"], axis=2)
    draws = case.content
    for key in args["draws_field"].split("."):
        draws = draws[key]
    replay = Replay(draws)
    length = args["seq_len"]
    boxes = stored["boxes_in"].reshape(args["num_microtubes"], length, 4)
    labels = stored["labels_in"].reshape(args["num_microtubes"], length)[:, 0]
    out, found, kept = augment(images, boxes, labels, replay, size=args["out_size"])
    results = Results()
    results.expect("draws left over", replay.left(), 0)
    stride = args["image_stride"]
    for name, value in {
        "images": out[:, ::stride, ::stride],
        "image_sum": out.sum(axis=(1, 2), dtype=np.float64),
        "boxes": found.reshape(-1, 4),
        "labels": kept.repeat(length),
    }.items():
        results.arrays["output", name] = value
    return results


def _videos(case: Case) -> tuple[list[VideoAnnotation], list[bool]]:
    stored = case.arrays()
    videos = []
    for record in sorted(case.args["videos"], key=lambda video: video["name"]):
        tubes = tuple(
            TubeAnnotation(tube["label"], tube["start"], stored[tube["boxes"]].astype(np.float32))
            for tube in record["tubes"]
        )
        videos.append((VideoAnnotation(record["name"], record["num_frames"], tubes), record))
    return [video for video, _ in videos], [record["train"] for _, record in videos]


def _rows(items: list[Microtube]) -> tuple[np.ndarray, np.ndarray]:
    rows, boxes = [], []
    for position, item in enumerate(items):
        rows.append([item.video, *item.frames, max(len(item.labels), 1)])
        if not len(item.labels):
            boxes += [[position, NOTHING, 0, 0, 0, 0]] * len(item.frames)
        for label, own in zip(item.labels, item.boxes, strict=True):
            boxes += [[position, label, *box] for box in own.tolist()]
    return np.array(rows), np.array(boxes, dtype=np.float64)


def run_lists(case: Case) -> Results:
    args = case.args
    videos, training = _videos(case)
    results = Results()
    for setting in args["settings"]:
        gaps: tuple[int, ...] = (setting["seq_gap"],)
        if gaps == (20,):
            gaps = TRAIN_GAPS if setting["image_set"] == "train" else (1,)
        lists = list_microtubes(
            videos,
            dataset=args["dataset"],
            training=training,
            num_frames=args["seq_len"],
            gaps=gaps,
            full_test=setting["full_test"],
        )
        tag = setting["tag"]
        for name, items in zip(("train", "test"), lists, strict=True):
            rows, boxes = _rows(items)
            results.arrays["output", f"{tag}:{name}:items"] = rows
            results.arrays["output", f"{tag}:{name}:boxes"] = boxes
        names = [video.name for video in videos] * len(gaps)
        results.arrays["output", f"{tag}:video_list"] = np.array(names)
    return results


def run_loader(case: Case) -> Results:
    args = case.args
    if args["channel_order"] != "rgb" or any(args["mean_bgr"]):
        raise CaseError("channel_order must be rgb and mean_bgr zero")
    size = {"width": args["image_width"], "height": args["image_height"]}
    boxes = image_fractions(np.array(args["boxes_pixels"], dtype=np.float32), **size)
    row = np.concatenate([boxes, np.full((len(boxes), 1), args["label"])], axis=1)
    streams = [("base", args["base_type"], args["input_frames_base"])]
    if args["fusion"]:
        streams.append(("extra", args["extra_type"], args["input_frames_extra"]))
    results = Results()
    for name, kind, stack in streams:
        vectors = []
        for frames in args["items"]:
            numbers = distinct_images(frames, args["num_frames"], stack)
            offsets = np.array(args["image_bgr_offsets"][kind])
            pixels = (np.array(numbers)[:, None] + offsets) % 256
            images = np.ones((1, 4, 6, 1), np.float32) * pixels[:, None, None].astype(np.float32)
            scaled = resize(images, args["out_size"])
            vectors.append(stacked(scaled, numbers, frames, args["num_frames"], stack)[..., 0, 0])
        results.arrays["output", name] = np.stack(vectors)
    results.arrays["output", "gt"] = np.stack([row] * len(args["items"]))
    return results


def _args(names: str) -> frozenset[str]:
    return frozenset(names.split())


FAMILIES = {
    "amtnet.augment": Family(
        run_augment,
        _args(
            "seed num_images num_microtubes seq_len mean_bgr out_size draws_field num_draws "
            "image_stride inputs outputs"
        ),
    ),
    "amtnet.lists": Family(run_lists, _args("dataset seq_len split settings videos outputs")),
    "amtnet.loader": Family(
        run_loader,
        _args(
            "num_frames seq_len input_frames_base input_frames_extra fusion base_type extra_type "
            "items boxes_pixels label image_height image_width image_bgr_offsets out_size mean_bgr "
            "channel_order outputs"
        ),
    ),
}
