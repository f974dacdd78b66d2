"""AMS-Net: parameter names and shapes of the published state dicts and ours.

    accel         ours
    original      the authors' code (without the `module.` of DistributedDataParallel)
    prerelease    their working copy of 2021: the same tensors, three modules with other names
    torchvision   ImageNet ResNet

Convolutions that the authors keep as 3-D kernels are 2-D kernels here: [O, I, 3, 1, 1] is
[O, I, 3, 1] and [O, I, 1, h, h] is [O, I, h, h], the same elements in the same order.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from accel.models.convert.names import NameTable

_Row = tuple[str, str, str | None]


def _cptm(
    ours: str, published: str, conv: str | None = None, norm: str | None = None
) -> list[_Row]:
    """The rows of one kind of CPTM bottleneck; conv, norm: what ImageNet weights put first."""
    core, published_core = f"{ours}.core", f"{published}.cptm_bottleneck"
    return [
        (f"{ours}.reduce.conv.{{leaf}}", f"{published}.reduce.{{leaf}}", conv),
        (f"{ours}.reduce.bn.{{leaf}}", f"{published}.bn_re.{{leaf}}", norm),
        (f"{ours}.restore.conv.{{leaf}}", f"{published}.restore.{{leaf}}", None),
        (f"{ours}.restore.bn.{{leaf}}", f"{published}.bn_restore.{{leaf}}", None),
        (f"{core}.temporal_blocks.{{rest}}", f"{published_core}.temporal_blocks.{{rest}}", None),
        (f"{core}.attention.fc.{{leaf}}", f"{published_core}.fc.{{leaf}}", None),
        (f"{core}.attention.bn.{{leaf}}", f"{published_core}.bn.{{leaf}}", None),
        (f"{core}.attention.fcs.{{inner}}", f"{published_core}.fcs.{{inner}}", None),
    ]


_ROWS: tuple[_Row, ...] = (
    ("trunk.conv1.{leaf}", "backbone.conv1.conv.{leaf}", "conv1.{leaf}"),
    ("trunk.bn1.{leaf}", "backbone.conv1.bn.{leaf}", "bn1.{leaf}"),
    (
        "trunk.{block}.conv{i}.{leaf}",
        "backbone.{block}.conv{i}.conv.{leaf}",
        "{block}.conv{i}.{leaf}",
    ),
    ("trunk.{block}.bn{i}.{leaf}", "backbone.{block}.conv{i}.bn.{leaf}", "{block}.bn{i}.{leaf}"),
    (
        "trunk.{block}.downsample.0.{leaf}",
        "backbone.{block}.downsample.conv.{leaf}",
        "{block}.downsample.0.{leaf}",
    ),
    (
        "trunk.{block}.downsample.1.{leaf}",
        "backbone.{block}.downsample.bn.{leaf}",
        "{block}.downsample.1.{leaf}",
    ),
    # After a stage (2d, snippet), numbered as in the paper; in a block (slowonly).
    *_cptm("trunk.cptm.layer1", "backbone.multiScale_res2"),
    *_cptm("trunk.cptm.layer2", "backbone.multiScale_res3"),
    *_cptm("trunk.cptm.layer3", "backbone.multiScale_res4"),
    *_cptm(
        "trunk.{block}.conv1",
        "backbone.{block}.conv1",
        "{block}.conv1.{leaf}",
        "{block}.bn1.{leaf}",
    ),
    (
        "neck.spatial_modulation.{rest}",
        "neck.spatial_modulation.spatial_modulation.0.0.{rest}",
        None,
    ),
    (
        "neck.temporal_modulation.{i}.conv.{leaf}",
        "neck.temporal_modulation_ops.{i}.conv.conv.{leaf}",
        None,
    ),
    ("neck.downsample.{leaf}", "neck.downsample_ops.0.conv.conv.{leaf}", None),
    ("neck.top_down_levels.{i}.{rest}", "neck.level_fusion_1.downsamples.{i}.conv.{rest}", None),
    ("neck.bottom_up_levels.{i}.{rest}", "neck.level_fusion_2.downsamples.{i}.conv.{rest}", None),
    ("neck.level_attention.{rest}", "neck.pyramids_selective.{rest}", None),
    ("neck.top_down.{rest}", "neck.fusion_top_down.{rest}", None),
    ("neck.bottom_up.{rest}", "neck.fusion_botton_up.{rest}", None),  # sic
    ("neck.flow_attention.{rest}", "neck.pyramids_fusion.{rest}", None),
    ("neck.fusion.{rest}", "neck.pyramid_fusion.{rest}", None),
    ("aux_head.{rest}", "neck.aux_head.{rest}", None),
    ("head.fc.{leaf}", "cls_head.fc_cls.{leaf}", "fc.{leaf}"),
)

# Parity: amsnet: the released test code copies the classifier once per process into `new_cls` and
# saves the copy too; it may be stale, the scores are those of `fc_cls`.
_STALE = ("cls_head.new_cls.{leaf}",)


def _adapt(name: str, value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """An ImageNet tensor in ours: inflated where the kernel has time, skipped by a wider stem."""
    if name == "trunk.conv1.weight" and value.shape[1:2] != shape[1:2]:
        return None
    if len(shape) == 4 and (shape[2], shape[3]) == (3, 1) and value.shape[2:] == (1, 1):
        return value.expand(-1, -1, 3, -1) / 3
    return value


def _published_2d(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """3-D kernels in the neck, the auxiliary head and the temporal blocks."""
    in_3d = name.startswith(("neck.", "aux_head.")) or ".temporal_blocks." in name
    return _published_3d(name, shape) if in_3d else tuple(shape)


def _published_3d(_name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """[O, I, 3, 1] -> [O, I, 3, 1, 1], [O, I, h, h] -> [O, I, 1, h, h]; others are kept."""
    if len(shape) != 4:
        return tuple(shape)
    outputs, inputs, height, width = shape
    kernel = (1, height, width) if height == width else (height, width, 1)
    return (outputs, inputs, *kernel)


TABLE = NameTable(
    ("accel", "original", "torchvision"),
    _ROWS,
    derived={
        "prerelease": (
            "original",
            {
                "cptm_bottleneck": "attention_temporal_sk",
                "pyramids_selective": "atpn_selective",
                "pyramids_fusion": "SK_Fusion",
            },
        )
    },
    ignored={"original": _STALE, "prerelease": _STALE},
    classifier=("head.fc.weight", "head.fc.bias", "aux_head.fc.weight", "aux_head.fc.bias"),
    adapt=_adapt,
    published_shape=_published_2d,
)

SLOWONLY_TABLE = dataclasses.replace(TABLE, published_shape=_published_3d)
