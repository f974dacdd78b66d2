"""Exact evaluation: every clip of the split once, for any batch size and number of processes."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accel.engine.distributed import World
from accel.engine.metrics import Averaging, ClassificationMeter, Scores, average_views
from accel.engine.precision import Precision
from accel.engine.timing import Ranges
from pipelines.config import AugmentConfig, TestViews
from pipelines.geometry import NumCrops
from pipelines.loader import Loader


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """Evaluation on the validation split. During training: one center view of one clip."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    batch: int = 0
    """Videos per batch of one process, or views with a protocol of several; 0 =
    train.micro_batch."""
    every_epochs: int = 1
    """Evaluate after every so many epochs (and always at the end), >= 1."""
    every_steps: int = 0
    """> 0: after every so many optimizer steps instead."""
    protocols: tuple[str, ...] = ("1x1",)
    """Published test protocols, clips x crops: "1x1", "2x3", "10x3", ... (crops: 1, 3 or 10)."""
    average: Averaging = "probs"
    """What is averaged over the views of a video: "probs" (softmax of each), "logits" (TAM,
    MAS-Net), or "positive_logits" (max(logits, 0): TDN's several clip lengths)."""
    full_resolution: bool = True
    """Three crops are squares of the short side (augment.resize); false: of augment.size."""
    ensemble_with: str = ""
    """Recipe of the other member of the published ensemble; their scores are added 1 : 1."""

    def __post_init__(self) -> None:
        if self.batch < 0:
            raise ValueError(f"test.batch: must be >= 0 (0 = train.micro_batch), got {self.batch}.")
        if self.every_epochs < 1:
            raise ValueError(f"test.every_epochs: must be >= 1, got {self.every_epochs}.")
        if self.every_steps < 0:
            raise ValueError(
                f"test.every_steps: must be >= 0 (0 = epochs), got {self.every_steps}."
            )
        for name in self.protocols:
            parse_protocol(name, "test.protocols")


def parse_protocol(name: str, where: str) -> tuple[int, NumCrops]:
    """(clips, crops) of a protocol's name like "10x3".

    Raises:
        ValueError: that begins with `where`.
    """
    match = re.fullmatch(r"([1-9][0-9]?)x(1|3|10)", name)
    if not match:
        raise ValueError(
            f'{where}: must be clips x crops like "2x3" (1..99 clips; 1, 3 or 10 crops), got '
            f"{name!r}."
        )
    crops: dict[str, NumCrops] = {"1": 1, "3": 3, "10": 10}
    return int(match[1]), crops[match[2]]


def protocol_views(name: str, test: TestConfig, augment: AugmentConfig) -> TestViews:
    """What a protocol reads of every video under these settings.

    Raises:
        ValueError: not a protocol.
    """
    clips, crops = parse_protocol(name, "--protocol")
    size = augment.size
    if crops == 3 and test.full_resolution:
        size = augment.resize or augment.size
    return TestViews(num_clips=clips, num_crops=crops, size=size)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    num_classes: int,
    precision: Precision,
    world: World,
    ranges: Ranges,
    poll: Callable[[], None],
) -> Scores:
    """Metrics of `model` over all clips of `loader`, summed over ranks as integers.

    A video that cannot be read counts as wrong.

    Args:
        model: the bare network (not a DDP wrapper); left in train mode if it was.
        poll: called after every batch; may raise to end the evaluation early (a stop request).
    """
    # Each rank keeps its own batch-norm statistics while training; rank 0's are the saved ones.
    world.broadcast_(list(model.buffers()))
    meter = ClassificationMeter(num_classes, precision.device)
    all_labels = loader.labels
    was_training = model.training
    model.eval()
    try:
        with ranges("evaluation"):
            for batch in loader.epoch(0):
                meter.miss([int(all_labels[sample_id]) for sample_id in batch.missing])
                if len(batch.sample_ids):
                    frames = precision.network_input(batch.clips)
                    with precision.autocast():
                        logits = model(frames)
                    meter.update(logits, batch.labels)
                poll()
    finally:
        model.train(was_training)
    world.sum_(meter.tensors())
    return meter.compute()


@torch.inference_mode()
def evaluate_views(
    model: nn.Module,
    loader: Loader,
    *,
    num_videos: int,
    num_classes: int,
    average: Averaging,
    chunk: int,
    precision: Precision,
    world: World,
    ranges: Ranges,
) -> tuple[Tensor, Tensor]:
    """Scores of all videos of `loader`, averaged over their views.

    A batch holds the same videos for any number of processes, and each row of the result is filled
    by one process, so the bits do not depend on that number.

    Args:
        model: in evaluation mode.
        num_videos: of the whole split.
        chunk: views per forward.

    Returns:
        Scores [num_videos, num_classes] float64, and which videos could be read [num_videos] bool;
        on the CPU, the same on every process. Scores are not-a-number where a video cannot be read,
        and what the network gives elsewhere, whether finite or not.
    """
    scores = torch.zeros(num_videos, num_classes, dtype=torch.float64, device=precision.device)
    read = torch.zeros(num_videos, dtype=torch.int64, device=precision.device)
    unread = torch.zeros_like(read)
    with ranges("evaluation"):
        for batch in loader.epoch(0):
            unread[torch.tensor(batch.missing, dtype=torch.int64, device=unread.device)] += 1
            if not len(batch.sample_ids):
                continue
            logits = []
            for clips in torch.split(batch.clips, chunk):
                frames = precision.network_input(clips)
                with precision.autocast():
                    logits.append(model(frames).double())
            views = torch.cat(logits).view(-1, loader.num_views, num_classes)  # [N, V, K]
            rows = batch.sample_ids.to(scores.device)
            scores[rows] = average_views(views, average)
            read[rows] += 1
    world.sum_([scores, read, unread])
    assert bool((read + unread == 1).all()), "every video is scored once"
    scores[unread == 1] = float("nan")
    return scores.cpu(), (read == 1).cpu()
