"""Every kind of faulty folder of frames: decoded to what it holds, or left out with a reason.

Row D2 of the fault matrix.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.annotations import read_list
from pipelines.config import SamplingConfig
from pipelines.datasets import Dataset
from pipelines.loader import Loader

ReadCode = Callable[[np.ndarray], tuple[int, int]]


def first(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.4)])


FOLDERS: dict[str, tuple[Callable[[Path], object] | None, str]] = {
    "good": (None, ""),
    "no first": (first("00001.jpg"), "00001.jpg is missing"),
    "no middle": (first("00004.jpg"), "00004.jpg: cannot be read"),
    "no last": (first("00008.jpg"), "00008.jpg is missing"),
    "empty file": (lambda f: (f / "00003.jpg").write_bytes(b""), "00003.jpg: expected a JPEG"),
    "truncated": (lambda f: truncate(f / "00005.jpg"), "00005.jpg: cannot be decoded"),
    "other size": (lambda f: Image.new("RGB", (60, 40)).save(f / "00006.jpg"), "got 60 x 40"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "No such file"),
    "loop": (
        lambda f: (f.rename(f.with_name("gone")), f.symlink_to(f)), "cannot be read"
    ),
    "übergröße": (None, ""),
    "gray": (lambda f: [Image.open(p).convert("L").save(p) for p in f.iterdir()], ""),
    "cmyk": (lambda f: [Image.open(p).convert("CMYK").save(p) for p in f.iterdir()], ""),
}  # fmt: skip


def test_every_kind_of_faulty_folder(
    tmp_path: Path,
    make_frames: Callable[..., Path],
    open_loader: Callable[..., Loader],
    read_code: ReadCode,
    image_decoder: str,
) -> None:
    """D2: as D1."""
    lines = ""
    for number, (name, (change, _)) in enumerate(FOLDERS.items()):
        folder = make_frames(f"clips/{name}", num_frames=8, video=number, width=64)
        lines += f"clips/{name}\t8\t{number % 3}\n"
        if change is not None:
            change(folder)
    (tmp_path / "list.txt").write_text(lines)
    videos = read_list(tmp_path / "list.txt", root=tmp_path)
    dataset = Dataset(videos, videos, ("a", "b", "c"), tmp_path / "cache", max_bad_fraction=0.8)
    loader = open_loader(
        dataset, "val", decoder=image_decoder, sampling=SamplingConfig(num_segments=8)
    )
    batches = list(loader.epoch(0))
    reasons = {entry.path[6:]: entry.reason for entry in loader.quarantine.entries}
    expected = {name: part for name, (_, part) in FOLDERS.items() if part}
    assert reasons.keys() == expected.keys()
    assert all(part in reasons[name] for name, part in expected.items()), reasons
    codes = {
        sample_id: [read_code(frame) for frame in clip]
        for batch in batches
        for sample_id, clip in zip(batch.sample_ids.tolist(), batch.clips.numpy(), strict=True)
    }
    assert codes == {
        k: [(k, f) for f in range(8)] for k, name in enumerate(FOLDERS) if name not in expected
    }
    training = open_loader(dataset, decoder=image_decoder, sampling=SamplingConfig(num_segments=8))
    sizes = [len(batch.labels) for batch in training.epoch(0)]
    assert sizes == [2] * 6 and training.quarantine.entries[0].split == "train"
