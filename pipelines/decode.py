"""Exact frames of a video: through PyAV, decoding only the packets they need, or Pillow."""

import logging
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import MediaError
from pipelines.images import read_images
from pipelines.media import open_decoder, open_video
from pipelines.packets import PacketTable, read_packets
from pipelines.source import Sample

_LOG = logging.getLogger(__name__)

# Decoders that can be told per packet to leave out frames that nothing refers to.
_CAN_SKIP = frozenset(("h264", "hevc"))

RGB = npt.NDArray[np.uint8]


def read_frames(sample: Sample, counts: Counter[str] | None = None) -> RGB:
    """The frames of a sample, uncropped.

    Args:
        sample: what to read.
        counts: "trimmed" or "whole" is raised by one: whether the packet table was enough, or the
            file was decoded from its start. Folders of frames are not counted.

    Returns:
        [F, H, W, 3] uint8 RGB, frame k being `sample.frame_indices[k]`.

    Raises:
        MediaError: the file cannot be read or does not give these frames.
    """
    unique, gather = np.unique(sample.frame_indices, return_inverse=True)
    wanted = [int(index) for index in unique]
    if sample.info.kind.frame_name:
        images = read_images(sample.path, sample.info, wanted)
        return images if np.array_equal(unique, sample.frame_indices) else images[gather]
    frames = None
    if sample.info.packets is not None:
        frames = _read_spans(sample, sample.info.packets, wanted)
        if frames is None:
            _LOG.warning("%s: frames are missing after a keyframe; decoding whole", sample.path)
    if counts is not None:
        counts["whole" if frames is None else "trimmed"] += 1
    if frames is None:
        frames = _read_by_count(sample, wanted)
    shape = (sample.info.height, sample.info.width, 3)
    wrong = next((frame.shape for frame in frames if frame.shape != shape), None)
    if wrong:
        problem = f"expected frames of {shape[1]} x {shape[0]} px, got {wrong[1]} x {wrong[0]}."
        raise MediaError(sample.path, problem)
    stacked = np.stack(frames)
    return stacked if np.array_equal(unique, sample.frame_indices) else stacked[gather]


def _read_spans(sample: Sample, table: PacketTable, wanted: list[int]) -> list[RGB] | None:
    """Decode the packets that lead to the frames; None = some frame did not come so."""
    import av

    spans = table.spans(wanted)
    contents = iter(read_packets(sample.path, table, np.concatenate(spans), sample.info.size_bytes))
    kind = sample.info.kind
    skips = kind.regular and kind.codec in _CAN_SKIP
    found: dict[int, RGB] = {}
    missing = set(wanted)

    def take(frames: Any) -> None:
        for frame in frames:
            if frame.pts in missing:
                missing.remove(frame.pts)
                found[frame.pts] = frame.to_ndarray(format="rgb24")

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
        raise MediaError(sample.path, f"cannot be decoded: {error}.") from error
    return None if missing else [found[index] for index in wanted]


def _read_by_count(sample: Sample, wanted: list[int]) -> list[RGB]:
    """Decode from the start and count."""
    import av

    found: list[RGB] = []
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
