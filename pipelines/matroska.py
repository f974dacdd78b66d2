"""A Matroska file in memory from packets: what a decoder that never seeks is given instead of the
whole video. One video track, no index, display times 0, 1, 2, ...; RFC 9559.
"""

from collections.abc import Iterable, Sequence

_CODEC_IDS = {
    "av1": b"V_AV1",
    "h264": b"V_MPEG4/ISO/AVC",
    "hevc": b"V_MPEGH/ISO/HEVC",
    "mjpeg": b"V_MJPEG",
    "vp8": b"V_VP8",
    "vp9": b"V_VP9",
}
_TICK_NS = 40_000_000
MOST_FRAMES = 32_000  # the time of a block is 16 bits from that of its cluster


def can_hold(codec: str, header: bytes) -> bool:
    """Whether packets of this codec can be written as they are."""
    # The packets of H.264 and HEVC are as in MP4 exactly when their header is (version 1).
    return codec in _CODEC_IDS and (codec not in ("h264", "hevc") or header[:1] == b"\x01")


def write_matroska(
    packets: Sequence[bytes],
    times: Sequence[int],
    keyframes: Iterable[bool],
    *,
    codec: str,
    header: bytes,
    width: int,
    height: int,
) -> bytes:
    """The file.

    Args:
        packets: in decode order.
        times: place of each packet's frame in the order of display, 0-based.
        keyframes: whether a decoder can start at each packet.
        codec: FFmpeg's name, one that `can_hold` accepts.
        header: codec parameters (extradata) for the track.
        width, height: of the frames, px.

    Raises:
        ValueError: more than 32 000 packets.
    """
    if len(packets) > MOST_FRAMES:
        raise ValueError(f"write_matroska: expected <= {MOST_FRAMES} packets, got {len(packets)}.")
    video = _element(0xE0, _number(0xB0, width) + _number(0xBA, height))
    track = _number(0xD7, 1) + _number(0x73C5, 1) + _number(0x83, 1) + _number(0x9C, 0)
    track += _element(0x86, _CODEC_IDS[codec]) + _number(0x23E383, _TICK_NS) + video
    if header:
        track += _element(0x63A2, header)
    names = b"".join(_element(identity, b"accel") for identity in (0x4D80, 0x5741))
    head = _element(0x1549A966, _number(0x2AD7B1, _TICK_NS) + names)
    head += _element(0x1654AE6B, _element(0xAE, track))
    parts = [_number(0xE7, 0)]
    for packet, time, key in zip(packets, times, keyframes, strict=True):
        # Track 1, time, flags (0x80 = keyframe), then the packet.
        block = b"\x81" + time.to_bytes(2, "big") + (b"\x80" if key else b"\x00")
        parts += [b"\xa3", _size(len(packet) + 4), block, packet]
    cluster = b"".join(parts)
    segment = head + b"\x1f\x43\xb6\x75" + _size(len(cluster)) + cluster
    document = _element(0x4282, b"matroska") + _number(0x4287, 4) + _number(0x4285, 2)
    return _element(0x1A45DFA3, document) + _element(0x18538067, segment)


def _size(count: int) -> bytes:
    return (count | 1 << 56).to_bytes(8, "big")


def _element(identity: int, content: bytes) -> bytes:
    name = identity.to_bytes((identity.bit_length() + 7) // 8, "big")
    return name + _size(len(content)) + content


def _number(identity: int, value: int) -> bytes:
    return _element(identity, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))
