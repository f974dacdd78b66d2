"""The part of a video that holds the wanted frames, as a file for a decoder that never seeks."""

import numpy as np
import numpy.typing as npt

from pipelines.matroska import MOST_FRAMES, write_matroska
from pipelines.packets import read_packets, read_whole
from pipelines.source import Sample


def trimmed_stream(
    sample: Sample, frames: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """A file that holds the wanted frames, and their indices in it.

    The same packets in the same order as in the video, from the keyframe before each wanted frame
    up to it; the whole file where its kind cannot be cut, or where that would be too many packets.

    Args:
        sample: says which file.
        frames: [F] distinct, ascending.

    Returns:
        the bytes of the file, [bytes] uint8, and [F] int32.

    Raises:
        MediaError: the file cannot be read, or has another size than when it was indexed.
    """
    info, table = sample.info, sample.info.packets
    if table is None or not info.kind.trimmable:
        return read_whole(sample.path, info.size_bytes), frames.astype(np.int32)
    packets = np.concatenate(table.spans(frames.tolist()))
    if len(packets) > MOST_FRAMES:
        return read_whole(sample.path, info.size_bytes), frames.astype(np.int32)
    ranks = table.ranks[packets]
    kept = np.sort(ranks)
    encoded = write_matroska(
        read_packets(sample.path, table, packets, info.size_bytes),
        np.searchsorted(kept, ranks).tolist(),
        np.isin(packets, table.keyframes).tolist(),
        codec=info.kind.codec,
        header=table.header,
        width=info.width,
        height=info.height,
    )
    return np.frombuffer(encoded, np.uint8), np.searchsorted(kept, frames).astype(np.int32)
