"""TANet: parameter names of the published state dicts and ours.

accel         ours
original      the authors' code (without the `module.` of DataParallel)
original_fc   the same when trained with dropout 0: the classifier has another name
prerelease    the authors' checkpoints older than the release
mmaction2     the port in mmaction2 (0.x and 1.x)
torchvision   ImageNet ResNet: no temporal modules, so those rows do not exist
"""

from accel.models.convert.names import NameTable

TABLE = NameTable(
    ("accel", "original", "mmaction2", "torchvision"),
    (
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
    ),
    derived={
        "original_fc": ("original", {"new_fc": "base_model.fc"}),
        "prerelease": ("original", {"tam.G": "self_conv.conv_f", "tam.L": "self_conv.conv_g"}),
    },
    data_parallel=("original", "original_fc", "prerelease"),
)
