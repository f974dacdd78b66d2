"""Optical flow of the GPU's own engine (Turing and newer), through DALI."""

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipelines.errors import DataError

# One pipeline, and one engine behind it, for all threads: what is fed and what comes out belong
# together only if no other thread feeds in between.
_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _pipeline(device_id: int) -> Any:
    try:
        from nvidia import dali as dali_module
    except ImportError as error:
        raise DataError("flow with DALI: the package is missing; see accel doctor.") from error
    dali: Any = dali_module  # untyped
    pipeline = dali.Pipeline(
        batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1
    )
    with pipeline:
        frames = dali.fn.external_source(name="frames", layout="FHWC", device="gpu")
        pipeline.set_outputs(dali.fn.optical_flow(frames, device="gpu", output_grid=4))
    pipeline.build()
    return pipeline


def dali_flow(frames: np.ndarray) -> np.ndarray:
    """Flow [F - 1, H, W, 2] float32 in pixels of frames [F, H, W, 3] uint8 RGB.

    The engine gives one vector for 4 x 4 pixels; they are interpolated. Threads may call it.

    Raises:
        DataError: no GPU, or no DALI.
    """
    if not torch.cuda.is_available():
        raise DataError("flow with DALI: no CUDA device; --method opencv computes it on the CPU.")
    with _LOCK:
        pipeline = _pipeline(torch.cuda.current_device())
        pipeline.feed_input("frames", [frames])
        # Copied: the next run writes into the same memory.
        coarse = torch.from_numpy(np.array(pipeline.run()[0].as_cpu().as_array()))[0]
    fine = F.interpolate(
        coarse.permute(0, 3, 1, 2).float(),
        size=frames.shape[1:3],
        mode="bilinear",
        align_corners=False,
    )
    flow: np.ndarray = fine.permute(0, 2, 3, 1).contiguous().numpy()
    return flow
