"""DALI graph for videos and folders of frames: decode (or take decoded frames), scale, cut, mirror.

The graph has no state and no random operator: everything random comes with the sample.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from pipelines.images import read_encoded
from pipelines.pool import ReadPool
from pipelines.source import Sample, Steps
from pipelines.trim import trimmed_stream


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
        max_frames: int,
        threads: int,
        size: int,
        antialias: bool,
        read_frames: Callable[..., npt.NDArray[np.uint8]] | None = None,
        images: bool = False,
        device_id: int | None = None,
        steps: Steps,
    ) -> None:
        """Build the graph: decode, [resize], then for each view [crop], [scale], [flip], [repeat].

        Args:
            max_samples: most samples of one `run`.
            max_frames: most frames of a sample.
            threads: CPU threads of the pipeline.
            size: output height and width, px.
            antialias: low-pass filter when shrinking.
            read_frames: gives the frames [F, H, W, 3] of a sample, or a `window` of them, called
                from a pool of `threads` threads; None = DALI decodes.
            images: the samples are folders of frames. Each frame is a sample to DALI: one operator
                decodes all frames of all clips.
            device_id: GPU that decodes (NVDEC, nvJPEG) and transforms; None = the CPU does.
            steps: what the samples need. A frame that a sample names twice is decoded and scaled
                once and repeated at the end (DALI's decoder starts again at the first frame for
                every repeated index).
        """
        from nvidia import dali as dali_module

        dali: Any = dali_module  # untyped
        fn = dali.fn
        self._inputs: list[str] = []
        self._read_frames = read_frames
        self._images = images and read_frames is None
        # One window of frames that are not scaled first: only it is converted to RGB, or decoded.
        direct = steps.crop and not steps.resize and steps.num_views == 1
        self._cut_frames = direct and read_frames is not None
        cut_images = direct and self._images
        self._pool = ReadPool(threads)
        # What DALI leaves on a GPU is copied before the next run: nothing tells DALI until when
        # torch's kernels, which run later, read its memory. On a stream of its own the copy waits
        # for the decoder, not for the training step.
        self._stream: Any = None
        if device_id is not None:
            self._stream = torch.cuda.Stream(device_id)  # type: ignore[no-untyped-call]
        self._feed: dict[str, list[Any]] = {}
        # No affinity: the pipeline shares the cores with the training threads.
        # exec_dynamic: outputs stay valid while a tensor refers to them. Without it (DALI 1.34) the
        # next run overwrites them, so they are copied.
        dynamic = "exec_dynamic" in inspect.signature(dali.Pipeline.__init__).parameters
        self._to_torch = _shared if dynamic else _copied if device_id is None else _copied_on_gpu
        self._pipeline: Any = dali.Pipeline(
            batch_size=max_samples * max_frames if self._images else max_samples,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            set_affinity=False,
            **({"exec_dynamic": True} if dynamic else {}),
        )

        def per_sample(name: str, **options: Any) -> Any:
            self._inputs.append(name)
            return fn.external_source(source=lambda: self._feed[name], batch=True, **options)

        def resize(frames: Any, size: Any) -> Any:
            linear = dali.types.INTERP_LINEAR
            return fn.resize(frames, size=size, interp_type=linear, antialias=antialias)

        device = "cpu" if device_id is None else "mixed"
        with self._pipeline:
            if read_frames is not None:
                clip = per_sample("decoded", layout="FHWC")  # per sample [unique frames, H, W, 3]
            elif self._images:
                # Fancy upsampling of chroma, as Pillow's, is not nvJPEG's default.
                as_pillow = as_stored() | (
                    {} if device_id is None else {"jpeg_fancy_upsampling": True}
                )
                if cut_images:
                    window = {"start": per_sample("start0"), "end": per_sample("end0")}
                    options = {**window, "axis_names": "HW", "device": device, **as_pillow}
                    clip = fn.decoders.image_slice(per_sample("encoded"), **options)
                else:
                    clip = fn.decoders.image(per_sample("encoded"), device=device, **as_pillow)
            else:
                # pad_mode "none": a missing frame is an error; the default would be a black frame.
                decode = video_operator()
                assert decode is not None  # DecoderPlan.problems
                clip = decode(
                    per_sample("encoded"),
                    frames=per_sample("frames"),
                    pad_mode="none",
                    device=device,
                )  # per sample [unique frames, H, W, 3]
            if steps.resize:
                clip = resize(clip, per_sample("resized"))
            self._gather = steps.repeat and self._images  # after DALI: its samples are frames
            repeats = per_sample("gather") if steps.repeat and not self._images else None
            outputs = []
            for k in range(steps.num_views):
                view = clip
                if steps.crop and not cut_images and not self._cut_frames:
                    start, end = per_sample(f"start{k}"), per_sample(f"end{k}")
                    view = fn.slice(view, start=start, end=end, axis_names="HW")
                if steps.scale:
                    view = resize(view, [size, size])
                if steps.flip:
                    view = fn.flip(view, horizontal=per_sample(f"flip{k}"))
                if repeats is not None:
                    view = fn.sequence_rearrange(view, new_order=repeats)
                outputs.append(view)
            self._pipeline.set_outputs(*outputs)
        self._pipeline.build()

    def submit(self, samples: Sequence[Sample]) -> list[Future[dict[str, Any]]]:
        """Begin to read up to `max_samples` samples on the threads; `finish` takes the result."""
        return [self._pool.submit(self._values, sample) for sample in samples]

    def finish(self, submitted: Sequence[Future[dict[str, Any]]]) -> torch.Tensor:
        """The clips of the samples of one `submit`.

        Returns:
            [N, views, F, size, size, 3] uint8 RGB where DALI decodes, F = frame indices of a
            sample; complete. One view on the CPU shares DALI's memory.

        Raises:
            MediaError: a file has another size than when it was indexed, or does not give its
                frames.
            RuntimeError: from DALI, for the whole group.
        """
        values = [future.result() for future in submitted]
        frames = [len(value["encoded"]) for value in values] if self._images else None
        self._feed = {name: _batched(name, values, frames) for name in self._inputs}
        if self._stream is None:
            return self._run(values)
        with torch.cuda.stream(self._stream):
            clips = self._run(values)
        self._stream.synchronize()
        return clips

    def _run(self, values: Sequence[dict[str, Any]]) -> torch.Tensor:
        views = [self._to_torch(view.as_tensor()) for view in self._pipeline.run()]
        if self._images:
            views = [self._clips(view, values) for view in views]
        if len(views) == 1 and self._stream is None:
            return views[0].unsqueeze(1)  # [N, 1, F, size, size, 3]
        return torch.stack(views, dim=1)  # [N, views, F, size, size, 3]

    def _clips(self, frames: torch.Tensor, values: Sequence[dict[str, Any]]) -> torch.Tensor:
        """[N, F, size, size, 3] of the different frames of all samples."""
        if self._gather:
            starts = np.cumsum([0, *(len(value["encoded"]) for value in values)])
            pairs = zip(starts, values, strict=False)
            index = np.concatenate([start + value["gather"] for start, value in pairs])
            frames = frames[torch.from_numpy(index).to(frames.device)]
        return frames.reshape(len(values), -1, *frames.shape[1:])

    def close(self) -> None:
        """Release the pipeline (it and this object refer to each other) and the threads."""
        self._pool.close()
        self._feed = {}
        self._pipeline = None

    def _values(self, sample: Sample) -> dict[str, Any]:
        width, height = sample.views[0].resized
        values = self._source_values(sample)
        values["resized"] = (height, width)
        for k, view in enumerate(sample.views):
            x0, y0, width, height = view.window
            values[f"start{k}"], values[f"end{k}"] = (y0, x0), (y0 + height, x0 + width)
            values[f"flip{k}"] = int(view.flip)
        return values

    def _source_values(self, sample: Sample) -> dict[str, Any]:
        unique, gather = np.unique(sample.frame_indices, return_inverse=True)
        values = {"gather": gather.astype(np.int32)}
        if self._read_frames is not None:
            window = sample.views[0].window if self._cut_frames else None
            decoded = self._read_frames(replace(sample, frame_indices=unique), window=window)
            return {**values, "decoded": decoded}
        if self._images:
            contents = read_encoded(sample.path, sample.info, unique.tolist())
            return {**values, "encoded": [np.frombuffer(each, np.uint8) for each in contents]}
        encoded, frames = trimmed_stream(sample, unique)
        return {**values, "encoded": encoded, "frames": frames}


def video_operator() -> Any:
    """DALI's video decoder that takes frame indices, or None where there is none (DALI 1.34)."""
    from nvidia.dali import fn

    for group in (fn.decoders, getattr(fn.experimental, "decoders", None)):
        operator = getattr(group, "video", None)
        documented = getattr(operator, "__doc__", None) or ""
        if "`frames`" in documented and "`pad_mode`" in documented:
            return operator
    return None


def as_stored() -> dict[str, bool]:
    """Options of DALI's image decoders: do not turn images by their EXIF data. Pillow does not, and
    the sizes of an index are of what is stored. DALI 1.34 never does."""
    from nvidia.dali import fn

    known = "adjust_orientation" in (fn.decoders.image.__doc__ or "")
    return {"adjust_orientation": False} if known else {}


def _shared(tensor: Any) -> torch.Tensor:
    shared: torch.Tensor = from_dlpack(tensor)
    return shared


def _copied(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(tensor))


def _copied_on_gpu(tensor: Any) -> torch.Tensor:
    plugin: Any = importlib.import_module("nvidia.dali.plugin.pytorch")  # untyped
    copy = torch.empty(tensor.shape(), dtype=torch.uint8, device="cuda")
    plugin.feed_ndarray(tensor, copy, cuda_stream=torch.cuda.current_stream())
    return copy


def _batched(name: str, values: Sequence[dict[str, Any]], frames: list[int] | None) -> Any:
    """An input of the graph for a group of samples, one item for each, or for each of its frames.

    Args:
        name: of the input.
        values: of the samples.
        frames: of each sample, where each frame is a sample to DALI.
    """
    if frames is not None and name == "encoded":
        return [frame for value in values for frame in value[name]]
    column = [value[name] for value in values]
    if name in ("encoded", "decoded", "frames", "gather"):  # of different sizes
        return column
    numbers = np.array(column, np.float32 if name == "resized" else np.int32)
    return numbers if frames is None else np.repeat(numbers, frames, axis=0)
