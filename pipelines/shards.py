"""Packed shards: many videos in one file, for disks on which opening a file is what costs.

A shard has, little-endian:

    header   64 bytes: magic, version, place, size and crc32 of the index, crc32 of this header
    records  one per video: the bytes of its file, or of the images of its folder in a row
    index    JSON line (kinds of videos, stamps of the originals), rows, names, packet tables

The video "a/b" of the shard "00000.shard" has the path "00000.shard/a/b", in lists and messages.
Its packet table counts from the start of the shard, so that whoever reads packets of a file reads
those of a record; an image is a packet. Readers use `pread`: with a memory map, a page that a
network disk is slow to give would stop every Python thread (a page fault keeps the interpreter's
lock), and one that it cannot give would kill the process.
"""

import functools
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.annotations import VideoRecord
from pipelines.errors import MediaError
from pipelines.images import probe_frames, read_encoded
from pipelines.media import MediaInfo, StreamKind, probe
from pipelines.packets import PacketTable, media_file, read_whole

_MAGIC = b"accel shard\n"
_VERSION = 1
_HEADER = struct.Struct("<12sIQQI24x")  # then the crc32 of these bytes
HEADER_BYTES = _HEADER.size + 4
_ROW = np.dtype(
    [
        ("place", "<i8"),  # of the record in the shard
        ("num_bytes", "<i8"),
        ("checksum", "<u4"),
        ("num_frames", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("kind", "<i4"),
        ("first_number", "<i4"),
        ("table_at", "<i8"),  # from the start of the tables
        ("table_bytes", "<i4"),
    ]
)
_AGAIN = "copy it again, or run accel data prepare again"


@dataclass(frozen=True)
class Record:
    """One video as it stands in a shard."""

    name: str
    content: bytes
    info: MediaInfo
    """Its packets are counted from the start of the record."""
    stamp: str = ""
    """Of the original, see `pipelines.packing`."""


class Shard:
    """What is in a shard; opens the file when needed, never keeps it open.

    Raises:
        MediaError: it is missing, no shard, of another version, cut off or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self.size_bytes = os.fstat(handle.fileno()).st_size
                header = handle.read(HEADER_BYTES)
                index_at, index_bytes, checksum = self._checked(header)
                handle.seek(index_at)
                index = handle.read(index_bytes)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MediaError(path, f"the shard cannot be read: {reason}; {_AGAIN}.") from error
        if zlib.crc32(index) != checksum:
            raise MediaError(path, f"the index of the shard has a wrong checksum; {_AGAIN}.")
        facts, _, rest = index.partition(b"\n")
        content = json.loads(facts)
        rows = np.frombuffer(rest, _ROW, content["rows"])
        names_end = rows.nbytes + content["names_bytes"]
        names = rest[rows.nbytes : names_end].decode("utf-8", "surrogateescape").split("\0")
        self._kinds = [StreamKind(*fields) for fields in content["kinds"]]
        self._rows: dict[str, Any] = dict(zip(names, rows, strict=True)) if len(rows) else {}
        stamps = content.get("stamps", [""] * len(names))  # older shards: none
        self._stamps: dict[str, str] = dict(zip(names, stamps, strict=True)) if len(rows) else {}
        self._tables = rest[names_end:]

    def _checked(self, header: bytes) -> tuple[int, int, int]:
        """(place, size, checksum) of the index."""
        if not header.startswith(_MAGIC):
            got = "0 bytes" if not header else "other content"
            raise MediaError(self.path, f"expected a shard of accel data prepare, got {got}.")
        if len(header) < HEADER_BYTES or zlib.crc32(header[:-4]) != _number(header[-4:]):
            raise MediaError(self.path, f"the header of the shard is damaged; {_AGAIN}.")
        _, version, index_at, index_bytes, checksum = _HEADER.unpack(header[:-4])
        if version != _VERSION:
            problem = f"expected a shard of version {_VERSION}, got {version}"
            raise MediaError(self.path, f"{problem}; run accel data prepare again.")
        if self.size_bytes != index_at + index_bytes:
            expected = f"expected {index_at + index_bytes} bytes, got {self.size_bytes}"
            raise MediaError(self.path, f"{expected}: the shard is cut off or changed; {_AGAIN}.")
        return index_at, index_bytes, checksum

    @property
    def names(self) -> list[str]:
        """The videos, in the order of the file."""
        return list(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def stamp(self, name: str) -> str:
        """What was known of a video's original when it was packed; "" = nothing."""
        return self._stamps[name]

    def info(self, name: str) -> MediaInfo:
        """What is in one video; its packets are those of the shard file.

        Raises:
            MediaError: it is not in this shard.
        """
        row = self._row(name)
        start, end = int(row["table_at"]), int(row["table_at"] + row["table_bytes"])
        table = PacketTable.unpack(self._tables[start:end])
        table = replace(table, offsets=table.offsets + row["place"])
        kind, first = self._kinds[row["kind"]], int(row["first_number"])
        size = (int(row["width"]), int(row["height"]))
        return MediaInfo(kind, *size, int(row["num_frames"]), self.size_bytes, table, first)

    def record(self, name: str) -> Record:
        """One video with all its bytes.

        Raises:
            MediaError: it is not in this shard, cannot be read, or has a wrong checksum.
        """
        row, info = self._row(name), self.info(name)
        assert info.packets is not None
        try:
            with self.path.open("rb") as handle:
                handle.seek(int(row["place"]))
                content = handle.read(int(row["num_bytes"]))
        except OSError as error:
            reason = error.strerror or str(error)
            raise MediaError(self.path / name, f"cannot be read: {reason}.") from error
        if zlib.crc32(content) != row["checksum"]:
            problem = "its bytes in the shard have a wrong checksum; delete the shard, then"
            raise MediaError(self.path / name, f"{problem} {_AGAIN}.")
        table = replace(info.packets, offsets=info.packets.offsets - row["place"])
        return Record(name, content, replace(info, packets=table), self.stamp(name))

    def _row(self, name: str) -> Any:
        if name not in self._rows:
            problem = f"the shard has {len(self._rows)} videos, but not this one; correct the list."
            raise MediaError(self.path / name, problem)
        return self._rows[name]


def _number(encoded: bytes) -> int:
    return int.from_bytes(encoded, "little")


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write a shard and put it on the disk; the caller gives it its name when it has checked it.

    Raises:
        OSError: it cannot be written.
    """
    rows, names, stamps, tables = [], [], [], []
    kinds: dict[StreamKind, int] = {}
    table_at = 0
    with path.open("wb") as handle:
        handle.write(bytes(HEADER_BYTES))
        for record in records:
            info = record.info
            assert info.packets is not None
            tables.append(info.packets.pack())
            kind = kinds.setdefault(info.kind, len(kinds))
            bytes_ = (len(record.content), zlib.crc32(record.content))
            facts = (info.num_frames, info.width, info.height, kind, info.first_number)
            rows.append((handle.tell(), *bytes_, *facts, table_at, len(tables[-1])))
            names.append(record.name)
            stamps.append(record.stamp)
            table_at += len(tables[-1])
            handle.write(record.content)
        index_at = handle.tell()
        names_ = "\0".join(names).encode("utf-8", "surrogateescape")
        facts_ = {"rows": len(rows), "names_bytes": len(names_), "stamps": stamps}
        head = json.dumps({**facts_, "kinds": [astuple(kind) for kind in kinds]}).encode()
        index = b"".join([head, b"\n", np.array(rows, _ROW).tobytes(), names_, *tables])
        handle.write(index)
        header = _HEADER.pack(_MAGIC, _VERSION, index_at, len(index), zlib.crc32(index))
        handle.seek(0)
        handle.write(header + zlib.crc32(header).to_bytes(4, "little"))
        handle.flush()
        os.fsync(handle.fileno())


def make_record(name: str, path: Path, info: MediaInfo) -> Record:
    """A video file, or a folder of frames, as it will stand in a shard.

    Args:
        name: in the shard.
        path, info: of the file or folder.

    Raises:
        MediaError: it cannot be read, or its frames cannot be found without its container.
    """
    if info.kind.frame_name:
        images = read_encoded(path, info, range(info.num_frames))
        sizes = np.array([len(image) for image in images], np.int32)
        frames = np.arange(len(images), dtype=np.int32)
        offsets = np.cumsum([0, *sizes[:-1]])
        packets = PacketTable(offsets, sizes, frames, frames, b"")
        return Record(name, b"".join(images), replace(info, packets=packets))
    if info.packets is None or not info.kind.trimmable:
        problem = f"{info.kind.codec} in {info.kind.container} whose packets cannot be cut out"
        raise MediaError(path, f"{problem}; encode it anew (--codec h264 or vp9).")
    return Record(name, read_whole(path, info.size_bytes).tobytes(), info)


def packed_name(path: Path) -> tuple[Path, str] | None:
    """(shard, name in it) of the path of a packed video; None for any other path."""
    shard = media_file(path)
    return None if shard == path else (shard, path.relative_to(shard).as_posix())


def probe_record(
    record: VideoRecord, frame_name: str, open_shard: Callable[[Path], Shard] = Shard
) -> MediaInfo:
    """What is in a video file, in a folder of frames (if they have a name), or in a shard.

    Raises:
        MediaError: it cannot be used.
    """
    packed = packed_name(record.path)
    if packed is not None:
        return open_shard(packed[0]).info(packed[1])
    return probe_frames(record, frame_name) if frame_name else probe(record.path)


def find_media_damage(path: Path, info: MediaInfo) -> None:
    """Look at the whole of a video, without decoding, for what a decoder may not notice.

    Raises:
        MediaError: its container is damaged, or its bytes in a shard have a wrong checksum.
    """
    packed = packed_name(path)
    if packed is not None:
        Shard(packed[0]).record(packed[1])
    elif not info.kind.frame_name:
        probe(path)


def shard_opener() -> Callable[[Path], Shard]:
    """Opens shards, each once."""
    return functools.cache(Shard)
