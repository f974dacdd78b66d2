"""The recipe section `detection`: what a run that trains a detector sees and builds."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from accel.models.amtnet import StreamFusion
from pipelines.microtube_loader import Augmentation, MicrotubeView, PixelBackend
from pipelines.microtubes import TRAIN_GAPS
from pipelines.tube_data import DetectionSet, Stream

Network = Literal["none", "amtnet", "ssd300"]


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Detection of actions in space and time; `network` "none": the run is a classification."""

    network: Network = "none"
    """none (classification) | amtnet (micro-tubes) | ssd300 (single frames)."""
    dataset: DetectionSet = "moving_objects"
    """Layout and classes below data.root; moving_objects with an empty data.root is generated."""
    split: int = 1
    """Number of the training list, >= 1."""
    num_frames: int = 2
    """T, frames of a micro-tube, >= 1; ssd300: 1."""
    gap: int = 0
    """Frames skipped between two frames of a micro-tube, >= 0; 20 = 0, 1, 3 and 7 in turn."""
    stream: Stream = "rgb"
    """Images of the base stream."""
    stack: int = 1
    """Images that stand for one frame of it, >= 1 (published flow: 5)."""
    extra_stream: Stream = "brox"
    """Images of the second stream, if fusion is not none."""
    extra_stack: int = 5
    """Images that stand for one frame of it, >= 1."""
    fusion: StreamFusion = "none"
    """none (one stream) | sum | mean | cat."""
    size: int = 300
    """Pixels of a side of the network's input."""
    width: int = 64
    """Channels of the first layers, >= 1; published: 64."""
    levels: int = 6
    """Feature maps, 2..6; published: 6."""
    prior_scale: float = 1.0
    """Prior boxes are so many times as large as the published ones, > 0: fewer maps have smaller
    boxes, which would match nothing."""
    batch_norm: bool = False
    """Norms in the trunks, for training from random weights; published networks have none."""
    pixel_scale: float = 1.0
    """Bytes minus means are divided by it, > 0. Published weights: 1; from random weights: 64."""
    augmentation: Augmentation = "ssd"
    """ssd (colors, expansion, crop, mirror) | mirror | none."""
    pixels: PixelBackend = "numpy"
    """numpy (Pillow and NumPy) | dali (one graph decodes and augments; for augmentation ssd). They
    are equal but for rounding."""
    start_base: str = ""
    """Checkpoint from which the trunk starts: ROAD's SSD or AMTNet ("": random)."""
    start_extra: str = ""
    """Checkpoint from which the second stream's trunk starts."""
    score_threshold: float = 0.001
    """Evaluation: scores of boxes that are linked are larger."""
    linking: Literal["frames", "microtubes"] = "frames"
    """Evaluation: frames (published: for each frame the first box of the micro-tube that begins
    there) | microtubes (ours: micro-tube behind micro-tube, each with all of its boxes)."""
    change_cost: float = 5.0
    """Evaluation: cost of a change of label in a tube (alpha), >= 0; published results: 5."""

    def __post_init__(self) -> None:
        least = {"split": 1, "num_frames": 1, "gap": 0, "stack": 1, "extra_stack": 1, "width": 1}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise ValueError(f"detection.{key}: must be >= {low}, got {getattr(self, key)}.")
        if not 2 <= self.levels <= 6:
            raise ValueError(f"detection.levels: must be in 2..6, got {self.levels}.")
        if self.prior_scale <= 0:
            raise ValueError(f"detection.prior_scale: must be > 0, got {self.prior_scale}.")
        if self.pixel_scale <= 0:
            raise ValueError(f"detection.pixel_scale: must be > 0, got {self.pixel_scale}.")
        if self.change_cost < 0:
            raise ValueError(f"detection.change_cost: must be >= 0, got {self.change_cost}.")
        if self.network == "ssd300" and (self.num_frames != 1 or self.fusion != "none"):
            raise ValueError(
                "detection.network: ssd300 takes detection.num_frames 1 and detection.fusion none, "
                f"got {self.num_frames} and {self.fusion}."
            )
        if self.fusion not in get_args(StreamFusion):
            raise ValueError(f"detection.fusion: got {self.fusion!r}.")

    @property
    def least_frames(self) -> int:
        """Frames that a video needs: a micro-tube, and a stack of each stream."""
        gap = max(TRAIN_GAPS) if self.gap == 20 else self.gap
        extra = self.extra_stack if self.fusion != "none" else 0
        return max((self.num_frames - 1) * (gap + 1) + 1, self.stack, extra)

    @property
    def view(self) -> MicrotubeView:
        """What of a micro-tube the network sees in training."""
        streams: tuple[tuple[Stream, int], ...] = ((self.stream, self.stack),)
        if self.fusion != "none":
            streams += ((self.extra_stream, self.extra_stack),)
        return MicrotubeView(
            streams=streams,
            size=self.size,
            augmentation=self.augmentation,
            pixels=self.pixels,
        )

    @property
    def network_options(self) -> dict[str, Any]:
        """Arguments of `build_detector` besides name and classes."""
        common: dict[str, Any] = {
            "input_frames": self.stack,
            "width": self.width,
            "levels": self.levels,
            "batch_norm": self.batch_norm,
        }
        if self.network == "ssd300":
            return common
        extra = self.extra_stack if self.fusion != "none" else 0
        options: dict[str, Any] = {
            **common,
            "num_frames": self.num_frames,
            "fusion": self.fusion,
            "extra_frames": extra,
        }
        return options
