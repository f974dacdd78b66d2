"""The detectors by name, and which one a checkpoint holds."""

from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from accel.errors import CheckpointError, ConfigError
from accel.models.amtnet import AMTNet
from accel.models.convert import TABLES
from accel.models.convert.names import OURS
from accel.models.vgg_ssd import SSD300

DetectorName = Literal["amtnet", "ssd300"]
Detector = AMTNet | SSD300


def list_detectors() -> list[DetectorName]:
    """Names that `build_detector` accepts, sorted."""
    return sorted(get_args(DetectorName))


def build_detector(name: DetectorName, *, num_classes: int, **options: Any) -> Detector:
    """The detector `name`, in training mode, on the CPU, in float32.

    Args:
        name: "amtnet" (micro-tubes) or "ssd300" (single frames).
        num_classes: K, background included, >= 2.
        **options: arguments of `AMTNet` or `SSD300`.

    Raises:
        ConfigError: an unknown name, or options that do not fit.
    """
    if name not in get_args(DetectorName):
        raise ConfigError(f"detector: got {name!r}, expected one of {', '.join(list_detectors())}.")
    if num_classes < 2:
        raise ConfigError(
            f"num_classes: got {num_classes}, expected background and at least one class."
        )
    try:
        model: Detector
        if name == "amtnet":
            model = AMTNet(num_classes, **options)
        else:
            model = SSD300(num_classes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
    return model


def describe_detector(
    state: dict[str, Tensor], path: Path, system: str, layout: str | None = None
) -> dict[str, Any]:
    """The arguments with which `build_detector` makes the network that a state dict belongs to.

    Two streams whose maps are added and two whose maps are averaged look alike in a file; it is
    taken for "sum", which is what was published.

    Raises:
        CheckpointError: names of another network, or shapes that no detector has.
    """
    table = TABLES[system]
    layout = layout or table.recognize(list(state))
    if layout is None:
        raise CheckpointError(
            path, f"has names of no known layout of {system} ({', '.join(table.all_layouts)})."
        )
    shapes = {table.rename(n, layout, OURS): tuple(value.shape) for n, value in state.items()}
    prefix = "heads.0." if system == "amtnet" else ""
    conf = shapes.get("heads.0.conf.weight" if prefix else "conf.0.weight", ())
    loc = shapes.get("heads.0.loc.weight" if prefix else "loc.0.weight", ())
    stem = shapes.get("base.vgg.0.weight", ())
    levels = 2 + sum(f"base.extras.{k}.weight" in shapes for k in range(1, 8, 2))
    if len(stem) != 4 or not conf or not loc or conf[0] % 4 or loc[0] % 16 * bool(prefix):
        raise CheckpointError(path, f'is not a network of {system} in layout "{layout}".')
    found: dict[str, Any] = {
        "name": system,
        "num_classes": conf[0] // 4,
        "input_frames": stem[1] // 3,
        "width": stem[0],
        "levels": levels,
        "batch_norm": any("running_mean" in str(name) for name in shapes),
    }
    if system == "ssd300":
        return found
    frames = loc[0] // 16
    extra = shapes.get("extra.vgg.0.weight")
    columns = conf[1] if layout == OURS else conf[1] // 9
    doubled = columns == 2 * frames * shapes["base.norm.weight"][0]
    fusion = "none" if extra is None else "cat" if doubled else "sum"
    return found | {
        "num_frames": frames,
        "fusion": fusion,
        "extra_frames": extra[1] // 3 if extra is not None else 0,
    }
