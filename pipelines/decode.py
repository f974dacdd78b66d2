"""Exact frames of a video: through PyAV, decoding only the packets they need, or Pillow."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import MediaError, why
from pipelines.images import read_images
from pipelines.media import MediaInfo, open_decoder, open_video
from pipelines.packets import PacketTable, media_file, read_packets
from pipelines.source import Sample

_LOG = logging.getLogger(__name__)

# Decoders that can be told per packet to leave out frames that nothing refers to.
_CAN_SKIP = frozenset(("h264", "hevc"))


class DecodeCounts(Counter[str]):
    """Clips by how they were read; threads may count at once."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        """Raise one count by one."""
        with self._lock:
            self[name] += 1


RGB = npt.NDArray[np.uint8]


Window = tuple[int, int, int, int]


def read_frames(
    sample: Sample, counts: DecodeCounts | None = None, *, window: Window | None = None
) -> RGB:
    """The frames of a sample.

    Args:
        sample: what to read.
        counts: "trimmed", "whole" or "unexpected" is raised by one: the packet table was enough,
            there is none and the file was decoded from its start, or so it was because frames
            did not come. Folders of frames are not counted.
        window: (x0, y0, width, height) cut from every frame, px; None = whole frames.

    Returns:
        [F, H, W, 3] uint8 RGB, frame k being `sample.frame_indices[k]`.

    Raises:
        MediaError: the file cannot be read or does not give these frames.
    """
    unique, gather = np.unique(sample.frame_indices, return_inverse=True)
    wanted = {int(index): place for place, index in enumerate(unique)}
    x0, y0, width, height = window or (0, 0, sample.info.width, sample.info.height)
    if sample.info.kind.frame_name:
        images = read_images(sample.path, sample.info, list(wanted))
        pixels = np.ascontiguousarray(images[:, y0 : y0 + height, x0 : x0 + width])
    else:
        pixels = np.empty((len(wanted), height, width, 3), np.uint8)
        reformatter = _reformatter()

        def store(frame: Any, index: int) -> None:
            """The window of a frame, with one copy."""
            if (frame.width, frame.height) != (sample.info.width, sample.info.height):
                expected = f"expected frames of {sample.info.width} x {sample.info.height} px"
                problem = f"{expected}, got {frame.width} x {frame.height}."
                raise MediaError(sample.path, problem)
            # One thread: the default is a pool per reformatter, one thread for each core.
            plane = reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            cut = rows[y0 : y0 + height, 3 * x0 : 3 * (x0 + width)]
            pixels[wanted[index]] = cut.reshape(height, width, 3)

        how = "whole"
        if (table := sample.info.packets) is not None:
            how = "trimmed" if _read_spans(sample, table, list(wanted), store) else "unexpected"
        if how == "unexpected":
            _LOG.warning("%s: frames are missing after a keyframe; decoding whole", sample.path)
        if how != "trimmed":
            _read_by_count(sample, list(wanted), store)
        if counts is not None:
            counts.add(how)
    return pixels if np.array_equal(unique, sample.frame_indices) else pixels[gather]


def _reformatter() -> Any:
    """Converts frames to RGB; keeps its tables from one frame to the next."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _read_spans(
    sample: Sample, table: PacketTable, wanted: list[int], store: Callable[[Any, int], None]
) -> bool:
    """Decode the packets that lead to the frames; False = some frame did not come so."""
    import av

    spans = table.spans(wanted)
    contents = iter(read_packets(sample.path, table, np.concatenate(spans), sample.info.size_bytes))
    kind = sample.info.kind
    skips = kind.regular and kind.codec in _CAN_SKIP
    missing = set(wanted)

    def take(frames: Any) -> None:
        for frame in frames:
            if frame.pts in missing:
                missing.remove(frame.pts)
                store(frame, frame.pts)

    try:
        decoder = open_decoder(
            kind.codec, table.header, color_range=kind.color_range, color_space=kind.color_space
        )
        for number, span in enumerate(spans):
            if number:
                decoder.flush_buffers()
            for rank in table.ranks[span].tolist():
                packet = av.Packet(next(contents))
                packet.pts = rank  # comes back as the time of the frame
                if skips:
                    decoder.skip_frame = "DEFAULT" if rank in missing else "NONREF"
                take(decoder.decode(packet))
            take(decoder.decode(None))
    except av.FFmpegError as error:
        raise MediaError(sample.path, f"cannot be decoded: {why(error)}.") from error
    return not missing


def decode_packets(path: Path, info: MediaInfo) -> Iterator[Any]:
    """Every frame of a video in a shard, as PyAV has them; times are indices.

    Raises:
        av.FFmpegError: damage that the decoder notices.
        MediaError: it cannot be read.
    """
    import av

    table, kind = info.packets, info.kind
    assert table is not None
    decoder = open_decoder(
        kind.codec, table.header, color_range=kind.color_range, color_space=kind.color_space
    )
    for first in range(0, len(table.sizes), 64):
        packets = np.arange(first, min(first + 64, len(table.sizes)))
        for number, content in zip(
            packets, read_packets(path, table, packets, info.size_bytes), strict=True
        ):
            packet = av.Packet(content)
            packet.pts = int(table.ranks[number])
            yield from decoder.decode(packet)
    yield from decoder.decode(None)


def _read_by_count(sample: Sample, wanted: list[int], store: Callable[[Any, int], None]) -> None:
    """Decode from the start and count."""
    import av

    if media_file(sample.path) != sample.path:
        problem = "its packets in the shard do not give the frames they should; run accel data "
        raise MediaError(sample.path, f"{problem}check, then accel data prepare again.")

    missing = iter([*wanted, -1])
    next_one = next(missing)
    with open_video(sample.path) as container:
        container.streams.video[0].thread_type = "NONE"
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if index == next_one:
                    store(frame, index)
                    next_one = next(missing)
                    if next_one < 0:
                        return
        except av.FFmpegError as error:
            raise MediaError(sample.path, f"cannot be decoded: {why(error)}.") from error
    raise MediaError(
        sample.path,
        f"expected {sample.info.num_frames} frames as indexed, but frame {next_one} "
        "(0-based) does not come; the file is damaged or was replaced.",
    )
