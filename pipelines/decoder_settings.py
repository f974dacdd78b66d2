"""Decoders, and what one is built from."""

import functools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipelines.dali_video import DaliVideo
from pipelines.decode import DecodeCounts, read_frames
from pipelines.fallback import PyavVideo
from pipelines.source import Sample, Steps


class Decoder(Protocol):
    """Reads samples in two steps, so that reading one group goes on while another is finished."""

    def submit(self, samples: Sequence[Sample]) -> list[Future[Any]]: ...
    def finish(self, submitted: list[Future[Any]]) -> torch.Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class DecoderSettings:
    """Everything a decoder is built from; plain data."""

    name: str
    """"dali", "dali_gpu" or "pyav"."""

    dali: bool
    """Whether DALI is installed: it scales what PyAV decodes."""

    size: int
    antialias: bool
    threads: int
    max_samples: int
    max_frames: int
    images: bool
    device_id: int | None
    steps: Steps

    def build(self, counts: DecodeCounts | None = None) -> Decoder:
        """The decoder; `counts` gets how PyAV read each clip."""
        if not self.dali:
            return PyavVideo(
                threads=self.threads, size=self.size, antialias=self.antialias, counts=counts
            )
        return DaliVideo(
            max_samples=self.max_samples,
            max_frames=self.max_frames,
            threads=self.threads,
            size=self.size,
            antialias=self.antialias,
            read_frames=functools.partial(read_frames, counts=counts)
            if self.name == "pyav"
            else None,
            images=self.images,
            device_id=self.device_id,
            steps=self.steps,
        )
