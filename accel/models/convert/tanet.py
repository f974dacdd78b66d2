"""TANet: parameter names of the published state dicts and ours.

Every layout is one column of a table, so each map is total on its layout and invertible. Shapes
and values are equal in all layouts; only names differ. The layouts:

    accel         ours
    original      the authors' code (without the `module.` of DataParallel)
    original_fc   the same when trained with dropout 0: the classifier has another name
    prerelease    the authors' checkpoints older than the release
    mmaction2     the port in mmaction2 (0.x and 1.x)
    torchvision   ImageNet ResNet: no temporal modules, so those rows do not exist
"""

import functools
import re
from typing import Literal, get_args

Layout = Literal["accel", "original", "original_fc", "prerelease", "mmaction2", "torchvision"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_FIELDS = {
    "{block}": r"(?P<block>layer\d+\.\d+)",
    "{i}": r"(?P<i>\d+)",
    "{leaf}": r"(?P<leaf>[a-z_]+)",
    "{inner}": r"(?P<inner>\d+\.[a-z_]+)",
}

# Row by row: accel, original, mmaction2, torchvision. The other two layouts are derived below.
_TABLE: tuple[tuple[str, str, str, str | None], ...] = (
    (
        "trunk.conv1.{leaf}",
        "base_model.conv1.{leaf}",
        "backbone.conv1.conv.{leaf}",
        "conv1.{leaf}",
    ),
    (
        "trunk.bn1.{leaf}",
        "base_model.bn1.{leaf}",
        "backbone.conv1.bn.{leaf}",
        "bn1.{leaf}",
    ),
    (
        "trunk.{block}.conv{i}.{leaf}",
        "base_model.{block}.net.conv{i}.{leaf}",
        "backbone.{block}.block.conv{i}.conv.{leaf}",
        "{block}.conv{i}.{leaf}",
    ),
    (
        "trunk.{block}.bn{i}.{leaf}",
        "base_model.{block}.net.bn{i}.{leaf}",
        "backbone.{block}.block.conv{i}.bn.{leaf}",
        "{block}.bn{i}.{leaf}",
    ),
    (
        "trunk.{block}.downsample.0.{leaf}",
        "base_model.{block}.net.downsample.0.{leaf}",
        "backbone.{block}.block.downsample.conv.{leaf}",
        "{block}.downsample.0.{leaf}",
    ),
    (
        "trunk.{block}.downsample.1.{leaf}",
        "base_model.{block}.net.downsample.1.{leaf}",
        "backbone.{block}.block.downsample.bn.{leaf}",
        "{block}.downsample.1.{leaf}",
    ),
    (
        "trunk.{block}.temporal.G.{inner}",
        "base_model.{block}.tam.G.{inner}",
        "backbone.{block}.tam.G.{inner}",
        None,
    ),
    (
        "trunk.{block}.temporal.L.{inner}",
        "base_model.{block}.tam.L.{inner}",
        "backbone.{block}.tam.L.{inner}",
        None,
    ),
    (
        "head.fc.{leaf}",
        "new_fc.{leaf}",
        "cls_head.fc_cls.{leaf}",
        "fc.{leaf}",
    ),
)


@functools.cache
def _templates(layout: Layout) -> list[str | None]:
    """The templates of one layout, in the order of the table's rows."""
    if layout == "original_fc":
        return [row[1].replace("new_fc", "base_model.fc") for row in _TABLE]
    if layout == "prerelease":
        names = [row[1].replace("tam.G", "self_conv.conv_f") for row in _TABLE]
        return [name.replace("tam.L", "self_conv.conv_g") for name in names]
    index = {"accel": 0, "original": 1, "mmaction2": 2, "torchvision": 3}[layout]
    return [row[index] for row in _TABLE]


@functools.cache
def _patterns(layout: Layout) -> list[re.Pattern[str] | None]:
    """What matches the names of one layout, in the order of the table's rows."""
    return [_pattern(template) if template else None for template in _templates(layout)]


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for field, group in _FIELDS.items():
        pattern = pattern.replace(re.escape(field), group)
    return re.compile(pattern)


def rename(name: str, source: Layout, target: Layout) -> str | None:
    """The name in layout `target` of the tensor that layout `source` calls `name`.

    Args:
        name: a state-dict name, without a `module.` prefix.
        source: layout of `name`.
        target: layout of the result.

    Returns:
        The name, or None when `name` does not belong to `source` or has no place in `target`.
    """
    for pattern, result in zip(_patterns(source), _templates(target), strict=True):
        match = pattern and pattern.fullmatch(name)
        if match:
            return result.format(**match.groupdict()) if result else None
    return None
