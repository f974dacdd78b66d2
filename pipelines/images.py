"""Folders of frames: what is in them, and their pixels through Pillow."""

import os
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.annotations import VideoRecord
from pipelines.errors import MediaError, why
from pipelines.media import MediaInfo, StreamKind
from pipelines.packets import media_file, read_packets

_NUMBERED = re.compile(r"(.*?)([0-9]+)(\.(?:jpe?g|png))", re.IGNORECASE)
_HEAD_BYTES = 65_536  # a JPEG may begin with a preview image
_READ_BYTES = 65_536  # more than most frames have
# What an image ends with, and where it is looked for: some writers append notes. One without is
# decoded here first, since DALI (2.4) may end the process when an image fails: it goes on decoding
# others on its threads with what the failed call has freed.
_END = {"jpeg": b"\xff\xd9", "png": b"IEND"}
_TAIL_BYTES = 4096


def find_frame_name(folder: Path) -> str:
    """The names of the numbered images in a folder, e.g. "img_{:05d}.jpg".

    Raises:
        MediaError: there are none.
    """
    matches = filter(None, map(_NUMBERED.fullmatch, sorted(_listed(folder))))
    first = next(matches, None)
    if first is None:
        problem = "expected numbered JPEG or PNG files, got none; pass --data.frame_name."
        raise MediaError(folder, problem)
    prefix, number, suffix = first.groups()
    prefix = prefix.replace("{", "{{").replace("}", "}}")
    return f"{prefix}{{:0{len(number)}d}}{suffix}"


def first_frame_name(videos: Iterable[VideoRecord]) -> str:
    """The names of the images in the first folder of a set that has some.

    Returns:
        "" = the set is of files, or nothing of it exists.

    Raises:
        MediaError: there are folders, none of which has numbered images.
    """
    problem: MediaError | None = None
    for record in videos:
        try:
            if record.path.is_dir():
                return find_frame_name(record.path)
            if media_file(record.path).is_file():
                break
        except MediaError as error:
            problem = problem or error
        except (OSError, ValueError):  # probing it says why
            continue
    if problem is not None:
        raise problem
    return ""


def probe_frames(record: VideoRecord, frame_name: str) -> MediaInfo:
    """What is in a folder of frames: its first frame is opened, its last one must exist.

    Without a listed number of frames, the numbers that follow one another are counted; they begin
    at 1, or at 0 where there is a frame of that number.

    Raises:
        MediaError: the folder or a frame is missing, or the first frame is not an image.
    """
    folder = record.path
    try:
        size_bytes = folder.stat().st_size
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {why(error)}; check the list and data.root."
        raise MediaError(folder, problem) from error
    if not folder.is_dir():
        problem = "expected a folder of frames, got a file; video lists are `<path> <label>`."
        raise MediaError(folder, problem)
    first = record.offset + 1
    num_frames = record.num_frames
    if not num_frames:
        present = set(_listed(folder))
        first = next((n for n in (0, 1) if frame_name.format(n) in present), first)
        while frame_name.format(first + num_frames) in present:
            num_frames += 1
    for number in (first, first + max(num_frames, 1) - 1):
        if not os.path.isfile(folder / frame_name.format(number)):
            names = _listed(folder)
            raise MediaError(
                folder,
                f"expected {num_frames or 'some'} frames from {frame_name.format(first)}, but "
                f"{frame_name.format(number)} is missing (the folder has {len(names)} files); "
                "correct the list or pass --data.frame_name.",
            )
    path = folder / frame_name.format(first)
    try:
        with path.open("rb") as handle:
            head = handle.read(_HEAD_BYTES)
    except OSError as error:
        raise MediaError(path, f"cannot be read: {why(error)}.") from error
    codec, width, height = image_header(path, head)
    kind = StreamKind(codec, "folder", "", 0, 2, True, False, frame_name)
    return MediaInfo(kind, width, height, num_frames, size_bytes, None, first)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise MediaError(folder, f"cannot be read: {why(error)}.") from error


def image_header(path: Path | str, head: bytes) -> tuple[str, int, int]:
    """("jpeg" or "png", width, height) from the first bytes of a file.

    Raises:
        MediaError: it is neither, or decoders do not agree on its colors.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24:
        return "png", *struct.unpack_from(">II", head, 16)
    place, adobe = 2, False
    while head.startswith(b"\xff\xd8") and place + 10 <= len(head) and head[place] == 0xFF:
        marker, length = struct.unpack_from(">xBH", head, place)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width, channels = struct.unpack_from(">HHB", head, place + 5)
            if channels == 4 and not adobe:  # DALI inverts it, Pillow does not
                problem = "a CMYK image that does not say whether it is inverted (no Adobe marker)"
                raise MediaError(path, f"expected an RGB or gray image, got {problem}; convert it.")
            return "jpeg", width, height
        adobe = adobe or marker == 0xEE
        place += 1 if marker == 0xFF else 2 + length
    got = "0 bytes" if not head else "other content"
    raise MediaError(path, f"expected a JPEG or PNG image, got {got}; copy or extract it again.")


def read_encoded(folder: Path, info: MediaInfo, frames: Sequence[int]) -> list[bytes]:
    """The files of these frames (0-based), of a folder or of its record in a shard.

    Raises:
        MediaError: one cannot be read, is no image, or has another size than the first frame.
    """
    paths = [f"{folder}/{info.kind.frame_name.format(info.first_number + k)}" for k in frames]
    if info.packets is not None:  # in a shard
        contents = read_packets(folder, info.packets, np.array(frames), info.size_bytes)
    else:
        contents = [_content(path) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        codec, width, height = image_header(path, content)
        if _END[codec] not in content[-_TAIL_BYTES:]:
            _decoded(path, content)
        if (width, height) != (info.width, info.height):
            wanted = f"{info.width} x {info.height} px as in the first frame of the folder"
            raise MediaError(path, f"expected {wanted}, got {width} x {height}.")
    return contents


def _decoded(path: Path | str, content: bytes) -> npt.NDArray[np.uint8]:
    from io import BytesIO

    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=("JPEG", "PNG")) as image:
            return rgb_pixels(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(path, f"cannot be decoded: {error}; extract it again.") from error


def rgb_pixels(image: Any) -> npt.NDArray[np.uint8]:
    """[H, W, 3] of a Pillow image; 16-bit gray is scaled, where Pillow would clip it at 255."""
    if image.mode.startswith("I"):
        gray = (np.asarray(image, np.uint32) + 128) // 257
        return np.repeat(gray[..., None].astype(np.uint8), 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _content(path: str) -> bytes:
    """A file with as few calls as can be: each gives way to other threads that read or decode."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            content = os.read(handle, _READ_BYTES)
            if len(content) < _READ_BYTES:  # all of a regular file
                return content
            parts = [content]
            while parts[-1]:
                parts.append(os.read(handle, 1 << 20))
            return b"".join(parts)
        finally:
            os.close(handle)
    except OSError as error:
        raise MediaError(path, f"cannot be read: {why(error)}.") from error


def read_images(folder: Path, info: MediaInfo, frames: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The pixels of these frames (0-based), [F, H, W, 3] uint8 RGB.

    Raises:
        MediaError: one cannot be read or decoded, or has another size than the first frame.
    """
    pixels = np.empty((len(frames), info.height, info.width, 3), np.uint8)
    contents = read_encoded(folder, info, frames)
    for place, (frame, content) in enumerate(zip(frames, contents, strict=True)):
        path = folder / info.kind.frame_name.format(info.first_number + frame)
        pixels[place] = _decoded(path, content)
    return pixels
