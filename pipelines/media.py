"""What is in a video file: its frames and the packets that hold them.

Frame counts in headers are not trusted: frames are counted from the packets, or by decoding where
packets and frames do not correspond.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.containers import FileWindow, find_damage
from pipelines.errors import MediaError, why
from pipelines.matroska import can_hold
from pipelines.packets import PacketTable, make_table

# Demuxers that read one self-contained file (no playlists, no subtitles, no images, no text art).
_CONTAINERS = frozenset(
    "3g2 3gp asf avi flv ivf m4a matroska mj2 mov mp4 mpeg mpegts mxf ogg webm".split()
)
# Codecs with exactly one frame per packet in these containers, at the packet's time.
_ONE_FRAME_PER_PACKET = frozenset("av1 h264 hevc mjpeg prores vp9".split())
# Codecs whose decoders need nothing of a container but its packets and codec parameters. Not MPEG-4
# part 2: given packets alone, FFmpeg 8's decoder returns other pixels from one run to the next.
_STANDALONE = frozenset("av1 h264 hevc mjpeg vp8 vp9".split())
_DECODERS = {"av1": "libdav1d"}  # where FFmpeg's decoder is not called like the codec
_BT601 = frozenset((0, 2, 5, 6))  # in FFmpeg's numbers, with RGB and what is not stated
_DALI_CPU_CODECS = frozenset(("mjpeg", "vp8", "vp9"))
_NVDEC_CODECS = frozenset("av1 h264 hevc vp8 vp9".split())
# Where the header says how long the lengths of units are; the units of a picture that refers to
# none before it, nor do those after it: IDR; HEVC's CRA and BLA too (the table tells open GOPs).
_KEYFRAME_UNITS = {"h264": (4, frozenset((5,))), "hevc": (21, frozenset(range(16, 22)))}
_BLOCK_HEADER_BYTES = 64  # most that stands between a packet's position and its bytes


@dataclass(frozen=True)
class StreamKind:
    """What files of a set usually have in common: it decides who can decode them."""

    codec: str
    container: str
    pixel_format: str
    color_range: int
    """As the container states it, in FFmpeg's numbers; 0 = not stated."""

    color_space: int
    """As the container states it, in FFmpeg's numbers; 2 = not stated."""

    regular: bool
    """Whether the packets are known, and each shows one frame."""

    trimmable: bool
    """Whether a part of the stream can be given to a decoder that reads from the start. Not with
    open GOPs: decoders differ in what they return around a keyframe in their midst."""

    frame_name: str = ""
    """Names of the files in a folder of frames, e.g. "img_{:05d}.jpg"; "" = a video file."""

    def whole_reason(self, *, packets_known: bool, cut: bool) -> str | None:
        """Why such a file is decoded from its start, or None if the wanted packets are enough.

        Args:
            packets_known: whether the file has a packet table.
            cut: whether the decoder takes a cut file (DALI), not packets (PyAV).
        """
        if self.frame_name:
            return None
        if not packets_known and self.codec not in _STANDALONE:
            return f"{self.codec}: packets alone do not give the same pixels"
        if not packets_known:
            return f"{self.codec} in {self.container}: packets are not found one by one"
        if cut and not self.trimmable:
            return f"{self.codec} in {self.container}: open GOPs or irregular packets"
        return None

    @property
    def dali_cpu_problem(self) -> str | None:
        """Why DALI cannot decode such a file on the CPU, or None."""
        if self.frame_name:
            return None
        if self.codec not in _DALI_CPU_CODECS:
            return f"DALI does not decode {self.codec} on the CPU"
        if not {"matroska", "mp4", "avi"} & set(self.container.split(",")):
            return f"{self.codec} in the container {self.container}"
        if self.pixel_format not in ("yuv420p", "yuvj420p") or not self.regular:
            return f"{self.codec} with {self.pixel_format} or irregular packets"
        return None

    @property
    def dali_colors(self) -> str | None:
        """How DALI shows such a file, if not in the colors that its container states; or None."""
        if self.frame_name or self.color_space in _BT601:
            return None
        name = "BT.709" if self.color_space == 1 else f"color space {self.color_space}"
        return f"DALI shows {name} as if it were BT.601, which accel data prepare writes"

    @property
    def dali_gpu_problem(self) -> str | None:
        """Why DALI cannot decode such a file on a GPU (NVDEC, nvJPEG), or None."""
        if self.frame_name:
            return None if self.codec == "jpeg" else f"nvJPEG does not decode {self.codec}"
        if self.codec not in _NVDEC_CODECS or self.pixel_format not in ("yuv420p", "yuvj420p"):
            return f"NVDEC does not decode {self.codec} with {self.pixel_format}"
        if not {"matroska", "mp4"} & set(self.container.split(",")) or not self.regular:
            return f"{self.codec} in the container {self.container}, or with irregular packets"
        return None


@dataclass(frozen=True)
class MediaInfo:
    """One verified video stream."""

    kind: StreamKind
    width: int
    height: int
    num_frames: int
    """Frames a decoder returns, >= 1."""

    size_bytes: int
    packets: PacketTable | None
    """None: packets do not tell where to find a frame; the file is decoded from its start. In a
    shard, images are packets too."""

    first_number: int = 0
    """Number in the file name of frame 0 of a folder of frames."""


def open_video(path: Path) -> Any:
    """The file as a PyAV container; every failure is a MediaError."""
    import av

    try:
        # Only this file: some demuxers follow references to others. Broken metadata is no damage.
        options = {"protocol_whitelist": "file"}
        container = av.open(str(path), metadata_errors="replace", options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, f"expected a video file, cannot open it: {why(error)}.") from error
    if not _CONTAINERS & set(container.format.name.split(",")):
        container.close()
        problem = f"expected a video file, got the format '{container.format.name}'."
        raise MediaError(path, problem)
    return container


def open_decoder(codec: str, header: bytes, *, color_range: int = 0, color_space: int = 2) -> Any:
    """A PyAV decoder of a stream's packets, with one thread: clips are decoded in parallel."""
    import av

    decoder: Any = av.CodecContext.create(_DECODERS.get(codec, codec), "r")
    decoder.extradata = header or None
    decoder.thread_type, decoder.thread_count = "NONE", 1
    decoder.color_range, decoder.colorspace = color_range, color_space
    # H.264 that does not state how far frames are reordered: wait for the most, rather than drop
    # frames until the decoder has found out.
    decoder.options = {"strict": "1"}
    return decoder


def probe(path: Path) -> MediaInfo:
    """Index one file.

    Raises:
        MediaError: missing, empty, no video, audio only, cut off, damaged, or without frames.
    """
    try:
        path.stat()  # says why it is no file, if it does not exist
        if not path.is_file():
            raise MediaError(path, "expected a video file, got a folder or device.")
        handle = path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    with handle:
        try:
            file = FileWindow(handle.fileno())
            try:
                return _probe(path, file)
            finally:  # what was found may come of it
                _refuse_change(path, file.size_bytes, os.fstat(handle.fileno()).st_size)
        except OSError as error:
            raise _unreadable(path, error) from error


def _refuse_change(path: Path, before: int, now: int) -> None:
    if now != before:
        problem = f"its size changed from {before} to {now} bytes while it was looked at"
        raise MediaError(path, f"{problem}; let whatever writes it finish, then start again.")


def _unreadable(path: Path, error: OSError | ValueError) -> MediaError:
    return MediaError(path, f"cannot be read: {why(error)}; check the list and data.root.")


def _probe(path: Path, file: FileWindow) -> MediaInfo:
    import av

    if damage := find_damage(file):
        raise MediaError(path, damage)
    with open_video(path) as container:
        if not container.streams.video:
            raise MediaError(path, "expected a video stream, got none (audio only?).")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None or codec.width <= 0 or codec.height <= 0:
            raise MediaError(path, "expected a decodable video stream, got an unknown codec.")
        name = codec.codec.canonical_name
        facts = (name, container.format.name, str(codec.pix_fmt))
        colors = (int(codec.color_range), int(codec.colorspace))
        width, height = codec.width, codec.height
        header = bytes(codec.extradata or b"")
        try:
            packets = [packet for packet in container.demux(stream) if packet.size]
        except av.FFmpegError as error:
            raise MediaError(path, f"the file is damaged: {why(error)}; copy it again.") from error
    offsets = _places(file, packets) if name in _STANDALONE else None
    ranks = _ranks_by_time(packets) if name in _ONE_FRAME_PER_PACKET else None
    if ranks is None or "avi" in facts[1].split(",") or not _begins_with_a_keyframe(packets):
        ranks = _ranks_by_decoding(name, header, packets) if offsets else None
    if ranks is None or not any(rank >= 0 for rank in ranks):
        num_frames, offsets = _count_frames(path) if packets else 0, None
    else:
        num_frames = sum(rank >= 0 for rank in ranks)
    if num_frames == 0:
        raise MediaError(path, "expected video frames, got none; remove the file from the list.")
    table = None
    if offsets is not None and ranks is not None:
        keyframes = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        table = make_table(offsets, [packet.size for packet in packets], ranks, keyframes, header)
    regular = table is not None and int(table.ranks.min()) >= 0
    trimmable = table is not None and regular and table.closed and can_hold(name, header)
    if trimmable and name in _KEYFRAME_UNITS:
        assert table is not None
        trimmable = all(_is_fresh_start(name, header, packets[k]) for k in table.keyframes)
    kind = StreamKind(*facts, *colors, regular, trimmable)
    return MediaInfo(kind, width, height, num_frames, file.size_bytes, table)


def _places(file: FileWindow, packets: list[Any]) -> list[int] | None:
    """Where the bytes of each packet stand in the file; None = not as they are, or not in a row."""
    offsets = []
    for packet in packets:
        if packet.pos is None or packet.has_sidedata("new_extradata"):
            return None
        end = packet.pos + packet.size + _BLOCK_HEADER_BYTES
        offsets.append(file.find(bytes(packet), packet.pos, end))
        if offsets[-1] < 0:
            return None
    return offsets


def _ranks_by_time(packets: list[Any]) -> list[int] | None:
    """Place of each packet's frame in the order of display; None = the times do not tell."""
    shown = [packet.pts for packet in packets if not packet.is_discard]
    if None in shown or len(set(shown)) < len(shown):
        return None
    rank_of = {time: rank for rank, time in enumerate(sorted(shown))}
    return [-1 if packet.is_discard else rank_of[packet.pts] for packet in packets]


def _begins_with_a_keyframe(packets: list[Any]) -> bool:
    """Whether the frames of all packets come. Whoever cuts a stream without encoding it anew leaves
    frames at its start whose references are gone, and decoders leave them out. The times of shown
    frames are known."""
    shown = [packet.pts for packet in packets if not packet.is_discard]
    if not shown or not packets[0].is_keyframe or packets[0].pts is None:
        return False
    return bool(packets[0].pts <= min(shown))


def _is_fresh_start(codec: str, header: bytes, packet: Any) -> bool:
    """Whether a keyframe of H.264 or HEVC, packed as in MP4, is a complete picture that nothing
    after it looks beyond. With periodic intra refresh "keyframes" are places from which on a
    picture builds up: PyAV tells when it is complete, a decoder of a cut file does not."""
    length_at, types = _KEYFRAME_UNITS[codec]
    num_bytes = (header[length_at] & 3) + 1  # of the length before each unit
    content, place = bytes(packet), 0
    while place + num_bytes < len(content):
        first = content[place + num_bytes]
        if (first & 31 if codec == "h264" else first >> 1 & 63) in types:
            return True
        place += num_bytes + int.from_bytes(content[place : place + num_bytes], "big")
    return False


def _ranks_by_decoding(codec: str, header: bytes, packets: list[Any]) -> list[int] | None:
    """As `_ranks_by_time`, by decoding with the packets' numbers for times."""
    import av

    ranks = [-1] * len(packets)
    decoder = open_decoder(codec, header)
    order = []
    try:
        for number, packet in enumerate(packets):
            numbered = av.Packet(bytes(packet))
            numbered.pts = number
            order += [frame.pts for frame in decoder.decode(numbered)]
        order += [frame.pts for frame in decoder.decode(None)]
    except av.FFmpegError:
        return None
    if None in order or len(set(order)) < len(order):
        return None
    shown = [number for number in order if not packets[number].is_discard]
    for rank, number in enumerate(shown):
        ranks[number] = rank
    return ranks


def _count_frames(path: Path) -> int:
    import av

    with open_video(path) as container:
        try:
            return sum(1 for _ in container.decode(video=0))
        except av.FFmpegError as error:
            raise MediaError(path, f"cannot be decoded: {why(error)}; copy it again.") from error
