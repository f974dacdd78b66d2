"""SSD's training augmentation, one draw for all images of a micro-tube and for its boxes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

MEAN_BGR = (104.0, 117.0, 123.0)

_CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_LEAST_OVERLAPS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, -np.inf)  # None: no crop
_TRIALS = 50


class Draws(Protocol):
    """Where random numbers come from."""

    def integer(self, below: int) -> int:
        """0 to below - 1."""

    def uniform(self, low: float, high: float) -> float:
        """Between low and high (which may be the smaller one)."""


class SeededDraws:
    """Draws of a generator that is seeded with (seed, purpose, epoch, sample)."""

    def __init__(self, *key: int) -> None:
        self._rng = np.random.default_rng(np.random.SeedSequence(key))

    def integer(self, below: int) -> int:
        """0 to below - 1."""
        return int(self._rng.integers(below))

    def uniform(self, low: float, high: float) -> float:
        """low + (high - low) * u."""
        return low + (high - low) * float(self._rng.random())


@dataclass(frozen=True)
class SSDView:
    """The draws of one augmentation: the same for all images of a micro-tube."""

    brightness: float
    """Added to all values."""
    contrast: float
    """Factor on all values."""
    contrast_first: bool
    """Contrast before hue and saturation."""
    saturation: float
    """Factor."""
    hue: float
    """Degrees."""
    channels: tuple[int, int, int]
    """Which old channel each new one is."""
    offset: tuple[int, int]
    """Column and row of the images on their canvas of the mean color."""
    window: tuple[int, int, int, int]
    """Left, top, right, bottom of what is seen of the canvas."""
    mirror: bool


def augment(
    images: np.ndarray, boxes: np.ndarray, labels: np.ndarray, draws: Draws, *, size: int = 300
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One random view of a micro-tube: colors, expansion, crop, mirror, size.

    Args:
        images: [n, H, W, 3] uint8, blue, green, red: every image of every frame and stream.
        boxes: [M, T, 4] ltrb, fractions of the image.
        labels: [M]
        draws: random numbers, in the published order.
        size: pixels of the result.

    Returns:
        images: [n, size, size, 3] float32, means subtracted.
        boxes: [M', T, 4], fractions of the new image; a crop may drop micro-tubes, never all.
        labels: [M']
    """
    height, width = images.shape[1:3]
    view, boxes, labels = draw_view(height, width, boxes, labels, draws)
    return apply_view(images, view, size=size), boxes, labels


def draw_view(
    height: int, width: int, boxes: np.ndarray, labels: np.ndarray, draws: Draws
) -> tuple[SSDView, np.ndarray, np.ndarray]:
    """The draws of `augment` for images of a size, and what becomes of boxes and labels."""
    boxes = boxes * np.array((width, height, width, height), dtype=np.float64)
    brightness = draws.uniform(-32, 32) if draws.integer(2) else 0.0
    contrast_first = bool(draws.integer(2))
    contrast = _contrast(draws) if contrast_first else 1.0
    # Parity: AMTNet draws both numbers before the coins that may leave them unused.
    saturation = draws.uniform(0.5, 1.5)
    saturation = saturation if draws.integer(2) else 1.0
    hue = draws.uniform(-18, 18)
    hue = hue if draws.integer(2) else 0.0
    contrast = contrast if contrast_first else _contrast(draws)
    channels = (0, 1, 2)
    if draws.integer(2):
        channels = _CHANNEL_ORDERS[draws.integer(len(_CHANNEL_ORDERS))]
    left = top = 0
    if not draws.integer(2):  # half of the time on a larger canvas of the mean color
        ratio = draws.uniform(1, 4)
        left = int(draws.uniform(0, width * ratio - width))
        top = int(draws.uniform(0, height * ratio - height))
        height, width = int(height * ratio), int(width * ratio)
        boxes = boxes + np.array((left, top, left, top))
    window, boxes, labels = _crop(height, width, boxes, labels, draws)
    width, height = window[2] - window[0], window[3] - window[1]
    mirror = bool(draws.integer(2))
    if mirror:
        boxes = boxes.copy()
        boxes[..., [0, 2]] = width - boxes[..., [2, 0]]
    boxes = boxes / np.array((width, height, width, height), dtype=np.float64)
    view = SSDView(
        brightness, contrast, contrast_first, saturation, hue, channels, (left, top), window, mirror
    )
    return view, boxes.astype(np.float32), labels


def apply_view(images: np.ndarray, view: SSDView, *, size: int = 300) -> np.ndarray:
    """The pixels of a view, [n, size, size, 3] float32, means subtracted; see `augment`."""
    pixels = images.astype(np.float32) + np.float32(view.brightness)
    if view.contrast_first:
        pixels = pixels * np.float32(view.contrast)
    pixels = _hue_and_saturation(pixels, view)
    if not view.contrast_first:
        pixels = pixels * np.float32(view.contrast)
    pixels = _cut(pixels[..., view.channels], view)
    if view.mirror:
        # Parity: AMTNet: the values of flow images are mirrored in place only, never negated.
        pixels = pixels[:, :, ::-1]
    resized = resize(np.ascontiguousarray(pixels), size)
    subtracted: np.ndarray = resized - np.array(MEAN_BGR, dtype=np.float32)
    return subtracted


def plain_view(images: np.ndarray, *, size: int = 300) -> np.ndarray:
    """The view for tests: [n, H, W, 3] uint8 resized to bytes again, means subtracted, float32."""
    resized = np.rint(resize(images.astype(np.float32), size))
    subtracted: np.ndarray = resized - np.array(MEAN_BGR, dtype=np.float32)
    return subtracted


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """[n, H, W, 3] float32 to [n, size, size, 3]: bilinear, half-pixel centers, no antialiasing."""
    if images.shape[1:3] == (size, size):
        return images
    # In double precision: positions in single precision shift a large canvas by visible amounts.
    x = torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    result: np.ndarray = x.permute(0, 2, 3, 1).float().contiguous().numpy()
    return result


def _contrast(draws: Draws) -> float:
    return draws.uniform(0.5, 1.5) if draws.integer(2) else 1.0


def _hue_and_saturation(pixels: np.ndarray, view: SSDView) -> np.ndarray:
    hue, saturation, value = _hsv(pixels)
    saturation = saturation * np.float32(view.saturation)
    hue = hue + np.float32(view.hue)
    hue = np.where(hue > 360, hue - 360, hue)
    hue = np.where(hue < 0, hue + 360, hue)
    return _bgr(hue, saturation, value)


def _hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation, value of [..., 3] BGR float32, as OpenCV has them."""
    blue, green, red = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = pixels.max(axis=-1)
    spread = value - pixels.min(axis=-1)
    tiny = np.float32(2.0**-23)
    saturation = spread / (np.abs(value) + tiny)
    q = np.float32(60) / (spread + tiny)
    hue = np.where(
        value == red,
        (green - blue) * q,
        np.where(value == green, (blue - red) * q + 120, (red - green) * q + 240),
    )
    return np.where(hue < 0, hue + 360, hue), saturation, value


def _bgr(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    sector = np.mod(hue / np.float32(60), np.float32(6))
    k = np.floor(sector)
    f = sector - k
    p = value * (1 - saturation)
    q = value * (1 - saturation * f)
    t = value * (1 - saturation * (1 - f))
    k = k.astype(np.int64) % 6
    red = np.choose(k, [value, q, p, p, t, value])
    green = np.choose(k, [t, value, value, q, p, p])
    blue = np.choose(k, [p, p, t, value, value, q])
    stacked: np.ndarray = np.stack([blue, green, red], axis=-1).astype(np.float32)
    return stacked


def _cut(pixels: np.ndarray, view: SSDView) -> np.ndarray:
    """The window of the canvas, the mean color around the images."""
    left, top, right, bottom = view.window
    x, y = view.offset
    height, width = pixels.shape[1:3]
    cut = np.empty((len(pixels), bottom - top, right - left, 3), dtype=np.float32)
    cut[:] = MEAN_BGR
    x0, y0 = max(left, x), max(top, y)
    x1, y1 = min(right, x + width), min(bottom, y + height)
    if x1 > x0 and y1 > y0:
        seen = pixels[:, y0 - y : y1 - y, x0 - x : x1 - x]
        cut[:, y0 - top : y1 - top, x0 - left : x1 - left] = seen
    return cut


def _crop(
    height: int, width: int, boxes: np.ndarray, labels: np.ndarray, draws: Draws
) -> tuple[tuple[int, int, int, int], np.ndarray, np.ndarray]:
    """A window that overlaps the micro-tubes enough, or the whole, and what it shows of them."""
    while True:
        least = _LEAST_OVERLAPS[draws.integer(len(_LEAST_OVERLAPS))]
        if least is None:
            return (0, 0, width, height), boxes, labels
        for _ in range(_TRIALS):
            w, h = draws.uniform(0.3 * width, width), draws.uniform(0.3 * height, height)
            if not 0.5 <= h / w <= 2:
                continue
            # Parity: AMTNet: one argument is the lower end, and 1 is the upper one.
            left, top = draws.uniform(width - w, 1.0), draws.uniform(height - h, 1.0)
            window = np.array([int(left), int(top), int(left + w), int(top + h)])
            if len(boxes) and _overlap(boxes, window).mean(axis=1).min() < least:
                continue
            center = (boxes[..., :2] + boxes[..., 2:]) / 2
            inside = (center > window[:2]) & (center < window[2:])  # [M, T, 2]
            kept = inside.all(axis=(1, 2))
            if len(boxes) and not kept.any():
                continue
            cut = boxes[kept].copy()
            cut[..., :2] = np.maximum(cut[..., :2], window[:2])
            cut[..., 2:] = np.minimum(cut[..., 2:], window[2:])
            x0, y0, x1, y1 = window.tolist()
            return (x0, y0, x1, y1), cut - np.tile(window[:2], 2), labels[kept]


def _overlap(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [M, T, 4] with one window: [M, T]."""
    side = np.minimum(boxes[..., 2:], window[2:]) - np.maximum(boxes[..., :2], window[:2])
    shared = np.maximum(side, 0).prod(axis=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
    overlap: np.ndarray = shared / (area + (window[2:] - window[:2]).prod() - shared)
    return overlap
