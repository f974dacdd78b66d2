"""Networks: `build_model(name, ...)`, `list_models()`, and the recipe section `ModelConfig`."""

from accel.models.config import ModelConfig
from accel.models.registry import build_model, list_models

__all__ = ["ModelConfig", "build_model", "list_models"]
