"""The reference path: exact frames through PyAV, scaled by torch; needs no DALI.

Every codec of FFmpeg, with keyframe seeks. The DALI graph is tested against it.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipelines.errors import MediaError
from pipelines.geometry import View
from pipelines.media import open_video
from pipelines.source import Sample

_LOG = logging.getLogger(__name__)


def read_frames(sample: Sample) -> npt.NDArray[np.uint8]:
    """The frames of a sample, uncropped.

    Returns:
        [F, H, W, 3] uint8 RGB, frame k being `sample.frame_indices[k]`.
    """
    unique, gather = np.unique(sample.frame_indices, return_inverse=True)
    wanted = [int(index) for index in unique]
    frames = _read_by_time(sample, wanted) if sample.info.pts is not None else None
    if frames is None:
        frames = _read_by_count(sample, wanted)
    shape = (sample.info.height, sample.info.width, 3)
    wrong = next((frame.shape for frame in frames if frame.shape != shape), None)
    if wrong:
        problem = f"expected frames of {shape[1]} x {shape[0]} px, got {wrong[1]} x {wrong[0]}."
        raise MediaError(sample.path, problem)
    stacked = np.stack(frames)
    return stacked if np.array_equal(unique, sample.frame_indices) else stacked[gather]


def _read_by_time(sample: Sample, wanted: list[int]) -> list[npt.NDArray[np.uint8]] | None:
    """Seek to the last keyframe up to each frame where that saves decoding; None = not found so."""
    import av

    pts, keyframes = sample.info.pts, np.asarray(sample.info.keyframes)
    assert pts is not None
    found: list[npt.NDArray[np.uint8]] = []
    with open_video(sample.path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # clips are decoded in parallel, not frames
        try:
            frames = container.decode(stream)
            position = 0  # index of the next frame to come
            for index in wanted:
                before = keyframes[keyframes <= index]
                if len(before) and before[-1] > position:
                    position = int(before[-1])
                    container.seek(pts[position], stream=stream)
                    frames = container.decode(stream)
                for frame in frames:
                    if frame.pts is not None and frame.pts >= pts[index]:
                        break
                else:
                    return None
                if frame.pts != pts[index]:
                    return None
                found.append(frame.to_ndarray(format="rgb24"))
                position = index + 1
        except av.FFmpegError as error:
            raise MediaError(sample.path, f"cannot be decoded: {error}.") from error
    return found


def _read_by_count(sample: Sample, wanted: list[int]) -> list[npt.NDArray[np.uint8]]:
    """Decode from the start and count."""
    import av

    if sample.info.pts is not None:
        _LOG.warning("%s: seeking misses frames; decoding from the start", sample.path)
    found: list[npt.NDArray[np.uint8]] = []
    with open_video(sample.path) as container:
        container.streams.video[0].thread_type = "NONE"
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if index == wanted[len(found)]:
                    found.append(frame.to_ndarray(format="rgb24"))
                    if len(found) == len(wanted):
                        return found
        except av.FFmpegError as error:
            raise MediaError(sample.path, f"cannot be decoded: {error}.") from error
    raise MediaError(
        sample.path,
        f"expected {sample.info.num_frames} frames as indexed, but frame {wanted[len(found)]} "
        "(0-based) does not come; the file is damaged or was replaced.",
    )


def apply_views(
    frames: npt.NDArray[np.uint8], views: Sequence[View], *, size: int, antialias: bool
) -> list[npt.NDArray[np.uint8]]:
    """Scale the frames once, then cut, scale and mirror as each view says.

    Args:
        frames: [T, H, W, 3] uint8.
        views: with the same `resized`.

    Returns:
        Per view [T, size, size, 3] uint8; scaled bilinearly with half-pixel centers.
    """
    frames = _scaled(frames, views[0].resized, antialias)
    cut = []
    for view in views:
        x0, y0, width, height = view.window
        # Copies are left to numpy: torch would start its own threads under each decoding thread.
        window = np.ascontiguousarray(frames[:, y0 : y0 + height, x0 : x0 + width])
        window = _scaled(window, (size, size), antialias)
        cut.append(window[:, :, ::-1] if view.flip else window)
    return cut


def _scaled(
    frames: npt.NDArray[np.uint8], size: tuple[int, int], antialias: bool
) -> npt.NDArray[np.uint8]:
    """[T, height, width, 3] of [T, H, W, 3], `size` being (width, height)."""
    if frames.shape[2:0:-1] == size:
        return frames
    scaled = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2),  # [T, 3, H, W], channels_last
        size=size[::-1],
        mode="bilinear",
        antialias=antialias,
        align_corners=False,
    )  # [T, 3, H', W']
    result: npt.NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).numpy()  # [T, H', W', 3]
    return result


class PyavVideo:
    """Reads and transforms a group of samples on a pool of threads."""

    def __init__(self, *, threads: int, size: int, antialias: bool) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="accel-decode")
        self._size = size
        self._antialias = antialias

    def run(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The clips of the samples.

        Returns:
            [N, views, F, size, size, 3] uint8 RGB on the CPU, F = frame indices of a sample.

        Raises:
            MediaError: a file cannot be decoded as indexed.
        """
        views, num_frames = len(samples[0].views), len(samples[0].frame_indices)
        clips = np.empty((len(samples), views, num_frames, self._size, self._size, 3), np.uint8)

        def fill(index: int) -> None:
            sample = samples[index]
            unique, gather = np.unique(sample.frame_indices, return_inverse=True)
            frames = read_frames(replace(sample, frame_indices=unique))
            cut = apply_views(frames, sample.views, size=self._size, antialias=self._antialias)
            for view, pixels in enumerate(cut):
                clips[index, view] = pixels[gather]

        list(self._pool.map(fill, range(len(samples))))
        return torch.from_numpy(clips)

    def close(self) -> None:
        """End the threads; unfinished reads are abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)
