"""DALI graph for video files: decode on the CPU (or take decoded frames), cut, scale, mirror.

The graph has no state and no random operator: everything random comes with the sample.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from pipelines.errors import MediaError
from pipelines.source import Sample


class DaliVideo:
    """Decodes and transforms a group of samples in one run of a DALI pipeline.

    What DALI cannot decode on the CPU (H.264, MPEG-4, ...) comes decoded from `read_frames`; the
    rest of the graph is the same.

    Steps no sample of the split needs are left out of the graph: `resize` even costs its full time
    when the size stays as it is.
    """

    def __init__(
        self,
        *,
        max_samples: int,
        threads: int,
        size: int,
        antialias: bool,
        read_frames: Callable[[Sample], npt.NDArray[np.uint8]] | None = None,
        crop_before: bool,
        scale: bool,
        crop_after: bool,
        flip: bool,
        repeat: bool,
    ) -> None:
        """Build the graph: decode, [crop], [scale], [crop], [flip], [repeat].

        Args:
            max_samples: most samples of one `run`.
            threads: CPU threads of the pipeline.
            size: output height and width, px.
            antialias: low-pass filter when shrinking.
            read_frames: gives the frames [F, H, W, 3] of a sample, called from a pool of `threads`
                threads; None = DALI decodes.
            crop_before: some window is not the whole frame.
            scale: some window is scaled.
            crop_after: some scaled window is larger than `size`.
            flip: some clip may be mirrored.
            repeat: some clip may name a frame twice. It is decoded and scaled once and repeated at
                the end (DALI's decoder starts again at the first frame for every repeated index).
        """
        from nvidia import dali as dali_module

        dali: Any = dali_module  # untyped
        fn = dali.fn
        self._inputs: list[str] = []
        self._read_frames = read_frames
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="accel-decode")
        self._feed: dict[str, list[Any]] = {}
        # No affinity: the pipeline shares the cores with the training threads.
        # exec_dynamic: outputs stay valid while a tensor refers to them.
        self._pipeline: Any = dali.Pipeline(
            batch_size=max_samples,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=1,
            set_affinity=False,
            exec_dynamic=True,
        )

        def per_sample(name: str, **options: Any) -> Any:
            self._inputs.append(name)
            return fn.external_source(source=lambda: self._feed[name], batch=True, **options)

        with self._pipeline:
            if read_frames is not None:
                clip = per_sample("decoded", layout="FHWC")  # per sample [unique frames, H, W, 3]
            else:
                # pad_mode "none": a missing frame is an error; the default would be a black frame.
                clip = fn.decoders.video(
                    per_sample("encoded"),
                    frames=per_sample("frames"),
                    pad_mode="none",
                    device="cpu",
                )  # per sample [unique frames, H, W, 3]
            if crop_before:
                start, end = per_sample("window_start"), per_sample("window_end")
                clip = fn.slice(clip, start=start, end=end, axis_names="HW")
            if scale:
                clip = fn.resize(
                    clip,
                    size=per_sample("scaled"),
                    interp_type=dali.types.INTERP_LINEAR,
                    antialias=antialias,
                )
            if crop_after:
                start, end = per_sample("crop_start"), per_sample("crop_end")
                clip = fn.slice(clip, start=start, end=end, axis_names="HW")
            if flip:
                clip = fn.flip(clip, horizontal=per_sample("flip"))
            if repeat:
                clip = fn.sequence_rearrange(clip, new_order=per_sample("gather"))
            self._pipeline.set_outputs(clip)
        self._size = size
        self._pipeline.build()

    def run(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The clips of up to `max_samples` samples.

        Returns:
            [N, T * L, size, size, 3] uint8 RGB on the CPU; shares DALI's memory.

        Raises:
            MediaError: a file has another size than when it was indexed, or does not give its
                frames.
            RuntimeError: from DALI, for the whole group.
        """
        values = list(self._pool.map(self._values, samples))
        self._feed = {name: [value[name] for value in values] for name in self._inputs}
        (clips,) = self._pipeline.run()
        return from_dlpack(clips.as_tensor())  # [N, T * L, size, size, 3]

    def close(self) -> None:
        """Release the pipeline (it and this object refer to each other) and the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._feed = {}
        self._pipeline = None

    def _values(self, sample: Sample) -> dict[str, Any]:
        x0, y0, width, height = sample.view.window
        left, top = sample.view.crop
        return {
            **self._source_values(sample),
            "window_start": np.array([y0, x0], np.int32),
            "window_end": np.array([y0 + height, x0 + width], np.int32),
            "scaled": np.array(sample.view.scaled[::-1], np.float32),
            "crop_start": np.array([top, left], np.int32),
            "crop_end": np.array([top + self._size, left + self._size], np.int32),
            "flip": np.array(int(sample.view.flip), np.int32),
        }

    def _source_values(self, sample: Sample) -> dict[str, Any]:
        unique, gather = np.unique(sample.frame_indices, return_inverse=True)
        values = {"gather": gather.astype(np.int32)}
        if self._read_frames is not None:
            decoded = self._read_frames(replace(sample, frame_indices=unique))
            return {**values, "decoded": decoded}
        return {**values, "encoded": _read_file(sample), "frames": unique.astype(np.int32)}


def _read_file(sample: Sample) -> Any:
    try:
        encoded = np.fromfile(sample.path, np.uint8)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MediaError(sample.path, f"cannot be read any more: {reason}.") from error
    if encoded.size != sample.info.size_bytes:
        raise MediaError(
            sample.path,
            f"expected {sample.info.size_bytes} bytes as indexed, got {encoded.size}; the file was "
            "changed during the run.",
        )
    return encoded
