"""Frames one by one: from a video file or a folder of images, and into a video file."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipelines.errors import MediaError
from pipelines.images import rgb_pixels

_OPEN_S, _READ_S = 10.0, 10.0  # a network stream that does not answer has ended
_SUFFIXES = (".jpg", ".jpeg", ".png")


def is_live(source: str) -> bool:
    """Whether a source is a camera, by number or device, or a URL, and no file or folder."""
    return source.isdigit() or source.startswith("/dev/") or "://" in source


def frame_rate(source: str) -> float:
    """Frames per second of a source, see `read_frames`; 25 where it does not say.

    Raises:
        MediaError: it cannot be opened, or has no video.
    """
    if is_live(source) or Path(source).is_dir():
        return 25.0  # a camera is opened once
    with _opened(source) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate or stream.base_rate or 25)


def read_frames(source: str) -> Iterator[np.ndarray]:
    """Frames [H, W, 3] uint8 RGB in order of presentation.

    Args:
        source: video file, folder of JPEG or PNG images, number or device of a camera ("0" is
            /dev/video0), or URL of a stream (rtsp://, http://, ...).

    Raises:
        MediaError: nothing that can be decoded, or damage on the way.
    """
    if not is_live(source) and Path(source).is_dir():
        yield from _read_folder(Path(source))
        return
    count = 0
    with _opened(source) as container:
        import av

        try:
            for frame in container.decode(video=0):
                count += 1
                yield frame.to_ndarray(format="rgb24", threads=1)
        except av.FFmpegError as error:
            raise MediaError(source, f"is damaged after frame {count}: {error}.") from error
    if not count:
        raise MediaError(source, "has no frames.")


def _read_folder(path: Path) -> Iterator[np.ndarray]:
    names = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not names:
        raise MediaError(path, "has no JPEG or PNG images.")
    size = None
    for name in names:
        try:
            with Image.open(name) as image:
                pixels = rgb_pixels(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise MediaError(name, f"cannot be read as an image: {error}.") from error
        size = size or pixels.shape
        if pixels.shape != size:
            raise MediaError(
                name,
                f"is {pixels.shape[1]} x {pixels.shape[0]} pixels, the images before it are "
                f"{size[1]} x {size[0]}.",
            )
        yield pixels


def _opened(source: str) -> Any:
    import av

    device = f"/dev/video{source}" if source.isdigit() else source
    if not is_live(source) and not Path(source).is_file():
        raise MediaError(source, "no such video file or folder of images.")
    try:
        if device.startswith("/dev/"):
            container = av.open(device, format="v4l2")
        else:
            container = av.open(device, timeout=(_OPEN_S, _READ_S) if "://" in device else None)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(device, f"cannot be opened as a video: {error}.") from error
    if not container.streams.video:
        container.close()
        raise MediaError(source, "has no video stream.")
    return container


def draw_boxes(
    frame: np.ndarray,
    boxes: Sequence[tuple[tuple[float, float, float, float], str, tuple[int, int, int]]],
) -> np.ndarray:
    """A copy of the frame [H, W, 3] with (left, top, right, bottom) boxes, texts and colors.

    Boxes without area, as those outside the image are, are left out.
    """
    image = Image.fromarray(frame)
    canvas = ImageDraw.Draw(image)
    for (left, top, right, bottom), text, color in boxes:
        if right > left and bottom > top:
            canvas.rectangle((left, top, right, bottom), outline=color, width=2)
            canvas.text((left + 3, max(top - 11, 0)), text, fill=color)
    return np.asarray(image)


class VideoWriter:
    """Writes frames as VP9 in WebM.

    Args:
        path: the file, replaced if it exists.
        fps: frames per second.

    Raises:
        MediaError: the file cannot be written.
    """

    def __init__(self, path: Path, fps: float) -> None:
        import av

        options = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
        self._rate = Fraction(fps).limit_denominator(1001)
        self._count = 0
        try:
            self._container: Any = av.open(str(path), "w", format="webm")
        except (av.FFmpegError, OSError) as error:
            raise MediaError(path, f"cannot be written: {error}.") from error
        self._stream: Any = self._container.add_stream(
            "libvpx-vp9", rate=self._rate, options=options
        )

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._count:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def write(self, frame: np.ndarray) -> None:
        """Append [H, W, 3] uint8 RGB; a side of odd length loses its last row or column."""
        import av

        height, width = (side - side % 2 for side in frame.shape[:2])
        if not self._count:
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = "yuv420p"
        pixels = np.ascontiguousarray(frame[:height, :width])
        video_frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        video_frame.pts, video_frame.time_base = self._count, 1 / self._rate
        self._count += 1
        self._container.mux(self._stream.encode(video_frame))
