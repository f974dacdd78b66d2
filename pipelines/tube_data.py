"""A detection set on disk: annotated videos, their split, and folders of images for each stream."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.errors import DataError, MediaError
from pipelines.microtubes import TubeDataset
from pipelines.moving_objects import CLASSES as MOVING_CLASSES
from pipelines.tubes import (
    JHMDB21_CLASSES,
    UCF24_CLASSES,
    VideoAnnotation,
    read_tubes,
    read_video_list,
)

Stream = Literal["rgb", "brox", "fastOF"]
DetectionSet = Literal["ucf24", "jhmdb21", "moving_objects"]

_CLASSES: dict[str, Sequence[str]] = {
    "ucf24": UCF24_CLASSES,
    "jhmdb21": JHMDB21_CLASSES,
    "moving_objects": MOVING_CLASSES,
}
_ANNOTATIONS = ("pyannot.pkl", "annotations.json")


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
                    pixels = np.asarray(image.convert("RGB"))
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


def open_tube_set(
    root: Path, dataset: DetectionSet, *, split: int = 1, streams: Sequence[Stream] = ("rgb",)
) -> TubeSet:
    """A set in the published layout, checked before anything is trained on it.

    `splitfiles/pyannot.pkl` (or `annotations.json`), `splitfiles/trainlist<NN>.txt` (every other
    annotated video is a test video), and `<stream>-images/<video>/<NNNNN>.jpg` for each stream.

    Raises:
        AnnotationError: see `read_tubes`, `read_video_list`.
        MediaError: a video without images, or with fewer than annotated.
        DataError: no annotation, or a split without videos.
    """
    folder = root / "splitfiles"
    path = next((folder / n for n in _ANNOTATIONS if (folder / n).is_file()), None)
    if path is None:
        raise DataError(
            f"{folder}: expected {' or '.join(_ANNOTATIONS)}, found neither; check data.root."
        )
    classes = tuple(_CLASSES[dataset])
    annotated = read_tubes(path, num_classes=len(classes))
    chosen = read_video_list(folder / f"trainlist{split:02d}.txt", annotated)
    names = sorted(annotated)
    rules: TubeDataset = "plain" if dataset == "moving_objects" else dataset
    found = TubeSet(
        root,
        rules,
        classes,
        tuple(annotated[name] for name in names),
        tuple(name in chosen for name in names),
    )
    if all(found.training):
        raise DataError(f"{folder}: every annotated video is in trainlist{split:02d}.txt.")
    for stream in streams:
        for video in found.videos:
            _check_images(found.folder(stream, video), video)
    return found


def _check_images(folder: Path, video: VideoAnnotation) -> None:
    """The first and the last annotated frame have an image."""
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
                f"{number:05d}.jpg is missing: the annotation has {video.num_frames} frames, the "
                f"folder {present} images.",
            )
