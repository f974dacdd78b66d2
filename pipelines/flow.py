"""Optical flow for detection sets without the published archives; not the published flow.

The published flow images (Brox, fastOF) exist as archives only, and how their bytes were made is
not released. Here flow comes from OpenCV (DIS, on the CPU) or the GPU's optical-flow engine through
DALI, and goes to its own stream, `flow-images/`, so that it is never taken for the published one.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.cache import replace_bytes
from pipelines.errors import DataError
from pipelines.tube_data import TubeSet
from pipelines.tubes import VideoAnnotation

FlowMethod = Literal["opencv", "dali"]
FlowFunction = Callable[[np.ndarray], np.ndarray]
"""Frames [F, H, W, 3] uint8 RGB, F >= 2, -> [F - 1, H, W, 2] float32: pixels to the right and down
from each frame to the next."""

_CHUNK = 33  # frames that are held at once
DESCRIPTION = "flow.json"
BOUND_PX = 20.0
"""Longest motion that a byte tells, unless asked otherwise."""


def flow_function(method: FlowMethod) -> FlowFunction:
    """How flow is computed.

    Raises:
        DataError: a package or a GPU that it needs is missing.
    """
    if method == "dali":
        from pipelines.dali_flow import dali_flow

        return dali_flow
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            "flow with OpenCV: the package is missing; pip install opencv-python-headless."
        ) from error

    def dis(frames: np.ndarray) -> np.ndarray:
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        flows = [engine.calc(first, second, None) for first, second in pairwise(gray)]
        return np.stack(flows)

    return dis


def flow_images(flow: np.ndarray, bound_px: float) -> np.ndarray:
    """Images [F, H, W, 3] uint8 of flow [F, H, W, 2]: red right, green down, blue the length.

    128 is no motion and `bound_px` is 127 steps of a byte; longer ones are cut. Lengths begin at 0
    and end at 255.
    """
    direction = 128 + np.clip(flow / bound_px, -1, 1) * 127
    length = np.minimum(np.linalg.norm(flow, axis=-1, keepdims=True) / bound_px, 1) * 255
    images: np.ndarray = np.rint(np.concatenate([direction, length], axis=-1)).astype(np.uint8)
    return images


def write_flow(
    data: TubeSet,
    compute: FlowFunction,
    *,
    method: str,
    bound_px: float = BOUND_PX,
    threads: int = 1,
) -> Iterator[tuple[str, bool]]:
    """Write `flow-images/<video>/<NNNNN>.jpg` for every video of a set, from its RGB images.

    Image k is the motion from frame k to the next one; the last one repeats the one before, so that
    all streams have as many images. A folder appears complete or not at all, and one that is there
    stays: an interrupted command can be repeated.

    Args:
        data: with RGB images.
        compute: see `FlowFunction`.
        method: its name, for `flow-images/flow.json`.
        bound_px: longest motion that a byte can tell, pixels.
        threads: videos at a time, >= 1.

    Yields:
        Name of each video, and whether it was written now.

    Raises:
        DataError: an image that cannot be used, a folder that cannot be written, or flow of other
            settings in the folder already.
    """
    root = data.root / "flow-images"
    description = {"method": method, "bound_px": bound_px, "published": False}
    path = root / DESCRIPTION
    try:
        root.mkdir(exist_ok=True)
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != description:
            raise DataError(
                f"{path}: the folder holds flow of other settings than {description}; remove it, "
                "or ask for the same."
            )
        replace_bytes(path, [(json.dumps(description, indent=1) + "\n").encode()])
    except (OSError, ValueError) as error:
        raise DataError(f"{root}: cannot be written or read: {error}.") from error

    def one(video: VideoAnnotation) -> tuple[str, bool]:
        folder = root / video.name
        if folder.is_dir():
            return video.name, False
        if video.num_frames < 2:
            raise DataError(f'video "{video.name}": flow needs two frames, it has one.')
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for number, image in enumerate(_images(data, video, compute, bound_px), start=1):
                Image.fromarray(image).save(
                    partial / f"{number:05d}.jpg", quality=95, subsampling=0
                )
            partial.rename(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error}.") from error
        return video.name, True

    with ThreadPoolExecutor(threads, "accel-flow") as pool:
        yield from pool.map(one, data.videos)


def _images(
    data: TubeSet, video: VideoAnnotation, compute: FlowFunction, bound_px: float
) -> Iterator[np.ndarray]:
    last = np.zeros(0)
    for numbers in _overlapping(video.num_frames):
        frames = np.ascontiguousarray(data.read("rgb", video, numbers)[..., ::-1])
        for last in flow_images(compute(frames), bound_px):
            yield last
    yield last


def _overlapping(num_frames: int) -> Iterator[Sequence[int]]:
    """File numbers (from 1) in parts that share one frame, each of two frames at least."""
    for first in range(1, num_frames, _CHUNK - 1):
        yield range(first, min(first + _CHUNK, num_frames + 1))
