"""Is a media file whole? The container's own structure, without any decoder.

Decoders make up for damage: a cut WebM gives black or fewer frames without an error. The containers
below state their sizes, so a cut or overwritten file can be told from a short one. Files are read,
never mapped: a page of a file that was cut, or that a network disk cannot give, kills the process.
"""

import os
import struct

# Matroska/WebM elements that may stand in a Segment, and in a Cluster.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_IN_SEGMENT = {
    0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469,
    _CLUSTER, 0xEC, 0xBF,
}  # fmt: skip
_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854, 0xEC, 0xBF}
_WINDOW_BYTES = 65_536
_BAD_COPY = "the file is cut off or damaged; copy or download it again"


class FileWindow:
    """A part of a file in memory, which moves to where one reads.

    Args:
        handle: file descriptor, open for reading.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._start = 0
        self._content = b""
        self.size_bytes = os.fstat(handle).st_size
        """Of the file when this was made; it may end earlier by now."""

    def read(self, position: int, count: int) -> bytes:
        """`count` bytes from there, or as many as the file has.

        Raises:
            OSError: the file cannot be read.
        """
        start = self._reach(position, count)
        return self._content[start : start + count]

    def find(self, wanted: bytes, position: int, end: int) -> int:
        """Where these bytes stand between `position` and `end`; -1 = they do not.

        Raises:
            OSError: the file cannot be read.
        """
        start = self._reach(position, end - position)
        place = self._content.find(wanted, start, start + end - position)
        return place if place < 0 else place - start + position

    def _reach(self, position: int, count: int) -> int:
        """Have these bytes in the window, as far as the file has them: their place in it."""
        if not self._start <= position <= position + count <= self._start + len(self._content):
            self._start = position
            self._content = os.pread(self._handle, max(count, _WINDOW_BYTES), position)
            while 0 < len(self._content) < count:  # network disks may give it in several parts
                place = position + len(self._content)
                part = os.pread(self._handle, count - len(self._content), place)
                if not part:
                    break
                self._content += part
        return position - self._start


def find_damage(file: FileWindow) -> str | None:
    """What is wrong with a file as a container (a sentence), or None if nothing is known.

    Checks Matroska/WebM, MP4/MOV, AVI and MPEG-TS; recognizes empty files, web pages and Git LFS
    pointers.

    Raises:
        OSError: the file cannot be read.
    """
    head = file.read(0, 64)
    if not head:
        return "the file is empty (0 bytes); copy or download it again."
    if head.startswith(b"version https://git-lfs"):
        return "got a Git LFS pointer, expected a video; run `git lfs pull`."
    if head.lstrip()[:1] == b"<":
        return "got a web page or XML, expected a video; download it again."
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_damage(file)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return _mp4_damage(file)
    if head.startswith(b"RIFF"):
        return _avi_damage(head, file.size_bytes)
    return _ts_damage(file)


def _cut(declared: int, got: int) -> str:
    return f"the header declares {declared} bytes, got {got}: {_BAD_COPY}."


def _avi_damage(head: bytes, size_bytes: int) -> str | None:
    if len(head) < 12:
        return _cut(12, size_bytes)
    declared = struct.unpack_from("<I", head, 4)[0] + 8
    return _cut(declared, size_bytes) if declared > size_bytes else None


def _ts_damage(file: FileWindow) -> str | None:
    """An MPEG transport stream consists of packets of one size, each with a byte to find it by."""
    head = file.read(0, 1024)
    for size, place in ((188, 0), (192, 4), (204, 0)):
        marks = head[place::size][:5]
        if marks == b"\x47" * 5 and file.size_bytes % size:
            return f"it ends in the middle of a packet of {size} bytes: {_BAD_COPY}."
    return None


def _mp4_damage(file: FileWindow) -> str | None:
    position, total = 0, file.size_bytes
    kinds: set[bytes] = set()
    while position + 8 <= total:
        head = file.read(position, 16)
        if len(head) < 8:
            return _cut(total, position + len(head))
        size, kind = struct.unpack_from(">I4s", head)
        if size == 1 and len(head) == 16:
            size = struct.unpack_from(">Q", head, 8)[0]
        elif size == 0:  # to the end of the file
            size = total - position
        if size < 8 or position + size > total:
            if kinds >= {b"moov", b"mdat"} and kind not in (b"mdat", b"moof"):
                break  # bytes after the last box
            return _cut(position + size, total)
        kinds.add(kind)
        position += size
    if b"moov" not in kinds:
        return f"the box 'moov' (the index of the file) is missing: {_BAD_COPY}."
    return None


def _element(file: FileWindow, position: int) -> tuple[int, int, int | None] | None:
    """(id, position of the content, end; None = unknown size) of an EBML element."""
    head = file.read(position, 12)  # at most 4 bytes of id and 8 of size
    if not head or head[0] < 0x10:
        return None
    start = 9 - head[0].bit_length()
    if start >= len(head) or head[start] == 0:
        return None
    size_length = 9 - head[start].bit_length()
    stop = start + size_length
    if stop > len(head):
        return None
    size = int.from_bytes(head[start:stop], "big") & ((1 << 7 * size_length) - 1)
    unknown = size == (1 << 7 * size_length) - 1
    content = position + stop
    return int.from_bytes(head[:start], "big"), content, None if unknown else content + size


def _matroska_damage(file: FileWindow) -> str | None:
    header = _element(file, 0)
    segment = _element(file, header[2]) if header and header[2] is not None else None
    if segment is None or segment[0] != _SEGMENT:
        return f"the Segment element is missing: {_BAD_COPY}."
    _, position, end = segment
    if end is None:  # a live recording: sizes are not declared
        return None
    if end > file.size_bytes:
        return _cut(end, file.size_bytes)
    while position < end:
        element = _element(file, position)
        if element is None or element[0] not in _IN_SEGMENT:
            return f"byte {position} starts no element of a Segment: {_BAD_COPY}."
        identity, content, stop = element
        if stop is None:
            return None
        if stop > end:
            return f"the element at byte {position} ends beyond its Segment: {_BAD_COPY}."
        while identity == _CLUSTER and content < stop:
            inner = _element(file, content)
            inside = inner is not None and inner[0] in _IN_CLUSTER
            if inner is None or not inside or inner[2] is None or inner[2] > stop:
                return f"byte {content} starts no element of a Cluster: {_BAD_COPY}."
            content = inner[2]
        position = stop
    return None
