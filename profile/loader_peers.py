"""Other ways to read the same clips: what `loader.py` compares with.

Each reader returns the frames [F, 256, W, 3] of a file (or folder) as RGB bytes; the center is cut
out afterwards, the same for all. Readers run in a torch DataLoader with as many workers as we have
threads, as their users run them.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

_TIMEOUT_S = 60  # decord's workers have been seen to hang
Reader = Callable[[str, Sequence[int]], np.ndarray]
Clip = tuple[str, list[int]]


def _pyav_sequential(path: str, indices: Sequence[int]) -> np.ndarray:
    import av

    frames = []
    with av.open(path) as container:
        container.streams.video[0].thread_type = "NONE"
        for index, frame in enumerate(container.decode(video=0)):
            if index == indices[len(frames)]:
                frames.append(frame.to_ndarray(format="rgb24", threads=1))
                if len(frames) == len(indices):
                    break
    return np.stack(frames)


def _pyav_seek(path: str, indices: Sequence[int]) -> np.ndarray:
    """To the keyframe before each frame; times from the frame rate (right for constant rates)."""
    import av

    frames = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        step = 1 / (stream.average_rate * stream.time_base)
        start = stream.start_time or 0
        last = -1
        for index in indices:
            wanted = round(start + index * step)
            if last < 0 or index > last + 12:  # nearer frames are decoded on the way
                container.seek(wanted, stream=stream)
            for frame in container.decode(stream):
                if frame.pts >= wanted - step / 2:
                    frames.append(frame.to_ndarray(format="rgb24", threads=1))
                    break
            last = index
    return np.stack(frames)


def _decord(path: str, indices: Sequence[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(path, num_threads=1).get_batch(list(indices)).asnumpy()


def _opencv_sequential(path: str, indices: Sequence[int]) -> np.ndarray:
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames, wanted = [], set(indices)
    for index in range(max(indices) + 1):
        capture.grab()
        if index in wanted:
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def _opencv_seek(path: str, indices: Sequence[int]) -> np.ndarray:
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for index in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def _torchcodec(path: str, indices: Sequence[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(
        path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate"
    )
    return decoder.get_frames_at(list(indices)).data.numpy()


def _pillow(path: str, indices: Sequence[int]) -> np.ndarray:
    from PIL import Image

    files = [Path(path) / f"{index + 1:05d}.jpg" for index in indices]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def _opencv_images(path: str, indices: Sequence[int]) -> np.ndarray:
    import cv2

    files = [f"{path}/{index + 1:05d}.jpg" for index in indices]
    return np.stack([cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB) for file in files])


VIDEO_READERS: dict[str, tuple[str, Reader]] = {
    "pyav_sequential": ("av", _pyav_sequential),
    "pyav_seek": ("av", _pyav_seek),
    "decord": ("decord", _decord),
    "opencv_sequential": ("cv2", _opencv_sequential),
    "opencv_seek": ("cv2", _opencv_seek),
    "torchcodec": ("torchcodec", _torchcodec),
}
IMAGE_READERS: dict[str, tuple[str, Reader]] = {
    "pillow": ("PIL", _pillow),
    "opencv": ("cv2", _opencv_images),
}


def available(readers: dict[str, tuple[str, Reader]]) -> tuple[dict[str, Reader], dict[str, str]]:
    """The readers that can be imported, and why the others cannot."""
    found, missing = {}, {}
    for name, (module, reader) in readers.items():
        try:
            importlib.import_module(module)
            found[name] = reader
        except Exception as error:  # a library that does not load raises anything
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return found, missing


class _Clips(Dataset):
    def __init__(self, clips: Sequence[Clip], reader: Reader, size: int) -> None:
        self.clips, self.reader, self.size = clips, reader, size

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, indices = self.clips[index]
        frames = self.reader(path, indices)
        top, left = ((length - self.size) // 2 for length in frames.shape[1:3])
        cut = frames[:, top : top + self.size, left : left + self.size]
        return torch.from_numpy(np.ascontiguousarray(cut))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    try:
        import cv2

        cv2.setNumThreads(1)
    except ImportError:
        pass


class Peer:
    """A DataLoader over the clips with one reader; its workers live until `close`."""

    def __init__(
        self, reader: Reader, clips: Sequence[Clip], *, batch: int, workers: int, size: int
    ) -> None:
        self._loader = DataLoader(
            _Clips(clips, reader, size),
            batch_size=batch,
            num_workers=workers,
            persistent_workers=True,
            worker_init_fn=_one_thread,
            multiprocessing_context="spawn",
            timeout=_TIMEOUT_S,
        )

    def batches(self) -> Iterator[torch.Tensor]:
        """One pass. Nothing is read ahead of it: that would be in another one's turn."""
        yield from self._loader

    def cpu_s(self) -> float:
        """Processor time of the workers so far."""
        ticks = os.sysconf("SC_CLK_TCK")
        total = 0.0
        iterator = self._loader._iterator
        for worker in iterator._workers if iterator is not None else ():
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
        return total

    def close(self) -> None:
        """End the workers."""
        del self._loader
