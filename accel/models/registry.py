"""The models by name."""

from collections.abc import Callable
from typing import Any

from accel.errors import ConfigError
from accel.models.amsnet import amsnet
from accel.models.config import ModelConfig, ModelName
from accel.models.masnet import masnet
from accel.models.msn import msn
from accel.models.network import ClipNetwork
from accel.models.norm import set_implementation
from accel.models.tanet import tanet
from accel.models.tdn import tdn
from accel.models.tsm import tsm
from accel.models.weights import import_weights

# (config, K, T) -> the network of `config.name`
_BUILDERS: dict[ModelName, Callable[[ModelConfig, int, int], ClipNetwork]] = {
    "amsnet": amsnet,
    "masnet": masnet,
    "msn": msn,
    "tanet": tanet,
    "tdn": tdn,
    "tsm": tsm,
    "tsn": tsm,
}


def list_models() -> list[ModelName]:
    """Names that `build_model` and `model.name` accept, sorted."""
    return sorted(_BUILDERS)


def build_model(
    name: ModelName, *, num_classes: int, num_segments: int, **options: Any
) -> ClipNetwork:
    """The network `name`, in training mode, channels_last, on the CPU, in float32.

    Args:
        name: one of `list_models()`.
        num_classes: K, >= 1.
        num_segments: T, segments of one clip, >= 1.
        **options: the other fields of `ModelConfig`; so `build_model(**asdict(config),
            num_classes=K, num_segments=T)` builds what a recipe says.

    Returns:
        A network [N*T, 3*L, H, W] -> [N, K]; L is `config.frames_per_segment`.

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
    model = _BUILDERS[config.name](config, num_classes, num_segments)
    set_implementation(model, config.batch_norm)
    if config.pretrained:
        import_weights(model, config.pretrained, allow_classifier_mismatch=True)
    return model
