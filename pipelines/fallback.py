"""The reference path: frames of `pipelines.decode`, scaled by torch; needs no DALI.

The DALI graph is tested against it.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipelines.decode import DecodeCounts, read_frames
from pipelines.geometry import View
from pipelines.pool import ReadPool
from pipelines.source import Sample


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

    def __init__(
        self, *, threads: int, size: int, antialias: bool, counts: DecodeCounts | None = None
    ) -> None:
        self._pool = ReadPool(threads)
        self._size = size
        self._antialias = antialias
        self._counts = counts

    def submit(self, samples: Sequence[Sample]) -> list[Future[npt.NDArray[np.uint8]]]:
        """Begin to read samples on the threads; `finish` takes the result."""
        return [self._pool.submit(self._clip, sample) for sample in samples]

    def finish(self, submitted: Sequence[Future[npt.NDArray[np.uint8]]]) -> torch.Tensor:
        """The clips of the samples of one `submit`.

        Returns:
            [N, views, F, size, size, 3] uint8 RGB on the CPU, F = frame indices of a sample.

        Raises:
            MediaError: a file cannot be decoded as indexed.
        """
        return torch.from_numpy(np.stack([future.result() for future in submitted]))

    def _clip(self, sample: Sample) -> npt.NDArray[np.uint8]:
        unique, gather = np.unique(sample.frame_indices, return_inverse=True)
        frames = read_frames(replace(sample, frame_indices=unique), counts=self._counts)
        cut = apply_views(frames, sample.views, size=self._size, antialias=self._antialias)
        return np.stack([pixels[gather] for pixels in cut])  # [views, F, size, size, 3]

    def close(self) -> None:
        """End the threads; unfinished reads are abandoned."""
        self._pool.close()
