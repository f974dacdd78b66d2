"""What is in a video file: its frames, their times and keyframes; of one file and of a set.

Frame counts in headers are not trusted: frames are counted from the packets, or by decoding where
packets and frames do not correspond. The result is cached, so an unchanged file is opened once.
"""

import hashlib
import json
import logging
import sys
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.cache import locked, replace_text
from pipelines.containers import find_damage
from pipelines.errors import DataError, MediaError

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of the cache file

# Demuxers that read one self-contained file (no playlists, no subtitles, no images, no text art).
_CONTAINERS = frozenset(
    "3g2 3gp asf avi flv ivf m4a matroska mj2 mov mp4 mpeg mpegts mxf ogg webm".split()
)
# Codecs with exactly one frame per packet in these containers, at the packet's time.
_ONE_FRAME_PER_PACKET = frozenset("av1 h264 hevc mjpeg prores vp9".split())
_DALI_CPU_CODECS = frozenset(("mjpeg", "vp8", "vp9"))


@dataclass(frozen=True)
class MediaInfo:
    """One verified video stream."""

    codec: str
    container: str
    pixel_format: str
    width: int
    height: int
    num_frames: int
    """Frames a decoder returns, >= 1."""

    pts: Sequence[int] | None
    """[num_frames] presentation times in the stream's own unit, ascending. None: times and frames
    do not correspond, so frames are counted from the start of the file."""

    keyframes: tuple[int, ...]
    """Frame indices a decoder can start from, ascending; empty with `pts` None."""

    size_bytes: int

    @property
    def dali_cpu_problem(self) -> str | None:
        """Why DALI cannot decode this file on the CPU, or None."""
        if self.codec not in _DALI_CPU_CODECS:
            return f"DALI does not decode {self.codec} on the CPU"
        if not {"matroska", "mp4", "avi"} & set(self.container.split(",")):
            return f"{self.codec} in the container {self.container}"
        if self.pixel_format not in ("yuv420p", "yuvj420p") or self.pts is None:
            return f"{self.codec} with {self.pixel_format} or irregular times"
        return None


def open_video(path: Path) -> Any:
    """The file as a PyAV container; every failure is a MediaError."""
    import av

    try:
        # Only this file: some demuxers follow references to others. Broken metadata is no damage.
        options = {"protocol_whitelist": "file"}
        container = av.open(str(path), metadata_errors="replace", options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, f"expected a video file, cannot open it: {error}.") from error
    if not _CONTAINERS & set(container.format.name.split(",")):
        container.close()
        problem = f"expected a video file, got the format '{container.format.name}'."
        raise MediaError(path, problem)
    return container


def probe(path: Path) -> MediaInfo:
    """Index one file.

    Raises:
        MediaError: missing, empty, no video, audio only, cut off, damaged, or without frames.
    """
    import av

    try:
        size_bytes = path.stat().st_size
        if not path.is_file():
            raise MediaError(path, "expected a video file, got a folder or device.")
        damage = find_damage(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            path, f"cannot be read: {reason}; check the list and data.root."
        ) from error
    if damage:
        raise MediaError(path, damage)
    with open_video(path) as container:
        if not container.streams.video:
            raise MediaError(path, "expected a video stream, got none (audio only?).")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None or codec.width <= 0 or codec.height <= 0:
            raise MediaError(path, "expected a decodable video stream, got an unknown codec.")
        name = codec.codec.canonical_name
        facts = (name, container.format.name, str(codec.pix_fmt), codec.width, codec.height)
        try:
            packets = [packet for packet in container.demux(stream) if packet.size]
        except av.FFmpegError as error:
            raise MediaError(path, f"the file is damaged: {error}; copy it again.") from error
    shown = [packet for packet in packets if not packet.is_discard]
    times = sorted(packet.pts for packet in shown if packet.pts is not None)
    regular = len(times) == len(shown) == len(set(times))
    plain = regular and name in _ONE_FRAME_PER_PACKET and "avi" not in facts[1].split(",")
    num_frames = len(shown)
    if not plain and packets:
        decoded = _decoded_times(path)
        num_frames = len(decoded)
        regular = regular and decoded == times
    if num_frames == 0:
        raise MediaError(path, "expected video frames, got none; remove the file from the list.")
    if not regular:
        return MediaInfo(*facts, num_frames, None, (), size_bytes)
    keys = {packet.pts for packet in shown if packet.is_keyframe}
    keyframes = tuple(index for index, time in enumerate(times) if time in keys)
    return MediaInfo(*facts, num_frames, _compact(times), keyframes, size_bytes)


def _compact(times: list[int]) -> Sequence[int]:
    """The same numbers in little memory: sets have 10^5 files of 10^2 frames."""
    if len(times) == 1:
        return range(times[0], times[0] + 1)
    regular = range(times[0], times[-1] + 1, times[1] - times[0])
    return regular if list(regular) == times else array("q", times)


def _decoded_times(path: Path) -> list[int | None]:
    """The time of each frame in the order a decoder returns them."""
    import av

    with open_video(path) as container:
        try:
            return [frame.pts for frame in container.decode(video=0)]
        except av.FFmpegError as error:
            raise MediaError(path, f"cannot be decoded: {error}; copy it again.") from error


def index_videos(
    paths: Sequence[Path], *, cache_dir: Path, threads: int, progress: bool = True
) -> list[MediaInfo]:
    """The index of every file, in order; from the cache where size and time are unchanged.

    Raises:
        MediaError: one file cannot be used.
        DataError: several cannot; the message counts them and names the first three.
    """
    cache_path = cache_dir / "media" / f"{_digest(paths)}.json"
    with locked(cache_path.with_suffix(".lock")):  # other ranks wait for the first one's work
        return _index(paths, cache_path, threads, progress)


def _index(
    paths: Sequence[Path], cache_path: Path, threads: int, progress: bool
) -> list[MediaInfo]:
    cached = _read_cache(cache_path)
    results: dict[Path, MediaInfo] = {}
    stamps: dict[Path, list[int]] = {}
    for path in dict.fromkeys(paths):
        try:
            stat = path.stat()
        except (OSError, ValueError):
            continue  # probe() says why
        stamps[path] = [stat.st_size, stat.st_mtime_ns]
        entry = cached.get(str(path))
        if entry and entry["stamp"] == stamps[path]:
            results[path] = _info_from_json(entry["info"])
    missing = [path for path in dict.fromkeys(paths) if path not in results]
    if missing:
        _LOG.info("indexing %d of %d video files", len(missing), len(paths))
        failures = _probe_all(missing, results, threads, progress)
        _write_cache(cache_path, results, stamps)
        _raise_failures(failures, len(paths))
    return [results[path] for path in paths]


def _probe_all(
    paths: list[Path], results: dict[Path, MediaInfo], threads: int, progress: bool
) -> list[MediaError]:
    failures = []

    def attempt(path: Path) -> MediaInfo | MediaError:
        try:
            return probe(path)
        except MediaError as error:
            return error

    hidden = not progress or not sys.stderr.isatty()
    with ThreadPoolExecutor(threads, thread_name_prefix="accel-index") as pool:
        outcomes = pool.map(attempt, paths)
        bar = tqdm(outcomes, total=len(paths), desc="indexing", unit="file", disable=hidden)
        for path, outcome in zip(paths, bar, strict=True):
            if isinstance(outcome, MediaError):
                failures.append(outcome)
            else:
                results[path] = outcome
    return failures


def _raise_failures(failures: list[MediaError], total: int) -> None:
    if len(failures) == 1:
        raise failures[0]
    if failures:
        named = " | ".join(str(failure) for failure in failures[:3])
        more = " | ..." if len(failures) > 3 else ""
        raise DataError(f"{len(failures)} of {total} videos cannot be used: {named}{more}")


def _digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256("\0".join(map(str, paths)).encode("utf-8", "surrogateescape")).hexdigest()


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            return {}
        entries: dict[str, Any] = content["entries"]
        for entry in entries.values():
            _info_from_json(entry["info"])
            entry["stamp"]
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s: ignoring an unreadable media index (%s)", path, error)
        return {}


def _write_cache(path: Path, results: dict[Path, MediaInfo], stamps: dict[Path, list[int]]) -> None:
    entries = {
        str(video): {"stamp": stamps[video], "info": _info_to_json(info)}
        for video, info in results.items()
    }
    content = json.dumps({"version": _VERSION, "entries": entries}, separators=(",", ":"))
    replace_text(path, content)


def _info_to_json(info: MediaInfo) -> dict[str, Any]:
    pts = info.pts
    times = [pts.start, pts.stop, pts.step] if isinstance(pts, range) else pts and list(pts)
    return {**vars(info), "pts": times, "regular": isinstance(pts, range)}


def _info_from_json(fields: dict[str, Any]) -> MediaInfo:
    fields = dict(fields)
    regular, pts = fields.pop("regular"), fields.pop("pts")
    times = None if pts is None else range(*pts) if regular else array("q", pts)
    return MediaInfo(**{**fields, "pts": times, "keyframes": tuple(fields["keyframes"])})
