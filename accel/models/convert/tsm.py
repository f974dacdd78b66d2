"""TSN and TSM: parameter names of the published state dicts and ours.

    accel         ours
    original      the authors' code (without the `module.` of DataParallel)
    original_fc   the same when trained with dropout 0: the classifier has another name
    mmaction2     the port in mmaction2 (0.x and 1.x)
    torchvision   ImageNet ResNet

The shift has no parameters; it puts `.net` into the names of the convolution that it wraps.
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
            "base_model.{block}.conv{i}.{leaf}",
            "backbone.{block}.conv{i}.conv.{leaf}",
            "{block}.conv{i}.{leaf}",
        ),
        (
            "trunk.{block}.conv1.net.{leaf}",
            "base_model.{block}.conv1.net.{leaf}",
            "backbone.{block}.conv1.conv.net.{leaf}",
            "{block}.conv1.{leaf}",
        ),
        (
            "trunk.{block}.bn{i}.{leaf}",
            "base_model.{block}.bn{i}.{leaf}",
            "backbone.{block}.conv{i}.bn.{leaf}",
            "{block}.bn{i}.{leaf}",
        ),
        (
            "trunk.{block}.downsample.0.{leaf}",
            "base_model.{block}.downsample.0.{leaf}",
            "backbone.{block}.downsample.conv.{leaf}",
            "{block}.downsample.0.{leaf}",
        ),
        (
            "trunk.{block}.downsample.1.{leaf}",
            "base_model.{block}.downsample.1.{leaf}",
            "backbone.{block}.downsample.bn.{leaf}",
            "{block}.downsample.1.{leaf}",
        ),
        (
            "head.fc.{leaf}",
            "new_fc.{leaf}",
            "cls_head.fc_cls.{leaf}",
            "fc.{leaf}",
        ),
    ),
    derived={"original_fc": ("original", {"new_fc": "base_model.fc"})},
    data_parallel=("original", "original_fc"),
)
