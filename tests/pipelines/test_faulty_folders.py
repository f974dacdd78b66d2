"""Every kind of faulty folder of frames: decoded to what it holds, or left out with a reason.

Row D2 of the fault matrix.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.annotations import read_list
from pipelines.config import DataConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import DataError
from pipelines.loader import Loader
from pipelines.quarantine import Quarantine
from pipelines.streaming import read_frames
from pipelines.tube_data import TubeSet

ReadCode = Callable[[np.ndarray], tuple[int, int]]


def first(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.4)])


def as_16_bit_png(path: Path) -> None:
    gray = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
    Image.fromarray(gray * 257).save(path, format="PNG")


def turned(path: Path) -> None:
    """Marked as lying on its side; its pixels stay."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif, quality=95)


def cmyk_without_marker(path: Path) -> None:
    Image.open(path).convert("CMYK").save(path)
    content = path.read_bytes()
    start = content.index(b"\xff\xee")
    end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    path.write_bytes(content[:start] + content[end:])


def each(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(path) for path in sorted(folder.iterdir())]


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
    "with  two blanks": (None, ""),
    "gray": (each(lambda p: Image.open(p).convert("L").save(p)), ""),
    "cmyk": (each(lambda p: Image.open(p).convert("CMYK").save(p)), ""),
    "cmyk without marker": (each(cmyk_without_marker), "00001.jpg: expected an RGB or gray image"),
    "png": (each(lambda p: Image.open(p).save(p, format="PNG")), ""),
    "16-bit png": (each(as_16_bit_png), ""),
    "turned": (each(turned), ""),
    "upper case": (each(lambda p: p.rename(p.with_suffix(".JPG"))), "00001.jpg is missing"),
    "more than listed": (lambda f: (f / "00009.jpg").write_bytes(b"not of this clip"), ""),
}  # fmt: skip


def test_every_kind_of_faulty_folder(
    tmp_path: Path,
    make_frames: Callable[..., Path],
    open_loader: Callable[..., Loader],
    read_code: ReadCode,
    image_decoder: str,
) -> None:
    """D2: as D1."""
    lines, originals = "", list[np.ndarray]()
    for number, (name, (change, _)) in enumerate(FOLDERS.items()):
        folder = make_frames(f"clips/{name}", num_frames=8, video=number, width=64)
        lines += f"clips/{name}\t8\t{number % 3}\n"
        files = sorted(folder.iterdir())
        originals.append(np.stack([np.asarray(Image.open(path)) for path in files]))
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
    codes = {}
    for batch in batches:
        for sample_id, clip in zip(batch.sample_ids.tolist(), batch.clips.numpy(), strict=True):
            codes[sample_id] = [read_code(frame) for frame in clip]
            difference = np.abs(clip.astype(int) - originals[sample_id]).mean()
            assert difference < 1.5, list(FOLDERS)[sample_id]
    assert codes == {
        k: [(k, f) for f in range(8)] for k, name in enumerate(FOLDERS) if name not in expected
    }
    training = open_loader(dataset, decoder=image_decoder, sampling=SamplingConfig(num_segments=8))
    sizes = [len(batch.labels) for batch in training.epoch(0)]
    assert (
        sizes == [2] * (len(FOLDERS) // 4 * 2) and training.quarantine.entries[0].split == "train"
    )


def test_every_reader_of_images_scales_16_bit(
    tmp_path: Path, make_frames: Callable[..., Path]
) -> None:
    """Also those of detection, whose names end with .jpg whatever is in the files."""
    folder = make_frames("rgb-images/clip", num_frames=2)
    gray = [np.asarray(Image.open(path).convert("L")) for path in sorted(folder.iterdir())]
    expected = np.stack([gray] * 3, axis=-1)
    each(as_16_bit_png)(folder)
    assert np.array_equal(np.stack(list(read_frames(str(folder)))), expected)
    tubes = TubeSet(tmp_path, None, (), (), ())
    assert np.array_equal(tubes.read("rgb", SimpleNamespace(name="clip"), [1, 2]), expected)


def test_a_wrong_number_of_frames_is_said_once(
    tmp_path: Path,
    make_frames: Callable[..., Path],
    open_loader: Callable[..., Loader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Over several epochs, and when the run is resumed."""
    for k in range(4):
        make_frames(f"{k}", num_frames=8, video=k)
    (tmp_path / "list.txt").write_text("0 8 0\n1 9 1\n2 8 2\n3 5 0\n")
    videos = read_list(tmp_path / "list.txt", root=tmp_path)
    dataset = Dataset(videos, videos, ("a", "b", "c"), tmp_path / "cache")
    for _ in range(2):
        facts = {"split": "train", "max_bad_fraction": 0.5, "path": tmp_path / "quarantine.csv"}
        quarantine = Quarantine(videos, **facts)
        loader = open_loader(dataset, quarantine=quarantine)
        for epoch in range(3):
            list(loader.epoch(epoch))
        assert [entry.sample_id for entry in quarantine.entries] == [1]
        assert caplog.text.count("00009.jpg is missing (the folder has 8 files)") == 1
    assert (tmp_path / "quarantine.csv").read_text().count("00009.jpg") == 1


NAMES = [
    "a  b",
    "ü 電",
    "line\nbreak",
    "tab\there",
    "return\rhere",
    " blanks ",
    "'\"{}%s",
    "e\u2028f",
]


def test_any_name(
    tmp_path: Path,
    make_frames: Callable[..., Path],
    open_loader: Callable[..., Loader],
    read_code: ReadCode,
    image_decoder: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Clips of class folders; the file of unusable ones holds them, messages stay on one line."""
    for number, name in enumerate(NAMES):
        make_frames(f"set/{'xy'[number % 2]}/{name}", num_frames=8, video=number, width=64)
    data = DataConfig(root=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    dataset = replace(open_dataset(data), max_bad_fraction=0.99)
    videos = dataset.train
    assert len(videos) == 6 and len(dataset.val) == 2
    for split, part in (("train", videos), ("val", dataset.val)):
        loader = open_loader(dataset, split, decoder=image_decoder)
        numbers = [NAMES.index(video.path.name) for video in part]
        for batch in loader.epoch(0):
            ids = batch.sample_ids.tolist()
            for sample_id, clip in zip(ids, batch.clips.numpy(), strict=True):
                assert read_code(clip[0])[0] == numbers[sample_id]
    for video in videos[1:]:
        (video.path / "00001.jpg").unlink()
    facts = {"split": "train", "max_bad_fraction": 0.99, "path": tmp_path / "quarantine.csv"}
    first = open_loader(dataset, decoder=image_decoder, quarantine=Quarantine(videos, **facts))
    assert len(list(first.epoch(0))) == 2
    again = Quarantine(videos, **facts)
    assert again.entries == first.quarantine.entries
    assert {entry.path for entry in again.entries} == {video.name for video in videos[1:]}
    assert all("\n" not in record.getMessage() for record in caplog.records)
    with pytest.raises(DataError) as caught:
        open_loader(replace(dataset, max_bad_fraction=0.0), decoder=image_decoder)
    assert len(str(caught.value).splitlines()) == 3, str(caught.value)


UNREADABLE = """
import os, sys
from pathlib import Path
from pipelines.annotations import VideoSet, read_list
from pipelines.config import DataConfig
from pipelines.datasets import open_dataset
from pipelines.errors import DataError
from pipelines.images import probe_frames, read_images
from pipelines.media_index import index_videos

root = Path(sys.argv[1])
for name in ("frames/1", "frames/2/00001.jpg", "frames/3/00004.jpg", "videos/x/1.webm", "videos/y"):
    (root / name).chmod(0)
for folder, kind in (("frames", "frames"), ("videos", "videos")):
    videos = read_list(root / f"{folder}.txt", root=root / folder, kind=kind)
    frames = videos if folder == "frames" else frames
    infos = index_videos(videos, cache_dir=root / "cache", threads=1, tolerated=9)
    for number, problem in infos.problems.items():
        print(folder, videos[number].name, problem)
try:
    read_images(root / "frames/3", probe_frames(frames[3], "{:05d}.jpg"), [0, 3])
except DataError as error:
    print(error)
try:
    open_dataset(DataConfig(root=str(root / "videos")))
except DataError as error:
    print(error)
"""


def without_privileges() -> None:
    """Root's programs started from here on may do no more than modes of files permit."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_files_that_must_not_be_read(
    tmp_path: Path, make_frames: Callable[..., Path], make_video: Callable[..., Path]
) -> None:
    for k in range(4):
        make_frames(f"frames/{k}", num_frames=8, video=k)
    for name in ("x/0", "x/1", "y/0", "y/1"):
        make_video(f"videos/{name}.webm", num_frames=4)
    (tmp_path / "frames.txt").write_text("".join(f"{k} 8 0\n" for k in range(4)))
    (tmp_path / "videos.txt").write_text("x/0.webm 0\nx/1.webm 0\ny/0.webm 0\n")
    answer = subprocess.run(  # really refused: not even root may read what its mode forbids
        [sys.executable, "-c", UNREADABLE, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=without_privileges,
    )
    (tmp_path / "videos/y").chmod(0o700)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.replace(f"{tmp_path}/", "").splitlines()
    assert lines == [
        "frames 1 cannot be read: Permission denied.",
        "frames 2 00001.jpg: cannot be read: Permission denied.",
        "videos x/1.webm cannot be read: Permission denied; check the list and data.root.",
        "videos y/0.webm cannot be read: Permission denied; check the list and data.root.",
        "frames/3/00004.jpg: cannot be read: Permission denied.",
        "videos/y: cannot be read: Permission denied.",
    ]
