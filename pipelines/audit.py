"""Audit of a set: every file of its lists, opened and decoded whole.

Decoders make up for damage without a word: black or repeated frames, other pixels, fewer frames.
What this finds goes into a deny-list.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.annotations import Part, VideoRecord, VideoSet
from pipelines.decode import decode_packets
from pipelines.errors import DataError, MediaError, counted, why
from pipelines.images import first_frame_name, read_encoded, read_images
from pipelines.in_flight import End, find_harmful, messages
from pipelines.media import MediaInfo, open_video
from pipelines.progress import progress_bar
from pipelines.shards import Shard, packed_name, probe_record, shard_opener

_BLACK = 20  # luma below it (16 is black) all over the frame
# FFmpeg's JPEG decoder goes on after an error unless told not to; others are not changed by it, and
# to those of VP8 and VP9 most bytes are some picture.
_STRICT = {"err_detect": "explode"}
_TAIL = 3  # black frames at the end that follow a picture


@dataclass(frozen=True)
class Finding:
    """What is wrong with one video of a list."""

    record: VideoRecord
    reason: str
    fatal: bool
    """Whether training must not use the video; else it is only worth knowing."""

    shard: Path | None = None
    """The shard that is at fault as a whole; the video itself may be sound."""


def audit(
    videos: VideoSet,
    *,
    threads: int,
    frame_name: str = "",
    decode: bool = True,
    progress: bool = True,
) -> Iterator[Finding]:
    """The findings of every video, in the order of the list; each part of a folder is a video.

    Args:
        videos: files, or folders of frames.
        threads: that open and decode.
        frame_name: names of the files in folders of frames; "" = as in the first folder.
        decode: decode every frame; False = only what an index looks at.
        progress: say how far it is.

    Raises:
        DataError: the process that reads the videos ended, and none of them did it.
    """
    frame_name = frame_name or first_frame_name(videos)
    unique = list({record.part: record for record in videos}.values())
    found = _found(dict(enumerate(unique)), threads, frame_name, decode)
    early: dict[int, list[Finding]] = {}
    with progress_bar(len(unique), "checking", "video", show=progress) as bar:
        for number in range(len(unique)):
            while number not in early:
                early.update([next(found)])
            yield from early.pop(number)
            bar.update()


def _found(
    waiting: dict[int, VideoRecord], threads: int, frame_name: str, decode: bool
) -> Iterator[tuple[int, list[Finding]]]:
    """(number, findings) of all videos, as they are checked, in a process that one may kill."""
    while waiting:
        begun: set[int] = set()
        end: End | None = None
        work = (dict(waiting), threads, frame_name, decode)
        for message in messages(_check_all, work, timeout_s=None):
            if isinstance(message, End):
                end = message
            elif isinstance(message, int):
                begun.add(message)
            else:
                number, _ = message
                begun.discard(number)
                del waiting[number]
                yield message
        if end is None:
            return
        suspects = sorted(begun)
        alone = functools.partial(check_each, frame_name, decode)
        guilty = find_harmful(alone, [waiting[k] for k in suspects], timeout_s=None)
        for place, its_end in guilty.items():
            record = waiting.pop(suspects[place])
            yield suspects[place], [Finding(record, its_end.what, True)]
        if not suspects:
            # An End says "the process that reads it": there is no such video.
            what = end.what.replace("reads it", "reads the videos")
            raise DataError(
                f"{what} while it was reading none of them. What it printed above, if anything, "
                "says why; was it killed, or could it not start, for want of memory?"
            )
        if not guilty:
            named = ", ".join(str(waiting[k].path) for k in suspects)
            raise DataError(
                f"{end.what}; it was reading {named}, each of which can be read alone. Was it "
                "killed, for want of memory? Try again, with fewer --threads."
            )


def _check_all(
    send: Callable[[Any], None],
    records: dict[int, VideoRecord],
    threads: int,
    frame_name: str,
    decode: bool,
) -> None:
    """Sends the number of each video before it is checked, and (number, findings) after."""
    open_shard = shard_opener()
    lock = threading.Lock()

    def check(number: int) -> None:
        with lock:
            send(number)
        findings = check_video(records[number], frame_name, decode, open_shard)
        with lock:
            send((number, findings))

    with ThreadPoolExecutor(threads, thread_name_prefix="accel-audit") as pool:
        for _ in pool.map(check, records):
            pass


def check_each(
    frame_name: str, decode: bool, records: Sequence[VideoRecord], report: Callable[[int], None]
) -> None:
    """A task of `in_flight.find_harmful`."""
    open_shard = shard_opener()
    for number, record in enumerate(records):
        report(number)
        check_video(record, frame_name, decode, open_shard)


def check_video(
    record: VideoRecord,
    frame_name: str,
    decode: bool = True,
    open_shard: Callable[[Path], Shard] = Shard,
) -> list[Finding]:
    """As `audit`, one video, in this process: a decoder that crashes takes it along."""
    try:
        info = probe_record(record, frame_name, open_shard)
        packed = packed_name(record.path)
        if packed is not None and decode:
            open_shard(packed[0]).record(packed[1])  # its checksum
        if info.kind.frame_name:
            return list(_images(record, info, decode))
        return list(_file(record, info, decode))
    except MediaError as error:
        packed = packed_name(record.path)
        shard = packed[0] if packed is not None and error.path == packed[0] else None
        return [Finding(record, error.problem, True, shard)]
    except MemoryError:
        raise
    except Exception as error:  # whatever a library makes of it, training would not use the video
        return [Finding(record, f"{type(error).__name__}: {error}", True)]


def _file(record: VideoRecord, info: MediaInfo, decode: bool) -> Iterator[Finding]:
    import av

    path = record.path
    if info.packets is None:
        yield Finding(record, "frames can only be decoded from the start of the file", False)
    times: list[int | None] = []
    brightest: list[int] = []
    try:
        if not decode:
            times = _packet_times(path)
        else:
            for frame in _frames(path, info):
                times.append(frame.pts)
                if frame.is_corrupt:
                    reason = f"frame {len(times) - 1} is damaged (the decoder filled it in)"
                    yield Finding(record, reason, True)
                    return
                brightest.append(_brightest(frame))
    except av.FFmpegError as error:
        raise MediaError(path, f"cannot be decoded: {why(error)}.") from error
    if decode and len(times) != info.num_frames:
        reason = f"{info.num_frames} frames by its packets, {len(times)} decoded"
        yield Finding(record, reason, True)
    if end := _black_end(brightest):
        yield Finding(record, end, True)
    known = np.array([time for time in times if time is not None])
    steps = np.diff(known) if len(known) > 2 else np.zeros(1)
    # Containers round times to their unit: neighbors may differ by one.
    if steps.max() - steps.min() > max(1.0, 0.1 * float(np.median(steps))):
        yield Finding(record, "its frame rate varies", False)


def _frames(path: Path, info: MediaInfo) -> Iterator[Any]:
    """Every frame, as PyAV has them."""
    if packed_name(path) is not None:
        yield from decode_packets(path, info)
        return
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if info.kind.codec == "mjpeg":
            stream.codec_context.options = _STRICT
        yield from container.decode(video=0)


def _brightest(frame: Any) -> int:
    """Of some 4096 samples of the luma of a PyAV frame, as 8 bits."""
    bits = frame.format.components[0].bits
    luma = np.frombuffer(frame.planes[0], np.uint8 if bits <= 8 else np.uint16)
    brightest: int = luma[:: max(1, luma.size // 4096)].max().item() >> max(0, bits - 8)
    return brightest


def _black_end(brightest: Sequence[int]) -> str | None:
    """What is wrong with how a video ends, from the brightest sample of each frame."""
    black = 0
    while black < len(brightest) and brightest[-1 - black] < _BLACK:
        black += 1
    if black and black == len(brightest):
        return "all its frames are black"
    if black >= _TAIL:
        return f"its last {black} of {len(brightest)} frames are black"
    return None


def _packet_times(path: Path) -> list[int | None]:
    if packed_name(path) is not None:
        return []  # a shard does not keep them
    with open_video(path) as container:
        return sorted(p.pts for p in container.demux(video=0) if p.pts is not None)


def _images(record: VideoRecord, info: MediaInfo, decode: bool) -> Iterator[Finding]:
    """Of a folder of frames, or of its record in a shard."""
    name, first = info.kind.frame_name, info.first_number
    if record.num_frames and (record.path / name.format(first + info.num_frames)).exists():
        reason = f"the folder has more frames than the {record.num_frames} of the list"
        yield Finding(record, reason, False)
    frames = range(info.num_frames)
    brightest: list[int] = []
    for start in range(0, info.num_frames, 32) if decode else ():
        part = frames[start : start + 32]
        pixels = read_images(record.path, info, part)  # [F, H, W, 3]
        brightest += pixels[:, ::4, ::4].max(axis=(1, 2, 3)).tolist()
        if info.kind.codec != "jpeg":
            continue
        for frame, content in zip(part, read_encoded(record.path, info, part), strict=True):
            if _is_garbage(content):
                file = name.format(first + frame)
                yield Finding(record, f"{file} is damaged, although it decodes", True)
                return
    if end := _black_end(brightest):
        yield Finding(record, end, True)
    if not decode and info.packets is None:
        for frame in frames:
            path = record.path / name.format(first + frame)
            if not path.is_file():
                raise MediaError(path, "the frame is missing.")


def _is_garbage(content: bytes) -> bool:
    """Whether a JPEG's codes lead nowhere. Pillow and DALI give some pixels for them."""
    import av

    decoder: Any = av.CodecContext.create("mjpeg", "r")
    decoder.thread_type, decoder.options = "NONE", _STRICT
    try:
        for packet in (av.Packet(content), None):
            decoder.decode(packet)
    except av.InvalidDataError:
        return True
    except av.FFmpegError:  # a kind of JPEG that FFmpeg does not have
        pass
    return False


def list_notes(splits: Iterable[tuple[str, VideoSet]]) -> Iterator[str]:
    """What is odd about the lists themselves: repeated lines, two labels, videos of two lists.

    Args:
        splits: (title, videos) of each list.
    """
    owners: dict[Part, str] = {}
    for title, videos in splits:
        labels: dict[Part, int] = {}
        other_label: dict[Part, None] = {}
        shared: dict[str, list[str]] = {}
        for record in videos:
            part = record.part
            if labels.setdefault(part, record.label) != record.label:
                other_label[part] = None
            if (owner := owners.setdefault(part, title)) != title:
                shared.setdefault(owner, []).append(record.name)
        if repeated := len(videos) - len(labels):
            yield f"{title}: {counted(repeated, 'line')} with a path listed before"
        if other_label:
            example = next(iter(other_label))[0]
            count = counted(len(other_label), "video")
            yield f"{title}: {count} with two labels, e.g. {example}"
        for owner, names in shared.items():
            count = counted(len(names), "video")
            yield f"{title}: {count} also in {owner}, e.g. {names[0]}"


def deny_reasons(findings: Iterable[Finding]) -> dict[str, str]:
    """Name -> reason of each video that must not be used; without those of a faulty shard, which
    is made anew."""
    reasons: dict[str, str] = {}
    for finding in findings:
        if finding.fatal and finding.shard is None:
            reasons.setdefault(finding.record.name, finding.reason)
    return reasons
