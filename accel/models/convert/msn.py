"""MSN: parameter names of the released code and ours; layouts as in `accel.models.convert.tdn`."""

from accel.models.convert.names import NameTable
from accel.models.convert.tdn import DERIVED, LAYOUTS, TRUNK_ROWS, inflate

TABLE = NameTable(
    LAYOUTS,
    (
        *TRUNK_ROWS,
        ("trunk.unused.conv1_5_conv_weight", "base_model.conv1_5.0.weight", "conv1.weight"),
        ("trunk.unused.conv1_5_bn_{leaf}", "base_model.conv1_5.1.{leaf}", None),
        ("trunk.difference_stem.conv_{i}.{leaf}", "base_model.conv_{i}.{leaf}", None),
        ("trunk.difference_stem.conv_diff_{i}.{leaf}", "base_model.conv_diff_{i}.0.{leaf}", None),
        ("trunk.difference_stem.bn_diff_{i}.{leaf}", "base_model.conv_diff_{i}.1.{leaf}", None),
        (
            "trunk.layer{stage}.{index}.temporal.motion_layer.{rest}",
            "base_model.layer{stage}_bak.{index}.motion_layer.{rest}",
            None,
        ),
    ),
    derived=DERIVED,
    data_parallel=("original", *DERIVED),
    adapt=inflate,
)
