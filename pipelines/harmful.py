"""Videos that kill the process that decodes them, or never come back: they get into the index.

While a decoder reads, its samples stand in a file beside the index (`pipelines.in_flight`). One
that a dead process left behind is examined when the next loader of these videos is opened, one of
a decoder that hangs at once. Each sample is decoded alone, by the same decoder, in a process that
may die. The index then says of the guilty ones that they cannot be used, for as long as the files
stay as they are.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.annotations import VideoSet
from pipelines.cache import locked
from pipelines.decoder_settings import DecoderSettings
from pipelines.geometry import View
from pipelines.in_flight import InFlight, find_harmful, left_behind
from pipelines.index_file import MediaIndex, mark_unusable, read_index
from pipelines.media_index import stamp_of
from pipelines.source import Sample, Steps

_LOG = logging.getLogger(__name__)
# Shortest and longest wait for one sample alone: a new process imports before the first one, and
# other ranks wait meanwhile (run.timeout_s).
_ALONE_S = (5.0, 60.0)


def note(in_flight: InFlight | None, settings: DecoderSettings, samples: Sequence[Sample]) -> None:
    """Put down what is being decoded from now on, in place of what was; nothing, if there is no
    sample."""
    if in_flight is None:
        return
    plain = [
        {
            "id": sample.sample_id,
            "frames": sample.frame_indices.tolist(),
            "views": [asdict(view) for view in sample.views],
        }
        for sample in samples
    ]
    in_flight.write({"decoder": asdict(settings), "samples": plain} if plain else {})


def leave_out_harmful(path: Path, videos: VideoSet, *, timeout_s: float) -> dict[int, str]:
    """Examine what processes that are dead, or hang, were reading; mark in the index what must not
    be read.

    Args:
        path: of the index (`media_index.index_path`), which is opened afterwards.
        videos: that it is of.
        timeout_s: longest wait for one sample, between five seconds and a minute.

    Returns:
        Id -> why the video cannot be used, for those found now.

    Raises:
        DataError: several samples in a row never come back.
    """
    found: dict[int, str] = {}
    with locked(path.with_suffix(".lock")):  # other ranks wait
        for left, content in left_behind(path.parent, path.stem):
            rows = read_index(path, len(videos))
            if content and rows is not None:
                found |= _examine(content, videos, MediaIndex(path, *rows), timeout_s)
            left.unlink(missing_ok=True)
    return found


def _examine(content: Any, videos: VideoSet, index: MediaIndex, timeout_s: float) -> dict[int, str]:
    try:
        settings, samples = _parsed(content, videos, index)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        _LOG.warning("%s: ignoring what another version was reading (%r)", index.path, error)
        return {}
    if not samples:
        return {}
    named = ", ".join(videos[sample.sample_id].name for sample in samples[:3]) + ", ..." * (
        len(samples) > 3
    )
    _LOG.info("a process came to its end while it read %s; each is decoded alone", named)
    task = functools.partial(_decode_each, settings)
    places = find_harmful(task, samples, timeout_s=min(max(timeout_s, _ALONE_S[0]), _ALONE_S[1]))
    found = {samples[place].sample_id: what for place, what in places.items()}
    if found:
        mark_unusable(index.path, found)
    return found


def _parsed(
    content: Any, videos: VideoSet, index: MediaIndex
) -> tuple[DecoderSettings, list[Sample]]:
    """The decoder, and those samples whose files are as they were."""
    facts = content["decoder"]
    settings = DecoderSettings(**{**facts, "steps": Steps(**facts["steps"])})
    samples = []
    for plain in content["samples"]:
        place = plain["id"]
        record = videos[place]
        if place in index.problems or stamp_of(record) != index.stamp(place):
            continue
        views = tuple(
            View(tuple(view["resized"]), tuple(view["window"]), view["flip"])
            for view in plain["views"]
        )
        frames = np.array(plain["frames"], np.int64)
        samples.append(Sample(place, record.path, frames, views, record.label, index[place]))
    return settings, samples


def _decode_each(
    settings: DecoderSettings, samples: Sequence[Sample], report: Callable[[int], None]
) -> None:
    decoder = settings.build()
    for number, sample in enumerate(samples):
        report(number)
        try:
            decoder.finish(decoder.submit([sample]))
        except Exception:  # the run itself will meet it, and knows what to do
            decoder.close()  # a pipeline of DALI is not valid after an error
            decoder = settings.build()
    decoder.close()
