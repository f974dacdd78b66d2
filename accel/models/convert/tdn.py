"""TDN: parameter names of the published state dicts and ours.

accel           ours
original        the authors' code (without the `module.` of DistributedDataParallel)
original_older  the same, with the classifier's older name
original_fc     the same when trained with dropout 0: the classifier has another name
torchvision     ImageNet ResNet: fills the trunk, the second copy of its first stage, and the
                stem of the differences with the mean over RGB of its first kernel
"""

from collections.abc import Sequence

from torch import Tensor

from accel.models.convert.names import NameTable
from accel.models.difference import inflate_kernel

LAYOUTS = ("accel", "original", "torchvision")

DERIVED = {
    "original_older": ("original", {"new_fc": "base_model.classifier"}),
    "original_fc": ("original", {"new_fc": "base_model.fc"}),
}


def stage_rows(ours: str, original: str, imagenet: str) -> tuple[tuple[str | None, ...], ...]:
    """Rows of the blocks of one stage, given its prefix in every layout; biases are not ImageNet's.

    A prefix may hold the field {stage}.
    """
    block, published, source = f"{ours}.{{index}}", f"{original}.{{index}}", f"{imagenet}.{{index}}"
    return (
        *convolution_rows(f"{block}.conv{{i}}", f"{published}.conv{{i}}", f"{source}.conv{{i}}"),
        (
            f"{block}.bn{{i}}.{{leaf}}",
            f"{published}.bn{{i}}.{{leaf}}",
            f"{source}.bn{{i}}.{{leaf}}",
        ),
        *convolution_rows(
            f"{block}.downsample.0", f"{published}.downsample.0", f"{source}.downsample.0"
        ),
        (
            f"{block}.downsample.1.{{leaf}}",
            f"{published}.downsample.1.{{leaf}}",
            f"{source}.downsample.1.{{leaf}}",
        ),
    )


def convolution_rows(ours: str, original: str, imagenet: str) -> tuple[tuple[str | None, ...], ...]:
    """Rows of a convolution with bias; ImageNet's have none."""
    return (
        (f"{ours}.weight", f"{original}.weight", f"{imagenet}.weight"),
        (f"{ours}.bias", f"{original}.bias", None),
    )


# What TDN and MSN have in common.
TRUNK_ROWS: tuple[tuple[str | None, ...], ...] = (
    *convolution_rows("trunk.conv1", "base_model.conv1", "conv1"),
    ("trunk.bn1.{leaf}", "base_model.bn1.{leaf}", "bn1.{leaf}"),
    ("trunk.unused.conv1_temp_weight", "base_model.conv1_temp.weight", "conv1.weight"),
    ("trunk.unused.conv1_temp_bias", "base_model.conv1_temp.bias", None),
    *stage_rows("trunk.difference_layer1", "base_model.resnext_layer1", "layer1"),
    *stage_rows("trunk.layer{stage}", "base_model.layer{stage}_bak", "layer{stage}"),
    (
        "trunk.layer{stage}.{index}.temporal.shift.{rest}",
        "base_model.layer{stage}_bak.{index}.shift.{rest}",
        None,
    ),
    ("head.fc.{leaf}", "new_fc.{leaf}", "fc.{leaf}"),
)


def inflate(_name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """The first kernel, widened to the inputs of ours; any other tensor as it is."""
    if value.dim() == 4 and value.shape[1] == 3 and len(shape) == 4:
        return inflate_kernel(value, shape[1]) if shape[1] != 3 else value
    return value


TABLE = NameTable(
    LAYOUTS,
    (
        *TRUNK_ROWS,
        ("trunk.difference_stem.conv.weight", "base_model.conv1_5.0.weight", "conv1.weight"),
        ("trunk.difference_stem.bn.{leaf}", "base_model.conv1_5.1.{leaf}", None),
        (
            "trunk.layer{stage}.{index}.temporal.mse.{rest}",
            "base_model.layer{stage}_bak.{index}.mse.{rest}",
            None,
        ),
    ),
    derived=DERIVED,
    data_parallel=("original", *DERIVED),
    adapt=inflate,
)
