"""The models by name, and the `model` section of a recipe."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from accel.errors import ConfigError
from accel.models.network import ClipNetwork
from accel.models.tanet import tanet
from accel.models.weights import import_weights

ModelName = Literal["tanet", "tsn"]
Depth = Literal[18, 34, 50, 101]
Stem = Literal["imagenet", "small"]
Temporal = Literal["auto", "tam", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Segments per clip come from `sampling`, the class count from `data`."""

    name: ModelName = "tanet"
    """Network: "tanet" (TAM in every block) or "tsn" (frames meet only in the final average)."""

    depth: Depth = 50
    """Layers of the ResNet: 18, 34 (basic blocks), 50, 101 (bottlenecks)."""

    width: int = 64
    """Channels of the stem, >= 4; every stage doubles it. Published networks: 64."""

    stages: int = 4
    """ResNet stages kept, 1..4. Published networks: 4."""

    stem: Stem = "imagenet"
    """First layers: "imagenet" (7x7 stride 2, max-pool stride 2) or "small" (3x3 stride 2)."""

    temporal: Temporal = "auto"
    """Temporal module: "auto" (the one of `name`), "tam", or "none" (plain frames)."""

    dropout: float = 0.5
    """Probability of dropping a pooled feature before the classifier, in [0, 1)."""

    partial_bn: bool = False
    """Freeze every 2-D batch norm except the first (statistics and scale/shift)."""

    pretrained: str = ""
    """Checkpoint file to start from ("": random weights): ImageNet ResNet of torchvision, TANet of
    its authors or of mmaction2, or our own. A classifier of another class count is left out."""

    def __post_init__(self) -> None:
        for key, choices in (
            ("name", ModelName),
            ("depth", Depth),
            ("stem", Stem),
            ("temporal", Temporal),
        ):
            value, allowed = getattr(self, key), get_args(choices)
            if value not in allowed:
                raise ConfigError(f"model.{key}: got {value!r}, expected one of {list(allowed)}.")
        if self.width < 4:
            raise ConfigError(f"model.width: got {self.width}, expected an integer >= 4.")
        if not 1 <= self.stages <= 4:
            raise ConfigError(f"model.stages: got {self.stages}, expected an integer in 1..4.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout: got {self.dropout}, expected a number in [0, 1).")
        if self.name == "tsn" and self.temporal == "tam":
            raise ConfigError(
                'model.temporal: got "tam" with model.name "tsn", which has no temporal module. '
                'Use model.name "tanet", or leave model.temporal at "auto".'
            )

    @property
    def uses_tam(self) -> bool:
        """Whether the blocks hold a TAM, with "auto" resolved."""
        return self.temporal == "tam" or (self.temporal == "auto" and self.name == "tanet")


def list_models() -> list[str]:
    """Names that `build_model` and `model.name` accept, sorted."""
    return sorted(get_args(ModelName))


def build_model(
    name: ModelName, *, num_classes: int, num_segments: int, **options: Any
) -> ClipNetwork:
    """The network `name`, in training mode, channels_last, on the CPU, in float32.

    Args:
        name: one of `list_models()`.
        num_classes: K, >= 1.
        num_segments: T, frames of one clip, >= 1.
        **options: the other fields of `ModelConfig`; so `build_model(**asdict(config),
            num_classes=K, num_segments=T)` builds what a recipe says.

    Returns:
        A network [N*T, 3, H, W] -> [N, K].

    Raises:
        ConfigError: an option is out of its range.
        CheckpointError: `pretrained` cannot be read or does not fit.
        TypeError: an option that `ModelConfig` does not have.
    """
    config = ModelConfig(name=name, **options)
    if num_classes < 1:
        raise ConfigError(f"num_classes: got {num_classes}, expected an integer >= 1.")
    if num_segments < 1:
        raise ConfigError(f"num_segments: got {num_segments}, expected an integer >= 1.")
    model = tanet(
        depth=config.depth,
        num_classes=num_classes,
        num_segments=num_segments,
        width=config.width,
        stages=config.stages,
        stem=config.stem,
        temporal=config.uses_tam,
        dropout=config.dropout,
        partial_bn=config.partial_bn,
    )
    if config.pretrained:
        import_weights(model, config.pretrained, allow_classifier_mismatch=True)
    return model
