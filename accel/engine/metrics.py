"""Exact classification metrics (integer counts on the device, ratios at the end), view averages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Averaging = Literal["logits", "probs", "positive_logits"]


def average_views(logits: Tensor, averaging: Averaging) -> Tensor:
    """One score per video and class from the logits of its views.

    Args:
        logits: [N, V, K] of V views.
        averaging: "logits" = mean of the logits (TAM, MAS-Net); "probs" = mean of the softmax of
            each view (mmaction, AMS-Net, TDN, MSN); "positive_logits" = mean of max(logits, 0)
            (TDN's and MSN's ensembles of several clip lengths).

    Returns:
        [N, K] float64.
    """
    logits = logits.double()
    if averaging == "probs":
        logits = logits.softmax(dim=-1)
    elif averaging == "positive_logits":
        logits = logits.clamp(min=0)
    return logits.mean(dim=1)


def combine_scores(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum of the scores [N, K] of several models (published: every weight is 1)."""
    total = torch.zeros_like(scores[0])
    for own, weight in zip(scores, weights, strict=True):
        total += weight * own
    return total


def mean_class_accuracy(
    confusion: Tensor, missing: Tensor | None = None, *, absent: Literal["zero", "nan"] = "zero"
) -> float:
    """Mean of hits / count over the classes that occur in truth or prediction.

    Args:
        confusion: [K, K] integers, rows = truth, columns = prediction; on the CPU.
        missing: [K] clips of each class without a prediction: no hits; None = none.
        absent: share of a class that is predicted but never true: 0 (mmaction, AMS-Net) or
            not-a-number, then so is the mean (the test scripts of TAM and MAS-Net).
    """
    truth = confusion.sum(dim=1) + (missing if missing is not None else 0)  # [K]
    occurs = (truth + confusion.sum(dim=0)) > 0
    counts = truth[occurs].double()
    if absent == "zero":
        counts = counts.clamp(min=1)
    return float((confusion.diagonal()[occurs].double() / counts).mean())


@dataclass(frozen=True)
class Scores:
    """Metrics of one evaluation."""

    top1: float
    """Share of clips whose label has the largest score, 0..1."""
    top5: float
    """Share of clips whose label is among the five largest scores, 0..1 (1 with <= 5 classes)."""
    mean_class: float
    """Mean of hits / count over the classes that occur in truth or prediction; 0 for a class that
    is predicted but never true (mmaction rule)."""
    loss: float
    """Mean cross-entropy, nats."""
    num_clips: int
    """Clips counted."""
    num_missing: int = 0
    """Of these, clips that could not be read: wrong answers, without a part in the loss."""

    @property
    def rating(self) -> float:
        """What the best checkpoint is chosen by."""
        return self.top1

    @property
    def text(self) -> str:
        """For the log."""
        text = f"val top-1 {self.top1:.4f}, loss {self.loss:.4f}"
        if self.num_missing:
            missing = f"{self.num_missing} of {self.num_clips} videos unreadable"
            text += f" ({missing}, counted as wrong)"
        return text


class ClassificationMeter:
    """Sums over an evaluation: a confusion matrix, top-5 hits and the loss, all on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._top5 = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self.missing = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def miss(self, labels: Sequence[int]) -> None:
        """Count clips of these labels that could not be read: wrong, whatever the network is."""
        for label in labels:
            self.missing[label] += 1

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            logits: [N, K]; ties are broken by the lower class index for top-1.
            labels: [N] int64 in [0, K).
        """
        logits = logits.double()
        num_classes = logits.shape[1]
        predicted = logits.argmax(dim=1)  # [N]
        self.confusion.view(-1).index_add_(
            0, labels * num_classes + predicted, torch.ones_like(labels)
        )
        top = logits.topk(min(5, num_classes), dim=1).indices  # [N, min(5, K)]
        self._top5 += (top == labels[:, None]).any(dim=1).sum()
        self._loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def tensors(self) -> list[Tensor]:
        """The sums, for an all-reduce over ranks."""
        return [self.confusion, self._top5, self._loss, self.missing]

    def compute(self) -> Scores:
        """The metrics of everything counted so far (at least one clip)."""
        confusion, missing = self.confusion.cpu(), self.missing.cpu()
        read, num_missing = int(confusion.sum()), int(missing.sum())
        count = read + num_missing
        if count == 0:
            raise ValueError("ClassificationMeter.compute: no clips were counted.")
        return Scores(
            top1=int(confusion.diagonal().sum()) / count,
            top5=int(self._top5) / count,
            mean_class=mean_class_accuracy(confusion, missing),
            loss=float(self._loss) / read if read else math.nan,
            num_clips=count,
            num_missing=num_missing,
        )
