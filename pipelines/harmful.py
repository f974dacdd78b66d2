"""Videos that kill the process that decodes them, or never come back: they get into the index.

While a decoder reads, its samples stand in a file beside the index (`pipelines.in_flight`). One
that a dead process left behind is examined when the next loader of these videos is opened; what a
decoder reads that hangs, at once. Each sample is decoded by the same decoder in a process that may
die. The index then says of those that kill it that they cannot be used, for as long as the files
stay as they are.
"""

import functools
import json
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
from pipelines.in_flight import InFlight, alone_s, find_harmful, left_behind
from pipelines.index_file import MediaIndex, mark_unusable, read_index
from pipelines.media_index import stamp_of
from pipelines.source import Sample, Steps

_LOG = logging.getLogger(__name__)


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
    """Examine what processes that are dead were reading.

    Args:
        path: of the index (`media_index.index_path`), which is opened afterwards.
        videos: that it is of.
        timeout_s: see `alone_s`.

    Returns:
        Id -> why the video cannot be used, for those found now. The index says so of those that
        kill their process; that a video hangs may be the storage's fault of today.
    """
    found: dict[int, str] = {}
    with locked(path.with_suffix(".lock")):  # other ranks wait
        left = list(left_behind(path.parent, path.stem))
        rows = read_index(path, len(videos)) if left else None
        if rows is not None:
            index = MediaIndex(path, *rows)
            for content in _merged([content for _, content in left if content]):
                found |= _examine(content, videos, index, timeout_s)
        for file, _ in left:
            file.unlink(missing_ok=True)
    return found


def find_hanging(
    content: Any, videos: VideoSet, index: MediaIndex, *, timeout_s: float
) -> dict[int, str]:
    """Examine what a decoder of this process was reading (`InFlight.content`) when it hung.

    Args:
        content: that was noted.
        videos: of the split.
        index: of these videos.
        timeout_s: as for `leave_out_harmful`.

    Returns:
        As `leave_out_harmful`.
    """
    return _examine(content, videos, index, timeout_s) if content else {}


def _merged(contents: Sequence[Any]) -> list[Any]:
    """One content for each decoder: processes of a run, or of several, read the same videos."""
    samples: dict[str, dict[str, Any]] = {}
    for content in contents:
        try:
            own = samples.setdefault(json.dumps(content["decoder"], sort_keys=True), {})
            own |= {json.dumps(sample, sort_keys=True): sample for sample in content["samples"]}
        except (KeyError, TypeError):  # of another version
            continue
    return [
        {"decoder": json.loads(decoder), "samples": list(own.values())}
        for decoder, own in samples.items()
    ]


def _examine(content: Any, videos: VideoSet, index: MediaIndex, timeout_s: float) -> dict[int, str]:
    try:
        settings, samples = _parsed(content, videos, index)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        _LOG.warning("%s: ignoring what another version was reading (%r)", index.path, error)
        return {}
    if not samples:
        return {}
    named = ", ".join(videos[sample.sample_id].name for sample in samples[:3])
    more = ", ..." if len(samples) > 3 else ""
    _LOG.warning(
        "%s%s: reading came to no end; each is read alone, in another process", named, more
    )
    task = functools.partial(_decode_each, settings)
    found = find_harmful(task, samples, timeout_s=alone_s(timeout_s))
    deadly = {samples[k].sample_id: end.what for k, end in found.items() if not end.hung}
    if deadly:
        mark_unusable(index.path, deadly)
    return {samples[k].sample_id: end.what for k, end in found.items()}


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
