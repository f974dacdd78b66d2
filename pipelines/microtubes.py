"""Which frames a detector sees: the published lists of micro-tubes, and the images of a frame."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.tubes import VideoAnnotation

TubeDataset = Literal["ucf24", "jhmdb21", "plain"]

# Frames between candidate starts of a training video, by class, so that classes balance.
_UCF24_STEPS = {
    1: (  # ROAD
        *(1.03, 0.75, 4.22, 1.32, 0.8, 2.36, 1.99, 2.66, 2.68, 4.51, 5.56, 2.46),
        *(3.17, 2.76, 3.89, 2.28, 4.01, 3.08, 6.06, 3.28, 1.51, 3.05, 0.6, 3.84),
    ),
    2: (
        *(1.00, 0.80, 4.19, 1.30, 0.85, 2.34, 1.98, 2.64, 2.66, 4.49, 5.53, 2.44),
        *(3.15, 2.74, 3.77, 2.26, 4.00, 3.06, 6.04, 3.25, 1.47, 3.02, 0.70, 3.82),
    ),
    6: (
        *(1.11, 0.85, 5.10, 1.53, 1.0, 2.82, 2.38, 3.21, 3.21, 5.49, 6.78, 2.95),
        *(3.82, 3.34, 4.16, 2.74, 4.90, 3.75, 7.44, 3.92, 1.64, 3.61, 0.76, 4.68),
    ),
}
_TEST_FACTOR = {"ucf24": 4.0, "jhmdb21": 1.5, "plain": 1.0}
TRAIN_GAPS = (0, 1, 3, 7)
"""Gaps of the published setting 20 for training; for testing it is gap 1."""


@dataclass(frozen=True)
class Microtube:
    """T frames of a video and the actions that are visible in all of them."""

    video: int
    """Index into the list of videos."""

    frames: tuple[int, ...]
    """T frames, 0-based, ascending."""

    labels: np.ndarray
    """[M] int64: classes, 0-based; M may be 0 in a test over every frame."""

    boxes: np.ndarray
    """[M, T, 4] float32: left, top, right, bottom, pixels."""


def list_microtubes(
    videos: Sequence[VideoAnnotation],
    *,
    dataset: TubeDataset,
    training: Sequence[bool],
    num_frames: int = 2,
    gaps: Sequence[int] = (0,),
    full_test: bool = False,
) -> tuple[list[Microtube], list[Microtube]]:
    """Training and test items of the published protocol.

    Args:
        videos: in the order of their names.
        dataset: whose rules. "plain": every start counts, boxes are taken as they are.
        training: whether each video is a training video.
        num_frames: T.
        gaps: frames skipped between two frames of an item; one pass over the videos for each.
        full_test: items cover every frame, those of training videos too; items without a complete
            tube stay, without boxes.

    Raises:
        ValueError: a number of frames for which UCF24 has no published steps.
    """
    if dataset == "ucf24" and num_frames not in _UCF24_STEPS:
        raise ValueError(
            f"ucf24: steps are published for {sorted(_UCF24_STEPS)} frames per micro-tube, "
            f"got {num_frames}."
        )
    train: list[Microtube] = []
    test: list[Microtube] = []
    for gap in gaps:
        for index, (video, is_training) in enumerate(zip(videos, training, strict=True)):
            length = _length(video, dataset)
            step = 1.0
            if dataset == "ucf24" and video.tubes:
                step = _UCF24_STEPS[num_frames][video.tubes[0].label]
            if not is_training:
                factor = 3.0 if (dataset, num_frames) == ("ucf24", 1) else _TEST_FACTOR[dataset]
                step = factor * max(1.0, step)
            starts = _starts(length, step, num_frames, gap, full_test)
            into = train if is_training else test
            for start in starts:
                frames = tuple(start + i * (gap + 1) for i in range(num_frames))
                into += _items(video, index, frames, dataset, full_test)
    return train, test


def _length(video: VideoAnnotation, dataset: TubeDataset) -> int:
    # Parity: AMTNet: JHMDB has as many frames as its first tube has boxes.
    if dataset == "jhmdb21" and video.tubes:
        return len(video.tubes[0].boxes_xywh)
    return video.num_frames


def _starts(length: int, step: float, num_frames: int, gap: int, full: bool) -> list[int]:
    span = (num_frames - 1) * gap + num_frames
    if full and num_frames == 1:
        return list(range(length))
    if full:
        whole = (num_frames - 1) * (gap + 1)
        starts = np.arange(0, length - span, whole).tolist()
        last = length - whole - 1
        return starts if last in starts else [*starts, last]
    return [int(start) for start in np.arange(0, length - span, step)]


def _items(
    video: VideoAnnotation, index: int, frames: tuple[int, ...], dataset: TubeDataset, full: bool
) -> list[Microtube]:
    if dataset == "jhmdb21":
        everywhere = list(video.tubes)
        # Parity: AMTNet: one copy per tube, each with all tubes.
        copies = len(video.tubes)
    else:
        present = [sum(t.start <= f < t.end for f in frames) for t in video.tubes]
        everywhere = [t for t, n in zip(video.tubes, present, strict=True) if n == len(frames)]
        copies = int(bool(everywhere) and all(n in (0, len(frames)) for n in present))
        if not copies:
            everywhere, copies = [], int(full)
    boxes = np.zeros((len(everywhere), len(frames), 4), dtype=np.float32)
    for own, tube in zip(boxes, everywhere, strict=True):
        rows = tube.boxes_xywh[[f - tube.start for f in frames]]
        # Parity: AMTNet: width and height of UCF24 lose a pixel too.
        rows = rows - 1 if dataset == "ucf24" else rows
        own[:] = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1)
    labels = np.array([tube.label for tube in everywhere], dtype=np.int64)
    return [Microtube(index, frames, labels, boxes)] * copies


def image_fractions(boxes_px: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Boxes [..., 4] as fractions of the image; negative numbers become 0, large ones stay."""
    fractions: np.ndarray = np.maximum(boxes_px, 0) / np.array(
        (width, height, width, height), dtype=np.float32
    )
    return fractions


def image_numbers(frame: int, num_frames: int, stack: int) -> range:
    """File numbers (from 1) of the `stack` images that stand for a frame.

    Args:
        frame: 0-based.
        num_frames: of the video.
        stack: images per frame: 1 for RGB, 5 for flow.

    Raises:
        ValueError: a video shorter than a stack.
    """
    if num_frames < stack:
        raise ValueError(f"expected at least {stack} images in the video, got {num_frames}.")
    number, half = frame + 1, stack // 2
    if number + half >= num_frames:
        return range(num_frames + 1 - stack, num_frames + 1)
    first = max(number - half, 1)
    return range(first, first + stack)


def distinct_images(frames: Iterable[int], num_frames: int, stack: int) -> list[int]:
    """File numbers of all images of some frames, each once, ascending."""
    return sorted({n for frame in frames for n in image_numbers(frame, num_frames, stack)})


def stacked(
    images: np.ndarray, numbers: Sequence[int], frames: Sequence[int], num_frames: int, stack: int
) -> np.ndarray:
    """The network's input [T, 3*F, H, W] of a micro-tube.

    Args:
        images: [n, H, W, 3], blue, green, red; becomes red, green, blue.
        numbers: file number of each image.
        frames: T frames, 0-based.
        num_frames: of the video.
        stack: F.
    """
    row = {number: i for i, number in enumerate(numbers)}
    rows = [[row[n] for n in image_numbers(frame, num_frames, stack)] for frame in frames]
    chosen = images[np.array(rows)][..., ::-1]  # [T, F, H, W, 3]
    count, _, height, width, _ = chosen.shape
    joined = chosen.transpose(0, 1, 4, 2, 3).reshape(count, 3 * stack, height, width)
    return np.ascontiguousarray(joined)  # of one image the reshape is a view with a turned axis
