"""The `model` section of a recipe."""

from dataclasses import dataclass
from typing import Literal, get_args

from accel.errors import ConfigError
from accel.models.norm import Implementation

ModelName = Literal["amsnet", "masnet", "msn", "tanet", "tdn", "tsm", "tsn"]
Depth = Literal[18, 34, 50, 101]
Stem = Literal["imagenet", "small"]
Temporal = Literal["auto", "tam", "none"]
Variant = Literal["2d", "snippet", "slowonly"]

_CHOICES = {
    "name": ModelName,
    "depth": Depth,
    "stem": Stem,
    "temporal": Temporal,
    "variant": Variant,
    "batch_norm": Implementation,
}
_FRAMES_PER_SEGMENT = {"tdn": 5, "msn": 5}  # others: 1, variant "snippet": 3
_VARIANTS = {"amsnet": get_args(Variant)}  # others: "2d" alone
# Systems that are a frame network plus one module per block, so that it can be left out.
_CAN_BE_PLAIN = ("tanet", "tsn", "tsm", "masnet")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Segments per clip come from `sampling`, the class count from `data`."""

    name: ModelName = "tanet"
    """Network: "tsn" (frames meet only in the final average); with a module in every block "tanet"
    (TAM), "tsm" (fixed shift) or "masnet" (motion and appearance); "tdn" and "msn" (differences of
    5 frames per segment); "amsnet" (competing temporal convolutions, a neck over two stages)."""

    variant: Variant = "2d"
    """amsnet: "2d" (one frame per segment), "snippet" (three) or "slowonly" (3-D); others: "2d"."""

    depth: Depth = 50
    """Layers of the ResNet: 18, 34 (basic blocks), 50, 101 (bottlenecks)."""

    width: int = 64
    """Channels of the stem, >= 4; every stage doubles it. Published networks: 64."""

    stages: int = 4
    """ResNet stages kept, 1..4. Published networks: 4."""

    stem: Stem = "imagenet"
    """First layers: "imagenet" (7x7 stride 2, max-pool stride 2) or "small" (3x3 stride 2)."""

    temporal: Temporal = "auto"
    """Temporal module: "auto" (the one of `name`), "tam" (the same as "auto", for tanet), or "none"
    (plain frames)."""

    faithful: bool = True
    """Whether quirks of the released code that are plain bugs stay, as published checkpoints and
    recipes have them; false: the corrected behaviour (docs/quirks.md)."""

    dropout: float = 0.5
    """Probability of dropping a pooled feature before the classifier, in [0, 1)."""

    batch_norm: Implementation = "auto"
    """What runs 2-D batch norm with the ReLU and shortcut that follow: "fused" (one operator of
    ours), "torch" (PyTorch's operations), or "auto" (what was measured to be faster)."""

    partial_bn: bool = False
    """Freeze every 2-D batch norm except the first (statistics and scale/shift)."""

    pretrained: str = ""
    """Checkpoint file to start from ("": random weights): ImageNet ResNet of torchvision, a
    published layout of the system, or our own. A classifier of another class count is left out."""

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            value, allowed = getattr(self, key), get_args(choices)
            if value not in allowed:
                raise ConfigError(f"model.{key}: got {value!r}, expected one of {list(allowed)}.")
        if self.width < 4:
            raise ConfigError(f"model.width: got {self.width}, expected an integer >= 4.")
        if not 1 <= self.stages <= 4:
            raise ConfigError(f"model.stages: got {self.stages}, expected an integer in 1..4.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout: got {self.dropout}, expected a number in [0, 1).")
        if self.temporal == "tam" and self.name != "tanet":
            raise ConfigError(
                f'model.temporal: got "tam" with model.name "{self.name}", which has no TAM. '
                'Use model.name "tanet", or leave model.temporal at "auto".'
            )
        if self.temporal == "none" and self.name not in _CAN_BE_PLAIN:
            raise ConfigError(
                f'model.temporal: got "none" with model.name "{self.name}", whose temporal parts '
                "cannot be left out. Use one of "
                f"{', '.join(n for n in _CAN_BE_PLAIN if n in get_args(ModelName))}."
            )
        allowed = variants(self.name, self.depth)
        if self.variant not in allowed:
            raise ConfigError(
                f'model.variant: got "{self.variant}" with model.name "{self.name}" and depth '
                f"{self.depth}, expected one of {list(allowed)}."
            )

    @property
    def has_temporal(self) -> bool:
        """Whether the blocks hold the system's temporal module."""
        return self.temporal != "none" and self.name != "tsn"

    @property
    def frames_per_segment(self) -> int:
        """L, frames of one segment that the network sees stacked in its input channels."""
        return 3 if self.variant == "snippet" else _FRAMES_PER_SEGMENT.get(self.name, 1)


def variants(name: ModelName, depth: int) -> tuple[str, ...]:
    """The variants of a network with a ResNet of this depth."""
    published = _VARIANTS.get(name, ("2d",))
    # SlowOnly puts time into the first 1x1 convolutions of bottlenecks.
    return tuple(v for v in published if v != "slowonly" or depth >= 50)
