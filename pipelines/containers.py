"""Is a media file whole? The container's own structure, without any decoder.

Decoders make up for damage: a cut WebM gives black or fewer frames without an error. The containers
below state their sizes, so a cut or overwritten file can be told from a short one.
"""

import mmap
import struct
from pathlib import Path

# Matroska/WebM elements that may stand in a Segment, and in a Cluster.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_IN_SEGMENT = {
    0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469,
    _CLUSTER, 0xEC, 0xBF,
}  # fmt: skip
_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854, 0xEC, 0xBF}
_BAD_COPY = "the file is cut off or damaged; copy or download it again"


def find_damage(path: Path) -> str | None:
    """What is wrong with a file as a container (a sentence), or None if nothing is known.

    Checks Matroska/WebM, MP4/MOV and AVI; recognizes empty files, web pages and Git LFS pointers.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as handle:
        head = handle.read(64)
        if not head:
            return "the file is empty (0 bytes); copy or download it again."
        if head.startswith(b"version https://git-lfs"):
            return "got a Git LFS pointer, expected a video; run `git lfs pull`."
        if head.lstrip()[:1] == b"<":
            return "got a web page or XML, expected a video; download it again."
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if head.startswith(b"\x1a\x45\xdf\xa3"):
                return _matroska_damage(data)
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
                return _mp4_damage(data)
            if head.startswith(b"RIFF"):
                return _avi_damage(data)
    return None


def _cut(declared: int, got: int) -> str:
    return f"the header declares {declared} bytes, got {got}: {_BAD_COPY}."


def _avi_damage(data: mmap.mmap) -> str | None:
    if len(data) < 12:
        return _cut(12, len(data))
    declared = struct.unpack_from("<I", data, 4)[0] + 8
    return _cut(declared, len(data)) if declared > len(data) else None


def _mp4_damage(data: mmap.mmap) -> str | None:
    position = 0
    kinds: set[bytes] = set()
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size == 1 and position + 16 <= len(data):
            size = struct.unpack_from(">Q", data, position + 8)[0]
        elif size == 0:  # to the end of the file
            size = len(data) - position
        if size < 8 or position + size > len(data):
            if kinds >= {b"moov", b"mdat"} and kind not in (b"mdat", b"moof"):
                break  # bytes after the last box
            return _cut(position + size, len(data))
        kinds.add(kind)
        position += size
    if b"moov" not in kinds:
        return f"the box 'moov' (the index of the file) is missing: {_BAD_COPY}."
    return None


def _element(data: mmap.mmap, position: int) -> tuple[int, int, int | None] | None:
    """(id, position of the content, end; None = unknown size) of an EBML element."""
    if position >= len(data) or data[position] < 0x10:
        return None
    id_length = 9 - data[position].bit_length()
    start = position + id_length
    if start >= len(data) or data[start] == 0:
        return None
    size_length = 9 - data[start].bit_length()
    content = start + size_length
    if content > len(data):
        return None
    size = int.from_bytes(data[start:content], "big") & ((1 << 7 * size_length) - 1)
    unknown = size == (1 << 7 * size_length) - 1
    identity = int.from_bytes(data[position:start], "big")
    return identity, content, None if unknown else content + size


def _matroska_damage(data: mmap.mmap) -> str | None:
    header = _element(data, 0)
    segment = _element(data, header[2]) if header and header[2] is not None else None
    if segment is None or segment[0] != _SEGMENT:
        return f"the Segment element is missing: {_BAD_COPY}."
    _, position, end = segment
    if end is None:  # a live recording: sizes are not declared
        return None
    if end > len(data):
        return _cut(end, len(data))
    while position < end:
        element = _element(data, position)
        if element is None or element[0] not in _IN_SEGMENT:
            return f"byte {position} starts no element of a Segment: {_BAD_COPY}."
        identity, content, stop = element
        if stop is None:
            return None
        if stop > end:
            return f"the element at byte {position} ends beyond its Segment: {_BAD_COPY}."
        while identity == _CLUSTER and content < stop:
            inner = _element(data, content)
            inside = inner is not None and inner[0] in _IN_CLUSTER
            if inner is None or not inside or inner[2] is None or inner[2] > stop:
                return f"byte {content} starts no element of a Cluster: {_BAD_COPY}."
            content = inner[2]
        position = stop
    return None
