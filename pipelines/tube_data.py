"""A detection set on disk: annotated videos, their split, and folders of images for each stream."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.deny_list import read_deny_list
from pipelines.errors import AnnotationError, DataError, MediaError
from pipelines.images import rgb_pixels
from pipelines.microtubes import TubeDataset
from pipelines.moving_objects import CLASSES as MOVING_CLASSES
from pipelines.tubes import (
    JHMDB21_CLASSES,
    UCF24_CLASSES,
    VideoAnnotation,
    read_tubes,
    read_video_list,
)

_LOG = logging.getLogger(__name__)

Stream = Literal["rgb", "brox", "fastOF", "flow"]
"""Images of a set; flow is our own (`accel data flow`), the other two are the published ones."""
DetectionSet = Literal["ucf24", "jhmdb21", "moving_objects"]

_CLASSES: dict[str, Sequence[str]] = {
    "ucf24": UCF24_CLASSES,
    "jhmdb21": JHMDB21_CLASSES,
    "moving_objects": MOVING_CLASSES,
}
_ANNOTATIONS = ("pyannot.pkl", "annotations.json")
_CHUNK = 32  # images that an audit holds at once


@dataclass(frozen=True)
class TubeSet:
    """The videos of a detection set in the order of their names."""

    root: Path
    rules: TubeDataset
    """Which published rules make its micro-tubes."""

    class_names: tuple[str, ...]
    videos: tuple[VideoAnnotation, ...]
    training: tuple[bool, ...]
    """Whether each video is a training video."""

    @property
    def num_classes(self) -> int:
        """Action classes, without background."""
        return len(self.class_names)

    @property
    def num_videos(self) -> dict[str, int]:
        """Of each split."""
        return {"train": sum(self.training), "val": len(self.training) - sum(self.training)}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 (hex) of names, frames, labels and boxes of either split."""
        digests = {"train": hashlib.sha256(), "val": hashlib.sha256()}
        for video, training in zip(self.videos, self.training, strict=True):
            digest = digests["train" if training else "val"]
            digest.update(f"{video.name}\t{video.num_frames}\n".encode())
            for tube in video.tubes:
                digest.update(f"{tube.label}\t{tube.start}\n".encode() + tube.boxes_xywh.tobytes())
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def folder(self, stream: Stream, video: VideoAnnotation) -> Path:
        """Where the images of a video are."""
        return self.root / f"{stream}-images" / video.name

    def read(self, stream: Stream, video: VideoAnnotation, numbers: Sequence[int]) -> np.ndarray:
        """Images [n, H, W, 3] uint8, blue, green, red, by their file numbers (from 1).

        Raises:
            MediaError: one is missing, no image, or of another size than the first.
        """
        images: list[np.ndarray] = []
        for number in numbers:
            path = self.folder(stream, video) / f"{number:05d}.jpg"
            try:
                with Image.open(path) as image:
                    pixels = rgb_pixels(image)
            except (OSError, ValueError, SyntaxError) as error:
                raise MediaError(path, f"cannot be read as an image: {error}.") from error
            if images and pixels.shape != images[0].shape:
                raise MediaError(
                    path,
                    f"is {pixels.shape[1]} x {pixels.shape[0]} pixels, other images of its video "
                    f"are {images[0].shape[1]} x {images[0].shape[0]}.",
                )
            images.append(pixels)
        return np.stack(images)[..., ::-1]

    def encoded(
        self, stream: Stream, video: VideoAnnotation, numbers: Sequence[int]
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        """The bytes of images, and width and height of the first one; see `read`.

        Raises:
            MediaError: one is missing, or the first is no image.
        """
        files = []
        for number in numbers:
            path = self.folder(stream, video) / f"{number:05d}.jpg"
            try:
                files.append(np.fromfile(path, dtype=np.uint8))
            except OSError as error:
                raise MediaError(path, f"cannot be read as an image: {error}.") from error
        return files, _image_size(self.folder(stream, video) / f"{numbers[0]:05d}.jpg")


def open_tube_set(
    root: Path,
    dataset: DetectionSet,
    *,
    split: int = 1,
    streams: Sequence[Stream] = ("rgb",),
    least_frames: int = 1,
    deny_list: str = "",
) -> TubeSet:
    """A set in the published layout, checked before anything is trained on it.

    `splitfiles/pyannot.pkl` (or `annotations.json`), `splitfiles/trainlist<NN>.txt` (every other
    annotated video is a test video), and `<stream>-images/<video>/<NNNNN>.jpg` for each stream.

    Args:
        root: folder of the set.
        dataset: which set it is.
        split: number of the training list.
        streams: whose images are needed.
        least_frames: of a video, what the network sees at once.
        deny_list: file of training videos that are left out, relative to root; "": none.

    Raises:
        AnnotationError: a file that cannot be used, or the first video whose boxes cannot be; see
            `read_tubes`, `read_video_list`.
        MediaError: the first video without images, with fewer than annotated, or of other sizes.
        DataError: no annotation, a split without videos, a denied test video.
    """
    denied = read_deny_list(root / deny_list) if deny_list else {}
    found, problems = _examine(root, dataset, split, streams, least_frames, denied)
    if problems:
        name, first = next(iter(problems.items()))
        more = (
            f" {len(problems)} of {len(problems) + len(found.videos)} videos cannot be used; "
            f"`accel data check --root {root} --tubes {dataset}` names them and writes a deny-list."
        )
        if isinstance(first, AnnotationError):
            raise AnnotationError(first.path, first.problem + more, first.line)
        if isinstance(first, MediaError):
            raise MediaError(first.path, first.problem + more)
        raise DataError(f"{name}: {first}{more}")
    if denied:
        _LOG.warning("%s: %d training videos left out", root / deny_list, len(denied))
    return found


def audit_tube_set(
    root: Path,
    dataset: DetectionSet,
    *,
    split: int = 1,
    streams: Sequence[Stream] = ("rgb",),
    decode: bool = True,
) -> tuple[int, dict[str, str]]:
    """The number of annotated videos, and what is wrong with those that cannot be used, by name.

    Args:
        root, dataset, split, streams: see `open_tube_set`.
        decode: also decode every image.

    Raises:
        AnnotationError, DataError: the set as a whole cannot be used.
    """
    found, problems = _examine(root, dataset, split, streams, 1, {})

    def decoded(video: VideoAnnotation) -> DataError | None:
        try:
            for stream in streams:
                for first in range(1, video.num_frames + 1, _CHUNK):
                    last = min(first + _CHUNK - 1, video.num_frames)
                    found.read(stream, video, range(first, last + 1))
        except MediaError as error:
            return error
        return None

    reasons = {name: str(error) for name, error in problems.items()}
    if decode:
        with ThreadPoolExecutor(thread_name_prefix="accel-audit") as pool:
            for video, error in zip(found.videos, pool.map(decoded, found.videos), strict=True):
                if error is not None:
                    reasons[video.name] = str(error)
    return len(found.videos) + len(problems), reasons


def _examine(
    root: Path,
    dataset: DetectionSet,
    split: int,
    streams: Sequence[Stream],
    least_frames: int,
    denied: Mapping[str, str],
) -> tuple[TubeSet, dict[str, DataError]]:
    """The videos that can be used, and why others cannot."""
    folder = root / "splitfiles"
    path = next((folder / n for n in _ANNOTATIONS if (folder / n).is_file()), None)
    if path is None:
        raise DataError(
            f"{folder}: expected {' or '.join(_ANNOTATIONS)}, found neither; check data.root."
        )
    classes = tuple(_CLASSES[dataset])
    problems: dict[str, DataError] = {}
    annotated = read_tubes(path, num_classes=len(classes), denied=denied, problems=problems)
    list_path = folder / f"trainlist{split:02d}.txt"
    chosen = read_video_list(list_path, {*annotated, *problems, *denied})
    refused = [name for name in denied if name not in chosen]
    if refused:
        raise DataError(
            f"{refused[0]}: is denied ({denied[refused[0]]}) and not in {list_path.name}: test "
            "videos are never left out; repair it."
        )

    def checked(name: str) -> DataError | None:
        try:
            _check_images(root, streams, annotated[name], path, least_frames)
        except DataError as error:
            return error
        return None

    with ThreadPoolExecutor(8, "accel-tubes") as pool:
        errors = dict(zip(annotated, pool.map(checked, annotated), strict=True))
    problems |= {name: error for name, error in errors.items() if error is not None}
    names = [name for name, error in errors.items() if error is None]
    training = tuple(name in chosen for name in names)
    if not problems and all(training):
        raise DataError(f"{folder}: every annotated video is in {list_path.name}.")
    rules: TubeDataset = "plain" if dataset == "moving_objects" else dataset
    videos = tuple(annotated[name] for name in names)
    return TubeSet(root, rules, classes, videos, training), problems


def _check_images(
    root: Path,
    streams: Sequence[Stream],
    video: VideoAnnotation,
    annotations: Path,
    least_frames: int,
) -> None:
    """First and last frame have images, of one size in all streams, and the boxes lie in them."""
    if video.num_frames < least_frames:
        problem = f"expected at least {least_frames} frames, got {video.num_frames}."
        raise AnnotationError(annotations, f'video "{video.name}": {problem}')
    size: tuple[int, int] = (0, 0)
    for stream in streams:
        folder = root / f"{stream}-images" / video.name
        if not folder.is_dir():
            raise MediaError(
                folder,
                "no such folder; every stream needs <stream>-images/<video>/00001.jpg and so on "
                "(detection.stream, detection.extra_stream).",
            )
        for number in (1, video.num_frames):
            if not (folder / f"{number:05d}.jpg").is_file():
                present = sum(1 for _ in folder.glob("*.jpg"))
                raise MediaError(
                    folder,
                    f"{number:05d}.jpg is missing: the annotation has {video.num_frames} frames, "
                    f"the folder {present} images.",
                )
        own = _image_size(folder / "00001.jpg")
        size = size if any(size) else own
        if own != size:
            raise MediaError(
                folder,
                f"00001.jpg is {own[0]} x {own[1]} pixels, that of {streams[0]}-images {size[0]} x "
                f"{size[1]}; the streams of a video need one size.",
            )
    for i, tube in enumerate(video.tubes):
        low, high = tube.boxes_xywh[:, :2], tube.boxes_xywh[:, :2] + tube.boxes_xywh[:, 2:]
        outside = (low >= np.array(size)).any(axis=1) | (high <= 0).any(axis=1)
        if outside.any():
            row = int(outside.argmax())
            raise AnnotationError(
                annotations,
                f'video "{video.name}", tube {i}, frame {tube.start + row}: the box '
                f"{tube.boxes_xywh[row].tolist()} (x, y, w, h) lies outside the image of "
                f"{size[0]} x {size[1]} pixels.",
            )


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            return width, height
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(path, f"cannot be read as an image: {error}.") from error
