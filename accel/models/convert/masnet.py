"""MAS-Net: parameter names of the published state dicts and ours.

accel         ours
original      the authors' code (without the `module.` of DataParallel)
original_fc   the same when trained with dropout 0: the classifier has another name
torchvision   ImageNet ResNet: no biases of convolutions, no temporal modules
"""

from accel.models.convert.names import NameTable

TABLE = NameTable(
    ("accel", "original", "torchvision"),
    (
        ("trunk.conv1.weight", "base_model.conv1.weight", "conv1.weight"),
        ("trunk.conv1.bias", "base_model.conv1.bias", None),
        ("trunk.bn1.{leaf}", "base_model.bn1.{leaf}", "bn1.{leaf}"),
        (
            "trunk.{block}.conv{i}.weight",
            "base_model.{block}.conv{i}.weight",
            "{block}.conv{i}.weight",
        ),
        ("trunk.{block}.conv{i}.bias", "base_model.{block}.conv{i}.bias", None),
        (
            "trunk.{block}.bn{i}.{leaf}",
            "base_model.{block}.bn{i}.{leaf}",
            "{block}.bn{i}.{leaf}",
        ),
        (
            "trunk.{block}.downsample.0.weight",
            "base_model.{block}.downsample.0.weight",
            "{block}.downsample.0.weight",
        ),
        ("trunk.{block}.downsample.0.bias", "base_model.{block}.downsample.0.bias", None),
        (
            "trunk.{block}.downsample.1.{leaf}",
            "base_model.{block}.downsample.1.{leaf}",
            "{block}.downsample.1.{leaf}",
        ),
        ("trunk.{block}.temporal.mam.{rest}", "base_model.{block}.MAM.{rest}", None),
        ("trunk.{block}.temporal.msm.{rest}", "base_model.{block}.MSM.{rest}", None),
        ("trunk.{block}.temporal.tim.{rest}", "base_model.{block}.TIM.{rest}", None),
        ("head.fc.{leaf}", "new_fc.{leaf}", "fc.{leaf}"),
    ),
    derived={"original_fc": ("original", {"new_fc": "base_model.fc"})},
    data_parallel=("original", "original_fc"),
)
