"""motion8: a generated set of eight classes of pure motion, for the demo and for tests.

Every clip shows a "dead leaves" image (overlapping shaded discs, ellipses and boxes with a power
law of sizes) through a moving virtual camera. Each image appears once in every class, with the same
position, orientation and scale of the camera at mid-clip, and a motion runs symmetrically about
mid-clip: a single frame does not tell the class, and remembering an image does not help. Each
motion's reverse is a class too, with the same frames in the opposite order: without their order a
network cannot tell the two apart.
"""

import functools
import hashlib
import json
import logging
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from pipelines.cache import write_once
from pipelines.pool import start_worker

_LOG = logging.getLogger(__name__)

CLASSES = (
    "pan_down",  # the camera moves down: the picture moves up; the other pans alike
    "pan_left",
    "pan_right",
    "pan_up",
    "rotate_ccw",  # the picture turns counterclockwise on the screen
    "rotate_cw",
    "zoom_in",  # the picture grows
    "zoom_out",
)
"""Class names; the position is the label. Alphabetical, as class folders are ordered."""

_VERSION = 3  # raise when the same parameters give other pixels
_FRAME_PX = 80
_TEXTURE_PX = 320
_MIN_FRAMES, _MAX_FRAMES = 18, 24
_MIN_CLIPS_FOR_PROCESSES = 64
_SPLITS = ("train", "val")


def generate_motion8(
    cache_dir: Path,
    *,
    seed: int = 0,
    num_train: int = 640,
    num_val: int = 160,
    progress: bool = True,
) -> Path:
    """Root folder of the set; written on the first call, found in the cache afterwards.

    The root holds `train/<class>/NNNN.webm` and `val/<class>/NNNN.webm` (VP9, 80 x 80 px, 18 to 24
    frames), the lists `train.txt` and `val.txt` and the names `classes.txt`. Clip k has label k mod
    8 and image k div 8, and depends on (seed, split, k) alone. The folder appears complete or not
    at all; concurrent calls wait for the first.
    """
    if num_train < len(CLASSES) or num_val < len(CLASSES):
        raise ValueError(f"motion8: expected >= 8 clips per split, got {num_train} and {num_val}.")
    parameters = [_VERSION, seed, num_train, num_val, _FRAME_PX, _TEXTURE_PX, CLASSES]
    digest = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:12]
    root = cache_dir / f"motion8-{digest}"
    write_once(
        root,
        lambda folder: _write_set(folder, seed, {"train": num_train, "val": num_val}, progress),
    )
    return root


def _write_set(folder: Path, seed: int, sizes: dict[str, int], progress: bool) -> None:
    jobs = []
    for split, size in sizes.items():
        names = [f"{split}/{CLASSES[k % len(CLASSES)]}/{k:04d}.webm" for k in range(size)]
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        lines = [f"{name} {k % len(CLASSES)}\n" for k, name in enumerate(names)]
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
        jobs += [(seed, split, k, str(folder / name)) for k, name in enumerate(names)]
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")

    _LOG.info("motion8: writing %d clips to %s", len(jobs), folder.parent)
    hidden = not progress or not sys.stderr.isatty()
    bar = functools.partial(tqdm, total=len(jobs), desc="motion8", unit="clip", disable=hidden)
    if len(jobs) < _MIN_CLIPS_FOR_PROCESSES:
        for job in bar(jobs):
            _write_clip(job)
        return
    affinity = getattr(os, "sched_getaffinity", None)
    workers = min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)
    # spawn: a fork of a process with threads (torch, DALI) may deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        try:
            for _ in bar(pool.map(_write_clip, jobs, chunksize=8)):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_clip(job: tuple[int, str, int, str]) -> None:
    seed, split, index, path = job
    image = index // len(CLASSES)
    rng = np.random.default_rng(np.random.SeedSequence((seed, _SPLITS.index(split), image)))
    write_vp9(Path(path), render_clip(CLASSES[index % len(CLASSES)], rng))


def render_clip(class_name: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One clip of a motion class.

    Returns:
        [frames, 80, 80, 3] uint8 RGB, 18 to 24 frames.
    """
    texture = torch.from_numpy(dead_leaves(_TEXTURE_PX, rng)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    num_frames = int(rng.integers(_MIN_FRAMES, _MAX_FRAMES + 1))
    # Texture pixel of frame pixel p (px from the center): center + scale R(angle) (p + shift).
    centers = np.full((num_frames, 2), rng.uniform(-20, 20, size=2))
    angle0, scale0 = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 1.3)
    time = np.linspace(-0.5, 0.5, num_frames)
    pan_px = rng.uniform(0.4, 0.7) * _FRAME_PX
    zoom, turn = rng.uniform(1.5, 2.0), math.radians(rng.uniform(45, 90))
    angles, scales, shifts = np.full(num_frames, angle0), np.full(num_frames, scale0), 0 * centers
    kind, _, direction = class_name.partition("_")
    if kind == "pan":
        x, y = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}[direction]
        shifts = time[:, None] * pan_px * np.array([x, y])
    elif kind == "zoom":
        scales = scale0 * zoom ** (-time if direction == "in" else time)
    else:
        angles = angle0 + turn * (-time if direction == "cw" else time)

    # Two samples per frame pixel and axis, then their mean: every scale is equally sharp.
    cos, sin = np.cos(angles) * scales, np.sin(angles) * scales
    turned = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # [frames, 2, 2]
    offsets = np.einsum("fij,fj->fi", turned, shifts) + centers
    # The affine maps in the units of grid_sample: -1..1 over the frame, -1..1 over the texture.
    maps = np.concatenate([turned * _FRAME_PX, 2 * offsets[..., None]], -1) / _TEXTURE_PX
    grid = F.affine_grid(
        torch.from_numpy(maps.astype(np.float32)),
        [num_frames, 3, 2 * _FRAME_PX, 2 * _FRAME_PX],
        align_corners=False,
    )
    sampled = F.grid_sample(
        texture.expand(num_frames, -1, -1, -1), grid, mode="bilinear", align_corners=False
    )
    frames = F.avg_pool2d(sampled, 2).permute(0, 2, 3, 1)  # [frames, 80, 80, 3]
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def dead_leaves(side_px: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Image of overlapping shaded ellipses and boxes, radii r with density r^-3.

    Returns:
        [side_px, side_px, 3] float32 in 0..1.
    """
    image = np.empty((side_px, side_px, 3), np.float32)
    image[:] = rng.uniform(0.1, 0.9, size=3)
    num_leaves, r_min, r_max = 320, 7.0, 90.0
    # Inverse of the distribution function of r^-3 on [r_min, r_max].
    u = rng.random(num_leaves)
    radii = (r_min**-2 - u * (r_min**-2 - r_max**-2)) ** -0.5
    for a in radii.tolist():  # Python floats keep the arrays in float32
        b = a * float(rng.uniform(0.4, 1.0))
        cx, cy = rng.uniform(0, side_px, size=2).tolist()
        angle, ellipse = float(rng.uniform(0, 2 * math.pi)), bool(rng.random() < 0.6)
        color = rng.uniform(0.05, 0.95, size=3).astype(np.float32)
        slope = float(rng.uniform(-0.35, 0.35)) / a
        cos, sin = math.cos(angle), math.sin(angle)
        if ellipse:
            half_x, half_y = math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos)
        else:
            half_x, half_y = abs(a * cos) + abs(b * sin), abs(a * sin) + abs(b * cos)
        x0, x1 = max(0, int(cx - half_x - 1)), min(side_px, int(cx + half_x + 2))
        y0, y1 = max(0, int(cy - half_y - 1)), min(side_px, int(cy + half_y + 2))
        x = np.arange(x0, x1, dtype=np.float32)[None, :] + (0.5 - cx)
        y = np.arange(y0, y1, dtype=np.float32)[:, None] + (0.5 - cy)
        along, across = cos * x + sin * y, cos * y - sin * x
        if ellipse:
            outside = (np.hypot(along / a, across / b) - 1) * b
        else:
            outside = np.maximum(np.abs(along) - a, np.abs(across) - b)
        mask = np.clip(0.5 - outside, 0, 1)[..., None]  # one pixel of soft edge
        patch = image[y0:y1, x0:x1]
        patch += mask * (color + slope * along[..., None] - patch)
    return np.clip(image, 0, 1)


def write_vp9(path: Path, frames: npt.NDArray[np.uint8], *, fps: int = 12) -> None:
    """Encode [frames, H, W, 3] uint8 RGB as VP9 in WebM (4:2:0)."""
    import av

    options = {"deadline": "realtime", "cpu-used": "8", "crf": "18", "b": "0", "threads": "1"}
    bitexact = {"fflags": "+bitexact"}  # no random identifiers
    with av.open(str(path), "w", format="webm", options=bitexact) as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
