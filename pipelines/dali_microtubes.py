"""SSD's augmentation as a DALI graph: JPEG bytes in, augmented images out.

The graph has no state and no random operator: the draws come with the images
(`ssd_augment.draw_view`), one for all images of a micro-tube. Its pixels are those of
`ssd_augment.apply_view` up to rounding in single precision.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.dali_video import as_stored
from pipelines.ssd_augment import MEAN_BGR, SSDView

_TINY = 2.0**-23
_SCALARS = ("brightness", "first", "saturation", "hue", "last")


class DaliViews:
    """Decodes and augments groups of images.

    Args:
        max_images: most images of one call.
        size: pixels of a side of the result.
        threads: CPU threads.
    """

    def __init__(self, *, max_images: int, size: int, threads: int) -> None:
        from nvidia import dali as dali_module

        dali: Any = dali_module  # untyped
        fn = dali.fn
        self._pipeline = dali.Pipeline(
            batch_size=max_images,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=1,
            set_affinity=False,
        )

        def given(name: str) -> Any:
            return fn.external_source(name=name)

        with self._pipeline:
            bgr = {"output_type": dali.types.BGR, **as_stored()}
            image = fn.decoders.image(given("encoded"), **bgr)
            value = {name: given(name) for name in _SCALARS}
            pixels = fn.cast(image, dtype=dali.types.FLOAT) + value["brightness"]
            pixels = _hue_and_saturation(dali, pixels * value["first"], value)
            pixels = [channel * value["last"] for channel in pixels]
            pixels = fn.cat(*pixels, axis=2)
            channels = [given(f"channel{k}") for k in range(3)]
            pixels = fn.cat(*(_channel(dali, pixels, k) for k in channels), axis=2)
            pixels = fn.slice(
                pixels,
                start=given("start"),
                end=given("end"),
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=list(MEAN_BGR),
            )
            pixels = fn.resize(
                pixels, size=[size, size], interp_type=dali.types.INTERP_LINEAR, antialias=False
            )
            self._pipeline.set_outputs(fn.flip(pixels, horizontal=given("mirror")))
        self._pipeline.build()

    def __call__(self, encoded: Sequence[np.ndarray], views: Sequence[SSDView]) -> np.ndarray:
        """Augmented images [n, size, size, 3] float32, blue, green, red, means subtracted.

        Args:
            encoded: bytes of n image files, uint8.
            views: of each of them.

        Raises:
            RuntimeError: bytes that are no image.
        """
        floats = {
            "brightness": [v.brightness for v in views],
            "first": [v.contrast if v.contrast_first else 1.0 for v in views],
            "saturation": [v.saturation for v in views],
            "hue": [v.hue for v in views],
            "last": [1.0 if v.contrast_first else v.contrast for v in views],
        }
        for name, values in floats.items():
            self._pipeline.feed_input(name, [np.float32(value) for value in values])
        for k in range(3):
            column = [np.array([v.channels[k]], dtype=np.int32) for v in views]
            self._pipeline.feed_input(f"channel{k}", column)
        corners = [(v.window[1], v.window[0], v.window[3], v.window[2]) for v in views]
        moved = [
            np.array(corner, dtype=np.int32)
            - np.array((*v.offset[::-1], *v.offset[::-1]), np.int32)
            for corner, v in zip(corners, views, strict=True)
        ]
        self._pipeline.feed_input("start", [corner[:2] for corner in moved])
        self._pipeline.feed_input("end", [corner[2:] for corner in moved])
        self._pipeline.feed_input("mirror", [np.int32(v.mirror) for v in views])
        self._pipeline.feed_input("encoded", list(encoded))
        (images,) = self._pipeline.run()
        result: np.ndarray = np.array(images.as_array()) - np.array(MEAN_BGR, dtype=np.float32)
        return result


def _channel(dali: Any, pixels: Any, index: Any) -> Any:
    return dali.fn.slice(pixels, start=index, shape=[1], axes=[2])


def _hue_and_saturation(dali: Any, pixels: Any, value: dict[str, Any]) -> list[Any]:
    """Blue, green and red after a turn of the hue; see `ssd_augment._hsv` and `_bgr`."""
    math = dali.math

    def mask(condition: Any) -> Any:
        return dali.fn.cast(condition, dtype=dali.types.FLOAT)

    blue, green, red = (dali.fn.slice(pixels, start=[k], shape=[1], axes=[2]) for k in range(3))
    top = math.max(math.max(blue, green), red)
    spread = top - math.min(math.min(blue, green), red)
    saturation = spread / (math.abs(top) + _TINY) * value["saturation"]
    q = 60.0 / (spread + _TINY)
    is_red, is_green = mask(top == red), mask(top == green)
    other = is_green * ((blue - red) * q + 120.0) + (1.0 - is_green) * ((red - green) * q + 240.0)
    hue = is_red * ((green - blue) * q) + (1.0 - is_red) * other
    hue = hue + 360.0 * mask(hue < 0.0) + value["hue"]
    hue = hue - 360.0 * mask(hue > 360.0)
    hue = hue + 360.0 * mask(hue < 0.0)
    sector = hue / 60.0
    sector = sector - 6.0 * math.floor(sector / 6.0)
    k = math.floor(sector)
    f = sector - k
    p = top * (1.0 - saturation)
    down, up = top * (1.0 - saturation * f), top * (1.0 - saturation * (1.0 - f))
    at = [mask(k == float(i)) for i in range(6)]
    return [
        (at[0] + at[1]) * p + at[2] * up + (at[3] + at[4]) * top + at[5] * down,
        at[0] * up + (at[1] + at[2]) * top + at[3] * down + (at[4] + at[5]) * p,
        (at[0] + at[5]) * top + at[1] * down + (at[2] + at[3]) * p + at[4] * up,
    ]
