"""Configuration sections owned by the data pipelines: `data`, `sampling`, `augment`, `loader`."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal


def _check(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{key}: expected {expected}, got {got!r}.")


def _check_rgb(key: str, values: Sequence[float], *, positive: bool) -> None:
    low = 0.0 < min(values, default=0.0) if positive else 0.0 <= min(values, default=0.0)
    finite = len(values) == 3 and all(math.isfinite(value) for value in values)
    bounds = "(0, 1]" if positive else "[0, 1]"
    expected = f"three numbers (R, G, B) in {bounds}"
    _check(finite and low and max(values) <= 1.0, key, expected, list(values))


def _check_frame_name(template: str) -> None:
    try:
        names = [template.format(number) for number in (1, 2)]
    except (ValueError, IndexError, KeyError, AttributeError):
        names = []
    good = len(set(names)) == 2 and not any("/" in name or "\0" in name for name in names)
    _check(good, "data.frame_name", 'a file name with one number, e.g. "{:05d}.jpg"', template)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the videos are, what their labels are, and how pixels are normalized."""

    root: str = ""
    """Folder of the videos. With empty lists it holds class folders: `<class>/<clip>`, or
    `train/<class>/<clip>` and `val/<class>/<clip>`; a clip is a video file or a folder of frames.
    "" = unset."""

    kind: Literal["auto", "videos", "frames"] = "auto"
    """Video files, or folders of frames (JPEG or PNG). "auto" = by the columns of the lists
    (`<path> <label>`, or `<folder> <frames> <label>`), or by what class folders hold."""

    frame_name: str = ""
    """Names of the files in a folder of frames, e.g. "img_{:05d}.jpg". "" = as in the set's first
    folder."""

    generate: Literal["none", "motion8"] = "none"
    """"motion8" = write (once, into the cache) and use the generated eight-motion set; `root` and
    the lists must then be empty."""

    train_list: str = ""
    """Text file with one `<path> <label>`, `<folder> <frames> <label>` or `<folder> <offset>
    <frames> <label>` per line (`offset` is added to the frame numbers, which begin at 1); relative
    to `root`, or absolute. "" = class folders."""

    val_list: str = ""
    """As `train_list`, for validation. Both lists are given, or neither."""

    num_classes: int = 0
    """Number of classes; 0 = number of lines of `classes_file`, else of class folders, else the
    largest label of the training list plus one."""

    classes_file: str = ""
    """Text file with one class name per line, line k (0-based) = label k; relative to `root`, or
    absolute. "" = none."""

    val_fraction: float = 0.2
    """Share of each class (0..1, both excluded) that is held out for validation when class folders
    come without `train/` and `val/`. The choice depends on file names only."""

    deny_list: str = ""
    """File with `<path><tab><reason>` lines (written by `accel data check`, or by hand; lines that
    begin with # are comments): these training videos are left out, and counted; a validation video
    in it is refused, because every one counts. Relative to `root`, or absolute. "" = none."""

    max_bad_fraction: float = 0.001
    """Share of a split's videos (0..1) that may be unusable: in training another one stands in for
    each, in evaluation it counts as wrong; all are named. Ten videos are tolerated too where they
    are no more than a tenth of the split. More end the run. 0 = none."""

    allow_outside_root: bool = False
    """Permit absolute paths and `..` in lists that lead out of `root`."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of R, G, B on the scale 0..1, subtracted by the engine on the device."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of R, G, B on the scale 0..1."""

    cache_dir: str = ""
    """Folder for generated sets and media indices. "" = $ACCEL_CACHE, else $XDG_CACHE_HOME/accel,
    else ~/.cache/accel."""

    def __post_init__(self) -> None:
        _check(self.num_classes >= 0, "data.num_classes", "an integer >= 0", self.num_classes)
        _check(0 < self.val_fraction < 1, "data.val_fraction", "0 < x < 1", self.val_fraction)
        share = self.max_bad_fraction
        _check(0 <= share <= 1, "data.max_bad_fraction", "0 <= x <= 1", share)
        _check_rgb("data.mean", self.mean, positive=False)
        _check_rgb("data.std", self.std, positive=True)
        if self.frame_name:
            _check_frame_name(self.frame_name)
        if bool(self.train_list) != bool(self.val_list):
            missing = "data.val_list" if self.train_list else "data.train_list"
            raise ValueError(f"{missing}: expected a file, got ''; give both lists, or neither.")
        if self.generate != "none":
            for key in ("root", "train_list", "val_list", "classes_file"):
                value = getattr(self, key)
                expected = f"'' with data.generate={self.generate}"
                _check(value == "", f"data.{key}", expected, value)

    def resolved_cache_dir(self) -> Path:
        """The cache folder after the defaults of `cache_dir`; not created here."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        if accel_cache := os.environ.get("ACCEL_CACHE"):
            return Path(accel_cache).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "accel"


SamplingKind = Literal["segments", "dense", "clip", "neighbors", "snippets"]
ONE_FRAME_KINDS = ("segments", "dense", "clip")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which frames of a video are used."""

    num_segments: int = 8
    """Places per clip (T), >= 1. Training: one random place in each of T equal segments;
    validation: the middle of each (snippets: its start). "dense" and "clip": frames per clip."""

    kind: Literal["auto", SamplingKind] = "auto"
    """What is read: "segments" (one frame at each place: TSN, TANet, MAS-Net, AMS-Net), "neighbors"
    (consecutive frames, for differences: TDN, MSN), "snippets" (AMS-Net's rule for consecutive
    frames), "dense" (T frames over 64 consecutive ones: TANet on Kinetics) or "clip" (T frames
    `frame_interval` apart: AMS-Net's SlowOnly). "auto" = what the model needs, else "segments"."""

    frames_per_segment: int = 0
    """Frames read at each place (L), 0..32: 1 for "segments", "dense" and "clip", 5 for TDN and
    MSN, 3 for AMS-Net's snippets; 0 = what the model needs."""

    frame_interval: int = 1
    """"clip": frames from one to the next, 1..64 (1 = consecutive)."""

    short_videos: Literal["error", "first_frame", "spread"] = "error"
    """Video with fewer frames than `num_segments`: refuse it, or do what published code does:
    "first_frame" = T times its first frame (with its L - 1 successors, for "neighbors"), "spread" =
    frames spread over it, some repeated (mmaction: TANet's published rows, AMS-Net). With "dense"
    and "clip" both begin anew at the end; "snippets" are spread by both."""

    two_clips: Literal["twice", "shifted"] = "twice"
    """Two test clips of "segments": middles and starts of the segments, or evenly shifted segments
    (TAM's "uniform-2")."""

    def __post_init__(self) -> None:
        _check(self.num_segments >= 1, "sampling.num_segments", ">= 1", self.num_segments)
        length = self.frames_per_segment
        _check(0 <= length <= 32, "sampling.frames_per_segment", "0..32", length)
        if self.kind != "auto" and length:
            _check(
                (length == 1) == (self.kind in ONE_FRAME_KINDS),
                "sampling.frames_per_segment",
                '1 with sampling.kind "segments", "dense" or "clip", more with the others',
                length,
            )
        interval = self.frame_interval
        _check(1 <= interval <= 64, "sampling.frame_interval", "1..64", interval)
        _check(
            interval == 1 or self.kind == "clip",
            "sampling.frame_interval",
            '1 unless sampling.kind is "clip"',
            interval,
        )
        _check(
            self.kind != "dense" or self.num_segments <= 64,
            "sampling.num_segments",
            '1..64 with sampling.kind "dense"',
            self.num_segments,
        )

    def resolved(self, kind: SamplingKind, frames_per_segment: int) -> "SamplingConfig":
        """These settings with "auto" and 0 replaced by what a model needs.

        The pipelines know no models: unless resolved, "auto" is "segments" to them.

        Raises:
            ValueError: a value that was given differs from what the model needs.
        """
        for key, needed, automatic in (
            ("kind", kind, "auto"),
            ("frames_per_segment", frames_per_segment, 0),
        ):
            given = getattr(self, key)
            expected = f"{needed!r}, which the model needs (or {automatic!r})"
            fits = given in (needed, automatic) or (
                kind == "segments" and key == "kind" and given in ONE_FRAME_KINDS
            )
            _check(fits, f"sampling.{key}", expected, given)
        chosen = kind if self.kind == "auto" else self.kind
        return replace(self, kind=chosen, frames_per_segment=frames_per_segment)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Crop, scale, flip and color. Crop and flip are drawn once per clip."""

    size: int = 224
    """Height and width of the clips, px, >= 8."""

    crop: Literal["multiscale", "random_resized", "center"] = "multiscale"
    """Training crop, scaled to `size`. "multiscale": one of the `scales` at one of 13 places (TSN).
    "random_resized": an area of `crop_area` with an aspect of `crop_aspect` at a random place
    (AMS-Net). "center": as in validation."""

    train_resize: int = 0
    """Training: the short side becomes this many px before the random crop (mmaction: 256); 0 =
    crop from the original frame."""

    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Crop sides of "multiscale" as shares of the frame's short side, each in (0, 1], descending;
    width and height may differ by one step."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """"random_resized": smallest and largest share of the frame's area, in (0, 1]."""

    crop_aspect: tuple[float, float] = (0.75, 1.3333333333333333)
    """"random_resized": smallest and largest width / height, log-uniform between."""

    resize: int = 256
    """Validation: the short side becomes this many px, then the center `size` x `size` is cut out.
    0 = the short side becomes `size`. Otherwise >= `size`."""

    flip: bool = True
    """Mirror each training clip with probability 1/2. Must be false where left and right make the
    class, unless `flip_label_pairs` exchanges the labels."""

    flip_label_pairs: tuple[str, ...] = ()
    """Labels exchanged when a clip is mirrored, each pair as "a-b", e.g. ["86-87", "93-94"]."""

    antialias: bool = True
    """Low-pass filter before shrinking (PIL's bilinear rule). false = two taps per axis (OpenCV's
    rule)."""

    convention: Literal["tsm", "mmaction"] = "tsm"
    """Whose rounding of scaled sides and crop places: "tsm" (torchvision on PIL images: TAM,
    MAS-Net, TDN, MSN) or "mmaction" (TANet's published rows, AMS-Net)."""

    color_jitter: Literal["none", "amsnet"] = "none"
    """Training: "amsnet" = brightness, contrast, saturation, hue and PCA offset, amounts drawn once
    per clip, and for each frame whether each part is applied."""

    def __post_init__(self) -> None:
        _check(self.size >= 8, "augment.size", "an integer >= 8 (px)", self.size)
        _check(
            self.resize == 0 or self.resize >= self.size,
            "augment.resize",
            f"0 or at least augment.size = {self.size} (px)",
            self.resize,
        )
        descending = all(a >= b for a, b in zip(self.scales, self.scales[1:], strict=False))
        _check(
            len(self.scales) > 0 and descending and all(0 < scale <= 1 for scale in self.scales),
            "augment.scales",
            "one or more numbers in (0, 1], descending",
            list(self.scales),
        )
        _check(self.train_resize >= 0, "augment.train_resize", ">= 0 (px)", self.train_resize)
        low, high = self.crop_area
        _check(0 < low <= high <= 1, "augment.crop_area", "0 < low <= high <= 1", [low, high])
        low, high = self.crop_aspect
        _check(0 < low <= high, "augment.crop_aspect", "0 < low <= high", [low, high])
        label_pairs(self.flip_label_pairs)


@dataclass(frozen=True, kw_only=True)
class TestViews:
    """What an evaluation reads of every video: `num_clips` x `num_crops` views."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    num_clips: int = 1
    """Clips over time; which frames they are is the rule of `sampling.kind`."""

    num_crops: Literal[1, 3, 10] = 1
    """Squares of each frame: the center, both ends and the middle, or corners, center and their
    mirror images."""

    size: int = 0
    """Side of the squares, px; 0 = augment.size."""


def label_pairs(pairs: Sequence[str]) -> dict[int, int]:
    """The label each label becomes under a flip, both directions of every pair "a-b"."""
    swapped: dict[int, int] = {}
    for pair in pairs:
        left, _, right = pair.partition("-")
        valid = left.isdecimal() and right.isdecimal() and left.isascii() and right.isascii()
        key = "augment.flip_label_pairs"
        _check(valid and int(left) != int(right), key, 'pairs of labels as "a-b"', pair)
        for a, b in ((int(left), int(right)), (int(right), int(left))):
            _check(a not in swapped, key, "each label in one pair only", pair)
            swapped[a] = b
    return swapped


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How the clips are decoded and how far ahead."""

    decoder: Literal["auto", "dali", "dali_gpu", "pyav"] = "auto"
    """"dali": DALI decodes on the CPU (VP8, VP9, MJPEG, folders of frames). "dali_gpu": DALI
    decodes on the GPU (NVDEC, nvJPEG). "pyav": PyAV decodes (every codec of FFmpeg; Pillow for
    folders) and DALI scales where installed. "auto": what can decode every file of the split; with
    64 videos and more the fastest, measured when a run starts and remembered. An evaluation of a
    run decodes as the run did."""

    threads: int = 0
    """Threads that decode, per process; 0 = the CPU cores of this process divided by the number of
    processes of the run on this machine ($LOCAL_WORLD_SIZE)."""

    prefetch: int = 2
    """Finished micro-batches kept ready ahead of the training step, >= 1."""

    timeout_s: float = 300.0
    """Longest wait for one micro-batch, seconds, before the run ends with an error."""

    def __post_init__(self) -> None:
        _check(0 <= self.threads <= 1024, "loader.threads", "0..1024", self.threads)
        _check(1 <= self.prefetch <= 64, "loader.prefetch", "1..64", self.prefetch)
        finite = math.isfinite(self.timeout_s) and self.timeout_s > 0
        _check(finite, "loader.timeout_s", "a number of seconds > 0", self.timeout_s)

    def resolved_threads(self) -> int:
        """The number of decoding threads after the default of `threads`, >= 1."""
        if self.threads:
            return self.threads
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        local_world = os.environ.get("LOCAL_WORLD_SIZE", "1")
        processes = int(local_world) if local_world.isdecimal() else 1
        return max(1, cores // max(1, processes))
