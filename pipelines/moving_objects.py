"""moving_objects: a generated detection set with exact boxes, whose classes only motion tells.

In front of a still "dead leaves" image, one or two leaves like the others move on straight lines.
No frame tells where to; the classes are directions, and a mirrored video keeps its class. Stored as
UCF24 is: JPEG frames in `rgb-images/`, `splitfiles/annotations.json`, `splitfiles/trainlist01.txt`.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.cache import write_once
from pipelines.synthetic import dead_leaves

_LOG = logging.getLogger(__name__)

CLASSES = ("fall", "rise", "slide")
"""Class names; the position is the label. Slide: to the left or to the right."""

_VERSION = 1  # raise when the same parameters give other pixels
FRAME_PX = 96
_NUM_FRAMES = 24
_LEAF_PX = (18, 34)  # sides of a moving leaf
_SPEED_PX = (2.0, 3.0)  # of a frame
_SPLITS = ("train", "test")


def generate_moving_objects(
    cache_dir: Path, *, seed: int = 0, num_train: int = 240, num_test: int = 60
) -> Path:
    """Root folder of the set; written on the first call, found in the cache afterwards.

    Video k of a split has label k mod 3 and depends on (seed, split, k) alone. The folder appears
    complete or not at all; concurrent calls wait for the first.

    Raises:
        DataError: the set cannot be written.
    """
    if min(num_train, num_test) < len(CLASSES):
        raise ValueError(
            f"moving_objects: expected >= {len(CLASSES)} videos per split, got {num_train} and "
            f"{num_test}."
        )
    parameters = [_VERSION, seed, num_train, num_test, FRAME_PX, _NUM_FRAMES, CLASSES]
    digest = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:12]
    root = cache_dir / f"moving_objects-{digest}"
    write_once(
        root, lambda folder: _write_set(folder, seed, {"train": num_train, "test": num_test})
    )
    return root


def _write_set(folder: Path, seed: int, sizes: dict[str, int]) -> None:
    _LOG.info("moving_objects: writing %d videos to %s", sum(sizes.values()), folder.parent)
    annotations: dict[str, Any] = {}
    lists: dict[str, list[str]] = {}
    for number, (split, size) in enumerate(sizes.items()):
        for k in range(size):
            label = k % len(CLASSES)
            rng = np.random.default_rng(np.random.SeedSequence((seed, number, k)))
            frames, boxes = render_video(CLASSES[label], rng)
            name = f"{CLASSES[label]}/{split}_{k:04d}"
            images = folder / "rgb-images" / name
            images.mkdir(parents=True)
            for i, frame in enumerate(frames, start=1):
                Image.fromarray(frame).save(images / f"{i:05d}.jpg", quality=92)
            tubes = [
                {"label": label, "sf": 0, "ef": len(own), "boxes_xywh": own.tolist()}
                for own in boxes
            ]
            annotations[name] = {"numf": len(frames), "label": label, "annotations": tubes}
            lists.setdefault(split, []).append(name)
    splitfiles = folder / "splitfiles"
    splitfiles.mkdir()
    for split, names in lists.items():
        text = "".join(f"{name}\n" for name in names)
        (splitfiles / f"{split}list01.txt").write_text(text, encoding="utf-8")
    (splitfiles / "annotations.json").write_text(json.dumps(annotations), encoding="utf-8")
    text = "".join(f"{name}\n" for name in CLASSES)
    (splitfiles / "classes.txt").write_text(text, encoding="utf-8")


def render_video(
    class_name: str, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """One video.

    Returns:
        frames: [24, 96, 96, 3] uint8 RGB.
        boxes: [objects, 24, 4] float32, x, y, w, h in pixels of the visible part.
    """
    background = dead_leaves(FRAME_PX, rng)
    frames = np.repeat(background[None], _NUM_FRAMES, axis=0)
    boxes = []
    lanes = [0.5] if rng.random() < 0.5 else [0.27, 0.73]  # across the direction of motion
    for lane in lanes:
        half = rng.uniform(*_LEAF_PX, size=2) / 2
        half *= 0.85 if len(lanes) > 1 else 1.0
        along = np.array([1.0, 0.0]) if class_name == "slide" else np.array([0.0, 1.0])
        sign = {"fall": 1.0, "rise": -1.0}.get(class_name, float(rng.choice([-1.0, 1.0])))
        reach = rng.uniform(*_SPEED_PX) * (_NUM_FRAMES - 1) / 2
        middle = FRAME_PX / 2 + rng.uniform(-6, 6)
        time = np.linspace(-reach, reach, _NUM_FRAMES) * sign
        across = lane * FRAME_PX + rng.uniform(-6, 6)
        center = along * (middle + time[:, None]) + (1 - along) * across
        leaf = dead_leaves(48, rng)  # its texture
        ellipse = rng.random() < 0.5
        color = rng.uniform(0.05, 0.95, size=3).astype(np.float32)
        boxes.append(
            [_draw(f, c, half, leaf, color, ellipse) for f, c in zip(frames, center, strict=True)]
        )
    return (frames * 255).round().clip(0, 255).astype(np.uint8), np.array(boxes, dtype=np.float32)


def _draw(
    frame: npt.NDArray[np.float32],
    center: npt.NDArray[np.float64],
    half: npt.NDArray[np.float64],
    leaf: npt.NDArray[np.float32],
    color: npt.NDArray[np.float32],
    ellipse: bool,
) -> list[float]:
    """Put a leaf on a frame, with a soft edge; the box of what is inside the frame."""
    x = np.arange(FRAME_PX, dtype=np.float32)[None, :] + (0.5 - center[0])
    y = np.arange(FRAME_PX, dtype=np.float32)[:, None] + (0.5 - center[1])
    if ellipse:
        outside = (np.hypot(x / half[0], y / half[1]) - 1) * half.min()
    else:
        outside = np.maximum(np.abs(x) - half[0], np.abs(y) - half[1])
    mask = np.clip(0.5 - outside, 0, 1)[..., None]
    side = len(leaf)
    rows = np.clip(np.round(y + side / 2), 0, side - 1).astype(int)
    columns = np.clip(np.round(x + side / 2), 0, side - 1).astype(int)
    texture = 0.6 * leaf[rows, columns] + 0.4 * color
    frame += mask.astype(np.float32) * (texture - frame)
    low = np.maximum(center - half, 0)
    high = np.minimum(center + half, FRAME_PX)
    return [*low.tolist(), *(high - low).tolist()]
