"""Re-encode a set once for training (small frames, short GOPs, constant frame rate), or pack it.

Frame k of a copy is frame k of the original, so sampling stays the same. What a clip costs falls
with the pixels and, because only the packets from the keyframe before a wanted frame are decoded,
with the distance of keyframes.
"""

import contextlib
import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipelines.annotations import Part, VideoRecord, VideoSet, format_list, refuse_unlistable
from pipelines.audit import check_video
from pipelines.cache import put_in_place, replace_bytes
from pipelines.errors import DataError, MediaError, why
from pipelines.images import first_frame_name, read_images
from pipelines.media import MediaInfo, open_video, probe
from pipelines.packets import SHARD_SUFFIX, media_file
from pipelines.packing import Named, map_ahead, pack_shard, stamp_of
from pipelines.prepare_folder import claimed
from pipelines.prepare_guard import Guard
from pipelines.prepare_report import Report, rates, sizes
from pipelines.progress import progress_bar
from pipelines.shards import Record, make_record, probe_record

_COPIES = "copies"  # not packed yet
_ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    # No B-frames: fewer packets lead to a frame.
    "h264": ("libx264", ".mp4", {"preset": "medium", "bf": "0", "sc_threshold": "0"}),
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "good", "cpu-used": "4", "b": "0"}),
}
_FRAMES_PER_S = 25  # of folders of frames
# Errors of the disk that is written to, not of an original: every further copy would fail as well.
_CANNOT_WRITE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))


@dataclass(frozen=True)
class Encoding:
    """How a set is encoded."""

    codec: Literal["h264", "vp9", "copy"] = "h264"
    """"copy" packs files and folders of frames as they are."""

    short_side: int = 256
    """px; smaller videos keep their size."""

    gop: int = 12
    """Frames from one keyframe to the next."""

    quality: int = 20
    """Constant rate factor; smaller is better and larger."""

    shard_videos: int = 0
    """Videos in one packed file (`pipelines.shards`); 0 = a file for each. "copy" needs > 0."""


def prepare(
    lists: Sequence[tuple[str, VideoSet]],
    out: Path,
    encoding: Encoding,
    *,
    threads: int,
    frame_name: str = "",
    class_names: Sequence[str] = (),
) -> Report:
    """Write every video of some lists, and the lists, below another folder.

    A copy, or a shard of them, appears under its name when it is complete and was verified, so the
    call can be repeated after an interruption; what is there of an original that has not changed
    (names, sizes and times of its files) is kept. A folder that is listed in several parts (offset
    and number of frames) becomes as many copies.

    Args:
        lists: (file name to write, videos).
        out: folder of the copies.
        encoding: the same as in earlier runs over this folder.
        threads: videos encoded at a time.
        frame_name: names of the files in folders of frames; "" = as in the first folder.
        class_names: for `classes.txt`; () = no such file.

    Raises:
        DataError: the folder holds copies of another encoding or of another root, another process
            is writing to it, two names become one, a list cannot hold one, or the folder cannot be
            written (any more).
    """
    facts = asdict(encoding)
    if not encoding.shard_videos:
        del facts["shard_videos"]
    with claimed(out, facts, lists[0][1].root):
        try:
            report = _prepare(lists, out, encoding, threads, frame_name)
            if class_names:
                names = "".join(f"{name}\n" for name in class_names)
                replace_bytes(out / "classes.txt", [names.encode()])
        except OSError as error:
            reason = why(error)
            advice = "copies that are complete are kept, so the same command goes on once it can be"
            raise DataError(f"{out}: cannot be written: {reason}; {advice}.") from error
        return report


def _prepare(
    lists: Sequence[tuple[str, VideoSet]],
    out: Path,
    encoding: Encoding,
    threads: int,
    frame_name: str,
) -> Report:
    records = list({record.part: record for _, videos in lists for record in videos}.values())
    names = _names(records, encoding)
    frame_name = frame_name or first_frame_name(records)
    work = _Work(encoding, out, names, frame_name)
    groups = _groups(records, out, encoding)
    guard = Guard(out, records, frame_name)

    def encode(record: VideoRecord) -> bool | str:
        return guard.call(record, work.encode, record)

    def pack(video: Named) -> Record | str:
        return guard.call(video[1], work.pack, video)

    bar = progress_bar(len(records), "preparing", "video")
    results: dict[Part, bool | str] = {}
    workers = ThreadPoolExecutor(threads, thread_name_prefix="accel-prepare")
    with contextlib.closing(guard), bar, workers as pool:
        try:
            if not encoding.shard_videos:
                outcomes = map_ahead(pool, encode, records, 4 * threads)
                for record, outcome in zip(records, outcomes, strict=True):
                    results[record.part] = outcome
                    bar.update()
            for shard, group in groups.items():
                videos = [(names[record.part], record) for record in group]
                outcome_of = pack_shard(
                    shard, videos, pack, pool=pool, ahead=2 * threads, done=bar.update
                )
                results |= {record.part: outcome_of[name] for name, record in videos}
                for record in group:
                    work.copy_of(record).unlink(missing_ok=True)
            if groups:
                _remove_empty(out / _COPIES)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    targets = {record.part: work.copy_of(record) for record in records}
    for shard, members in groups.items():
        targets |= {record.part: shard / names[record.part] for record in members}
    failed = {part: reason for part, reason in results.items() if isinstance(reason, str)}
    for list_name, listed in lists:
        kept = [
            VideoRecord(targets[r.part].relative_to(out).as_posix(), targets[r.part], r.label)
            for r in listed
            if r.part not in failed
        ]
        replace_bytes(out / list_name, [format_list(kept).encode()])
    good = [record for record in records if record.part not in failed]
    pairs = [(r, VideoRecord(r.name, targets[r.part], r.label)) for r in good]
    before, after = sizes(pairs)
    return Report(
        sum(result is True for result in results.values()),
        sum(result is False for result in results.values()),
        failed,
        before,
        after,
        *rates(pairs, frame_name),
    )


@dataclass(frozen=True)
class _Work:
    """What is done to one video."""

    encoding: Encoding
    out: Path
    names: dict[Part, str]
    frame_name: str

    def copy_of(self, record: VideoRecord) -> Path:
        """Where its encoded copy stands; until it is packed, if it is."""
        folder = self.out / _COPIES if self.encoding.shard_videos else self.out
        return folder / self.names[record.part]

    def encode(self, record: VideoRecord) -> bool | str:
        """True: written; False: found complete; or why it cannot be.

        Raises:
            OSError: the disk of the copies is full, or cannot be written.
        """
        target = self.copy_of(record)
        try:
            made_of = _stamp_in(target) if target.exists() else ""
            try:
                stamp = stamp_of(record)
            except FileNotFoundError:
                if made_of:  # the copy is all that is left
                    return False
                raise
            if made_of == stamp:
                return False
            _encode(record, target, self.encoding, self.frame_name, stamp)
            return True
        except OSError as error:
            if error.errno in _CANNOT_WRITE:
                raise
            return why(error)
        except MediaError as error:
            return error.problem

    def pack(self, video: Named) -> Record | str:
        """The video as it will stand in a shard, or why it cannot."""
        name, record = video
        try:
            if self.encoding.codec == "copy":
                info = probe_record(record, self.frame_name)
                content = make_record(name, record.path, info)
                return _damage(record, self.frame_name) or content
            outcome = self.encode(record)
            if isinstance(outcome, str):
                return outcome
            copy = self.copy_of(record)
            return make_record(name, copy, probe(copy))
        except MediaError as error:
            return error.problem


def _remove_empty(folder: Path) -> None:
    """A folder and those in it, unless there is a file."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _groups(
    records: Sequence[VideoRecord], out: Path, encoding: Encoding
) -> dict[Path, Sequence[VideoRecord]]:
    """Shard -> what is packed into it."""
    count = encoding.shard_videos
    starts = range(0, len(records), count) if count else range(0)
    return {
        out / f"{number:05d}{SHARD_SUFFIX}": records[first : first + count]
        for number, first in enumerate(starts)
    }


def _names(records: Sequence[VideoRecord], encoding: Encoding) -> dict[Part, str]:
    """The name of each copy, relative."""
    names: dict[Part, str] = {}
    owners: dict[str, str] = {}
    starts = Counter((record.name, record.offset) for record in records)
    for record in records:
        refuse_unlistable(record.name)
        listed = PurePosixPath(record.name)
        if listed.is_absolute() or ".." in listed.parts:
            raise DataError(f"{record.name}: expected a path below the root; copies keep it.")
        if media_file(record.path) != record.path:
            raise DataError(f"{record.name}: is packed already; prepare copies from the originals.")
        stem = listed if record.path.is_dir() else listed.with_suffix("")
        suffix = _ENCODERS[encoding.codec][1] if encoding.codec in _ENCODERS else ""
        if encoding.codec == "copy" and not record.path.is_dir():
            suffix = listed.suffix
        numbers = [record.offset] if record.offset else []
        if starts[record.name, record.offset] > 1:  # as many frames as another list has of it
            numbers = [record.offset, record.num_frames]
        name = f"{stem}{''.join(f'_{number}' for number in numbers)}{suffix}"
        if name in owners:
            problem = f"'{owners[name]}' and '{record.name}' would both become {name}"
            kept = "" if encoding.codec == "copy" else ", or keep both names: --codec copy --shards"
            raise DataError(f"{problem}; rename one, in its list too{kept}.")
        owners[name] = record.name
        names[record.part] = name
    return names


def _stamp_in(copy: Path) -> str:
    """Of the original that a copy was made from; "" = not known."""
    try:
        with open_video(copy) as container:
            tags: dict[str, str] = {k.lower(): text for k, text in container.metadata.items()}
    except MediaError:
        return ""
    return tags.get("comment", "")


def _encode(
    record: VideoRecord, target: Path, encoding: Encoding, frame_name: str, stamp: str
) -> None:
    """Write one copy and verify it: frames counted, keyframes near enough, every frame decoded."""
    import av

    info = probe_record(record, frame_name)
    encoder, suffix, options = _ENCODERS[encoding.codec]
    gop = str(encoding.gop)
    options = options | {"g": gop, "keyint_min": gop, "crf": str(encoding.quality), "threads": "1"}
    short = min(encoding.short_side, info.width, info.height) // 2 * 2
    scale = short / min(info.width, info.height)
    width, height = (max(2, 2 * round(side * scale / 2)) for side in (info.width, info.height))
    partial = target.with_name(f"{target.stem}.part-{suffix}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(partial), "w") as output:
            output.metadata["comment"] = stamp
            rate, frames = _source(record, info)
            stream: Any = output.add_stream(encoder, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            # BT.601: DALI converts every stream so (on a GPU).
            stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
            for index, frame in enumerate(frames):
                scaled = frame.reformat(
                    width,
                    height,
                    format="yuv420p",
                    dst_colorspace="ITU601",
                    dst_color_range="MPEG",
                    interpolation="AREA" if scale < 1 else "BICUBIC",
                    threads=1,
                )
                scaled.pts, scaled.time_base = index, 1 / rate
                scaled.pict_type = 0  # the encoder decides, not the original
                output.mux(stream.encode(scaled))
            output.mux(stream.encode(None))
        _verify(record, partial, info.num_frames, encoding)
        put_in_place(partial, target)
    except av.FFmpegError as error:
        code = getattr(error, "errno", 0)
        if code in _CANNOT_WRITE:
            raise OSError(code, os.strerror(code)) from error
        raise MediaError(record.path, f"cannot be encoded: {why(error)}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _source(record: VideoRecord, info: MediaInfo) -> tuple[Fraction, Iterator[Any]]:
    """(frames per second, the frames) of an original."""
    if info.kind.frame_name:
        return Fraction(_FRAMES_PER_S), _folder_frames(record, info)
    with open_video(record.path) as container:
        rate = container.streams.video[0].average_rate
    return Fraction(rate or _FRAMES_PER_S).limit_denominator(1001), _file_frames(record.path)


def _file_frames(path: Path) -> Iterator[Any]:
    import av

    with open_video(path) as container:
        container.streams.video[0].thread_type = "NONE"
        try:
            yield from container.decode(video=0)
        except av.FFmpegError as error:
            raise MediaError(path, f"cannot be decoded: {why(error)}.") from error


def _folder_frames(record: VideoRecord, info: MediaInfo) -> Iterator[Any]:
    import av

    for index in range(info.num_frames):
        (pixels,) = read_images(record.path, info, [index])
        yield av.VideoFrame.from_ndarray(pixels, format="rgb24")


def _verify(record: VideoRecord, copy: Path, num_frames: int, encoding: Encoding) -> None:
    info = probe(copy)
    if info.num_frames != num_frames:
        problem = f"expected {num_frames} frames in the copy, got {info.num_frames}."
        raise MediaError(record.path, problem)
    table = info.packets
    ends = [*table.ranks[table.keyframes].tolist(), num_frames] if table else []
    gap = max((b - a for a, b in itertools.pairwise(ends)), default=num_frames)
    if gap > encoding.gop:
        raise MediaError(record.path, f"expected keyframes every {encoding.gop} frames, got {gap}.")
    if damage := _damage(VideoRecord(copy.name, copy, 0), ""):
        raise MediaError(record.path, f"the copy is damaged: {damage}")


def _damage(record: VideoRecord, frame_name: str) -> str | None:
    """Why a video that was decoded whole cannot be used, or None."""
    for finding in check_video(record, frame_name):
        if finding.fatal and "black" not in finding.reason:  # a dark ending is the original's
            return f"{finding.reason}."
    return None
