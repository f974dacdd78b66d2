"""Annotated tubes of UCF24 and JHMDB21: reading them safely, checking every box."""

import json
import pickle
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import AnnotationError, DataError

UCF24_CLASSES = (
    "Basketball BasketballDunk Biking CliffDiving CricketBowling Diving Fencing FloorGymnastics "
    "GolfSwing HorseRiding IceDancing LongJump PoleVault RopeClimbing SalsaSpin SkateBoarding "
    "Skiing Skijet SoccerJuggling Surfing TennisSwing TrampolineJumping VolleyballSpiking "
    "WalkingWithDog"
).split()
JHMDB21_CLASSES = (
    "brush_hair catch clap climb_stairs golf jump kick_ball pick pour pullup push run shoot_ball "
    "shoot_bow shoot_gun sit stand swing_baseball throw walk wave"
).split()

MAX_BYTES = 500_000_000
_ARRAY_MAKERS = {
    (module, name)
    for package in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    for module, name in (
        (package, "_reconstruct"),
        (package, "scalar"),
        (package, "ndarray"),
        (package, "dtype"),
    )
} | {("_codecs", "encode"), ("builtins", "bytes"), ("__builtin__", "bytes")}


@dataclass(frozen=True)
class TubeAnnotation:
    """One annotated action: boxes in successive frames."""

    label: int
    """Class, 0-based."""

    start: int
    """First frame, 0-based."""

    boxes_xywh: np.ndarray
    """[n, 4] float32: left, top, width, height, pixels, as annotated."""

    @property
    def end(self) -> int:
        """Frame behind the last one."""
        return self.start + len(self.boxes_xywh)


@dataclass(frozen=True)
class VideoAnnotation:
    """The annotated actions of one video."""

    name: str
    """`<class>/<video>`, its folder below the images."""

    num_frames: int
    tubes: tuple[TubeAnnotation, ...]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain containers and NumPy arrays, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_MAKERS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def read_tubes(
    path: Path,
    *,
    num_classes: int = 0,
    denied: Container[str] = (),
    problems: dict[str, DataError] | None = None,
) -> dict[str, VideoAnnotation]:
    """The annotated videos of a `pyannot.pkl`, or of a JSON file of the same structure, by name.

    A dict from video to `numf`, `label` and `annotations`, each with `label` (0-based), `sf` (first
    frame, 0-based), `ef` (exclusive) and `boxes` (JSON: also `boxes_xywh`) of x, y, w, h in pixels.

    Args:
        path: the file; a pickle may hold containers, numbers and NumPy arrays only.
        num_classes: labels must be below; 0: not checked.
        denied: names of videos that are not looked at.
        problems: takes the errors of single videos, which are left out then, instead of raising.

    Raises:
        AnnotationError: the file cannot be read or is refused, or the first video, tube and frame
            that cannot be used: a length that does not fit, a box that is not finite, empty or
            inverted, a label or a frame out of range. With the line of the video, if it is JSON.
    """
    content = _content(path)
    if not isinstance(content, Mapping) or not content:
        raise AnnotationError(path, "expected a dict from video names to annotations.")
    videos = {}
    for name in sorted(map(str, content)):
        if name in denied:
            continue
        try:
            videos[name] = _video(path, name, content[name], num_classes)
        except AnnotationError as error:
            found = AnnotationError(path, error.problem, _line(path, name))
            if problems is None:
                raise found from error
            problems[name] = found
    return videos


def _line(path: Path, name: str) -> int | None:
    """Where a JSON file names a video; a pickle has no lines."""
    if path.suffix != ".json":
        return None
    text = path.read_text(encoding="utf-8")
    return text.count("\n", 0, max(text.find(json.dumps(name)), 0)) + 1


def _content(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AnnotationError(path, f"is larger than {MAX_BYTES} bytes; is it an annotation?")
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        reason = error.strerror or str(error)
        raise AnnotationError(path, f"cannot be read: {reason}.") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(path, f"is no JSON: {error.msg}.", error.lineno) from error
    except pickle.UnpicklingError as error:
        raise AnnotationError(
            path, f"refused, because {error}; expected containers, numbers and NumPy arrays."
        ) from error
    except AnnotationError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise AnnotationError(path, f"is damaged: {type(error).__name__} on reading.") from error


def _video(path: Path, name: str, content: Any, num_classes: int) -> VideoAnnotation:
    where = f'video "{name}"'
    try:
        num_frames, tubes = int(content["numf"]), list(content["annotations"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{where}: expected numf and annotations, got {_short(content)}."
        raise AnnotationError(path, problem) from error
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise AnnotationError(path, f"{where}: expected a name below the image folder.")
    if num_frames < 1:
        raise AnnotationError(path, f"{where}: expected at least one frame, got {num_frames}.")
    read = [
        _tube(path, f"{where}, tube {i}", tube, num_frames, num_classes)
        for i, tube in enumerate(tubes)
    ]
    return VideoAnnotation(name, num_frames, tuple(read))


def _tube(
    path: Path, where: str, content: Any, num_frames: int, num_classes: int
) -> TubeAnnotation:
    try:
        label, start, end = (int(content[key]) for key in ("label", "sf", "ef"))
        raw = content["boxes_xywh"] if "boxes_xywh" in content else content["boxes"]
        # Parity: UCF24: most boxes are uint8, whose sums would wrap around.
        boxes = np.asarray(raw).astype(np.float32).reshape(-1, 4)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{where}: expected label, sf, ef and boxes [n, 4], got {_short(content)}."
        raise AnnotationError(path, problem) from error
    if len(boxes) != end - start or not len(boxes):
        raise AnnotationError(
            path, f"{where}: got {len(boxes)} boxes for the frames {start} to {end} (exclusive)."
        )
    if not 0 <= start < end <= num_frames:
        raise AnnotationError(
            path, f"{where}: frames {start} to {end} do not lie in a video of {num_frames}."
        )
    if label < 0 or (num_classes and label >= num_classes):
        limit = f"0 to {num_classes - 1}" if num_classes else "0 or more"
        raise AnnotationError(path, f"{where}: expected a label of {limit}, got {label}.")
    bad = ~np.isfinite(boxes).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise AnnotationError(
            path, f"{where}, frame {start + row}: the box {boxes[row].tolist()} is not finite."
        )
    bad = (boxes[:, 2:] <= 0).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise AnnotationError(
            path,
            f"{where}, frame {start + row}: the box {boxes[row].tolist()} (x, y, w, h) is empty or "
            "inverted; expected w > 0 and h > 0.",
        )
    return TubeAnnotation(label, start, boxes)


def read_video_list(path: Path, annotated: Container[str]) -> frozenset[str]:
    """The videos of a list file, one name per line without extension; blank lines are skipped.

    Raises:
        AnnotationError: the file cannot be read, is empty, or names a video without annotation.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(path, f"cannot be read: {error}.") from error
    names = set()
    for number, line in enumerate(lines, start=1):
        name = line.strip().removesuffix(".avi")
        if not name:
            continue
        if name not in annotated:
            raise AnnotationError(path, f"{name!r} has no annotation.", number)
        names.add(name)
    if not names:
        raise AnnotationError(path, "the list is empty; expected one video per line.")
    return frozenset(names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
