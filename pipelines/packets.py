"""Which packets of a file a few frames need: a table per file, and the spans to decode.

A decoder can start at a keyframe and must then be given every packet up to the wanted frame, in
the order of the file ("decode order"; with B-frames it differs from the order of display). Whoever
reads only those spans pays for what is sampled, not for the whole video.
"""

import functools
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import MediaError

SHARD_SUFFIX = ".shard"
_GAP_BYTES = 4096  # a second read costs more than reading this much for nothing


@dataclass(frozen=True, eq=False)
class PacketTable:
    """The packets of one video stream in decode order."""

    offsets: npt.NDArray[np.int64]
    """[P] position of the packet's bytes in the file."""

    sizes: npt.NDArray[np.int32]
    """[P] bytes."""

    ranks: npt.NDArray[np.int32]
    """[P] index of the packet's frame in the order of display, 0-based; -1 = it shows none."""

    keyframes: npt.NDArray[np.int32]
    """[K] packets a decoder can start from, ascending; so are their frames."""

    header: bytes
    """The stream's codec parameters as the container has them (extradata)."""

    @functools.cached_property
    def packet_of_frame(self) -> npt.NDArray[np.int64]:
        """[num_frames] the packet of each frame."""
        shown = np.flatnonzero(self.ranks >= 0)
        packets = np.empty(len(shown), np.int64)
        packets[self.ranks[shown]] = shown
        return packets

    @functools.cached_property
    def closed(self) -> bool:
        """Whether no frame is shown before the keyframe that precedes it in the file."""
        starts = np.repeat(
            self.ranks[self.keyframes], np.diff([*self.keyframes, len(self.ranks)])
        )  # [P] frame of the keyframe before each packet
        leading = self.ranks[self.keyframes[0] :] < starts
        return not bool(np.any(leading & (self.ranks[self.keyframes[0] :] >= 0)))

    def spans(self, frames: Iterable[int]) -> list[npt.NDArray[np.int64]]:
        """The packets that give these frames, one array per start of the decoder.

        Each begins at the last keyframe shown at or before a wanted frame and ends at the packet of
        the last one. Frames of an open GOP that are shown before its keyframe are left out unless
        wanted: they refer to what comes before, and nothing shown later refers to them.
        """
        wanted = np.asarray(sorted(frames), np.int64)
        starts = self.keyframes[
            np.searchsorted(self.ranks[self.keyframes], wanted, side="right") - 1
        ]
        ends = self.packet_of_frame[wanted]
        spans: list[list[int]] = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if spans and start <= spans[-1][1] + 1:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end])
        result = []
        for start, end in spans:
            packets = np.arange(start, end + 1)
            ranks = self.ranks[packets]
            result.append(packets[(ranks < 0) | (ranks >= ranks[0])])
        return result

    def pack(self) -> bytes:
        """The table in about 3 bytes per packet."""
        ends = self.offsets[:-1] + self.sizes[:-1]
        gaps = np.diff(self.offsets, prepend=0)
        gaps[1:] = self.offsets[1:] - ends
        order = self.ranks - np.arange(len(self.ranks), dtype=np.int32)
        counts = np.array([len(self.ranks), len(self.keyframes), len(self.header)], "<i8")
        columns = (gaps.astype("<i8"), self.sizes.astype("<i4"), order.astype("<i4"))
        parts = (counts, *columns, self.keyframes.astype("<i4"))
        return zlib.compress(b"".join(part.tobytes() for part in parts) + self.header, 1)

    @staticmethod
    def unpack(packed: bytes) -> "PacketTable":
        """The table `pack` was called on.

        Raises:
            zlib.error, ValueError: the bytes are damaged.
        """
        content = zlib.decompress(packed)
        num_packets, num_keyframes, header_bytes = np.frombuffer(content, "<i8", 3).tolist()
        place = 24

        def column(dtype: str, count: int) -> npt.NDArray[np.int64]:
            nonlocal place
            values = np.frombuffer(content, dtype, count, place)
            place += values.nbytes
            return values

        gaps, sizes = column("<i8", num_packets), column("<i4", num_packets).astype(np.int32)
        ranks = column("<i4", num_packets).astype(np.int32)
        keyframes = column("<i4", num_keyframes).astype(np.int32)
        before = np.concatenate([[0], sizes[:-1]]).astype(np.int64)
        header = content[place : place + header_bytes]
        ranks += np.arange(num_packets, dtype=np.int32)
        return PacketTable(np.cumsum(gaps + before), sizes, ranks, keyframes, header)


def make_table(
    offsets: list[int], sizes: list[int], ranks: list[int], keyframes: list[int], header: bytes
) -> PacketTable | None:
    """A table of these columns, or None where keyframes do not lead to every frame."""
    order = np.asarray(ranks, np.int32)
    keys = np.array([key for key in keyframes if ranks[key] >= 0], np.int32)
    if not len(keys) or np.any(np.diff(order[keys]) <= 0) or order[keys[0]] != 0:
        return None
    table = PacketTable(np.asarray(offsets), np.asarray(sizes, np.int32), order, keys, header)
    frames = np.arange(len(table.packet_of_frame))
    starts = keys[np.searchsorted(order[keys], frames, side="right") - 1]
    return table if bool(np.all(starts <= table.packet_of_frame)) else None


def media_file(path: Path) -> Path:
    """The file that holds a video: itself, or the shard that is a part of its path."""
    name = os.fspath(path)
    at = name.find(f"{SHARD_SUFFIX}/")
    while at >= 0:
        end = at + len(SHARD_SUFFIX)
        if not os.path.isdir(name[:end]):  # a folder may be called so too
            return Path(name[:end])
        at = name.find(f"{SHARD_SUFFIX}/", end)
    return path


def _read_at(handle: int, size: int, place: int) -> bytes:
    """As many bytes from there; network disks may give them in several parts.

    Raises:
        OSError: the file ends before.
    """
    block = os.pread(handle, size, place)
    while len(block) < size:
        part = os.pread(handle, size - len(block), place + len(block))
        if not part:
            raise OSError(f"it ends {size - len(block)} bytes too early")
        block += part
    return block


def read_packets(
    path: Path, table: PacketTable, packets: npt.NDArray[np.int64], size_bytes: int
) -> list[bytes]:
    """The bytes of packets of a video file or shard, in as few reads as their places allow.

    Raises:
        MediaError: the file cannot be read, or has another size than when it was indexed.
    """
    offsets, sizes = table.offsets[packets], table.sizes[packets].astype(np.int64)
    by_place = np.argsort(offsets, kind="stable")
    starts, ends = offsets[by_place], (offsets + sizes)[by_place]
    breaks = np.flatnonzero(starts[1:] - ends[:-1] > _GAP_BYTES) + 1
    result = [b""] * len(packets)
    try:
        handle = os.open(media_file(path), os.O_RDONLY)
        try:
            got = os.fstat(handle).st_size
            if got != size_bytes:
                raise MediaError(path, _changed(size_bytes, got))
            for group in np.split(np.arange(len(packets)), breaks):
                first, last = int(starts[group[0]]), int(ends[group].max())
                block = _read_at(handle, last - first, first)
                for item in by_place[group].tolist():
                    start = int(offsets[item]) - first
                    result[item] = block[start : start + int(sizes[item])]
        finally:
            os.close(handle)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MediaError(path, f"cannot be read any more: {reason}.") from error
    return result


def _changed(expected: int, got: int) -> str:
    return f"expected {expected} bytes as indexed, got {got}; the file was changed during the run."


def read_whole(path: Path, size_bytes: int) -> npt.NDArray[np.uint8]:
    """All bytes of a file that has not changed since it was indexed.

    Raises:
        MediaError: it cannot be read, or has another size.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MediaError(path, f"cannot be read any more: {reason}.") from error
    if content.size != size_bytes:
        raise MediaError(path, _changed(size_bytes, content.size))
    return content
