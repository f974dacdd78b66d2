"""Folders of JPEG frames: lists, names, pixels, faults, and a whole run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import decoders
from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import AnnotationError, DataError, MediaError
from pipelines.images import (
    find_frame_name,
    image_header,
    probe_frames,
    read_encoded,
    read_images,
)
from pipelines.loader import Loader, build_loader

MakeFrames = Callable[..., Path]
ReadCode = Callable[[np.ndarray], tuple[int, int]]
# dali: DALI decodes; pyav: Pillow decodes, DALI scales; torch: without DALI.
DECODERS = [
    pytest.param("dali", marks=pytest.mark.needs_dali),
    pytest.param("pyav", marks=pytest.mark.needs_dali),
    "torch",
]


def open_set(root: Path, lines: str, **data: Any) -> Dataset:
    (root / "list.txt").write_text(lines)
    lists = {"train_list": "list.txt", "val_list": "list.txt"}
    return open_dataset(DataConfig(root=str(root), cache_dir=str(root / "cache"), **lists, **data))


def open_loader(dataset: Dataset, decoder: str, split: str = "val", **changes: Any) -> Loader:
    with pytest.MonkeyPatch.context() as patch:
        if decoder == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        arguments: dict[str, Any] = {
            "sampling": SamplingConfig(num_segments=4),
            "augment": AugmentConfig(size=64, resize=64, flip=False),
            "loader": LoaderConfig(
                decoder="pyav" if decoder == "pyav" else "auto", threads=2, timeout_s=60
            ),
            "seed": 1,
            "micro_batch": 2,
            "global_batch": 2,
        }
        return build_loader(dataset, split=split, **(arguments | changes))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["segments", "neighbors"])
def test_listed_frames_arrive_with_the_pixels_of_pillow(
    tmp_path: Path, make_frames: MakeFrames, decoder: str, kind: str
) -> None:
    """Windows that are cut but not scaled: the bytes of Pillow, at the right frame and place."""
    lines = ""
    for k in range(5):
        make_frames(f"clips/{k}", num_frames=9 + 4 * k, video=k)
        lines += f"clips/{k} {9 + 4 * k} {k % 3}\n"
    loader = open_loader(
        open_set(tmp_path, lines),
        decoder,
        "train",
        sampling=SamplingConfig(num_segments=4, kind=kind),
        augment=AugmentConfig(size=48, scales=(0.75,)),
    )
    assert decoder != "dali" or loader.description.startswith("DALI decodes")
    for number, batch in enumerate(loader.epoch(2)):
        for sample, clip in zip(loader.samples(2, number), batch.clips, strict=True):
            x0, y0, width, height = sample.views[0].window
            for index, pixels in zip(sample.frame_indices.tolist(), clip.numpy(), strict=True):
                with Image.open(sample.path / f"{index + 1:05d}.jpg") as image:
                    frame = np.asarray(image)[y0 : y0 + height, x0 : x0 + width]
                frame = frame[:, ::-1] if sample.views[0].flip else frame
                assert np.array_equal(pixels, frame)
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_names_offsets_and_modes(
    tmp_path: Path, make_frames: MakeFrames, read_code: ReadCode, decoder: str
) -> None:
    """`offset` is added to the frame numbers; gray, CMYK and PNG files become RGB."""
    make_frames("a", num_frames=30, video=1, frame_name="img_{:05d}.jpg", width=64)
    make_frames("b", num_frames=9, video=2, frame_name="img_{:05d}.jpg", mode="L", width=64)
    make_frames("c", num_frames=9, video=3, frame_name="img_{:05d}.jpg", mode="CMYK", width=64)
    dataset = open_set(tmp_path, "a\t17\t8\t0\na\t0\t8\t0\nb\t0\t9\t1\nc\t0\t9\t2\n")
    loader = open_loader(dataset, decoder)
    clips = [clip for batch in loader.epoch(0) for clip in batch.clips.numpy()]
    codes = [[read_code(frame) for frame in clip] for clip in clips]
    assert codes[0] == [(1, 18), (1, 20), (1, 22), (1, 24)]
    assert codes[1] == [(1, 1), (1, 3), (1, 5), (1, 7)]
    assert codes[2] == [(2, 1), (2, 3), (2, 5), (2, 7)]
    assert codes[3] == [(3, 1), (3, 3), (3, 5), (3, 7)]
    loader.close()


def test_class_folders_of_frames(tmp_path: Path, make_frames: MakeFrames) -> None:
    for label in ("x", "y"):
        for k in range(3):
            make_frames(
                f"set/{label}/{k} ü", num_frames=5 + k, frame_name="{:04d}.PNG", first=k % 2
            )
    data = DataConfig(root=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    dataset = open_dataset(data)
    assert (len(dataset.train), len(dataset.val), dataset.class_names) == (4, 2, ("x", "y"))
    loader = open_loader(dataset, "torch", "train")
    frames = {sample.path.name: sample.info for k in range(2) for sample in loader.samples(0, k)}
    for name, info in frames.items():
        k = int(name[0])
        assert (info.num_frames, info.first_number, info.kind.codec) == (5 + k, k % 2, "png")
    (tmp_path / "set" / "x" / "clip.mp4").touch()
    with pytest.raises(DataError, match=r"both video files .* and folders"):
        open_dataset(data)


def test_the_list_must_fit_the_folder(tmp_path: Path, make_frames: MakeFrames) -> None:
    make_frames("a", num_frames=8)
    dataset = open_set(tmp_path, "a 9 0\nb 3 1\na 8 1\n")
    with pytest.raises(
        DataError, match=r"(?s)2 of 3 .* 00009.jpg is missing .*8 files.*No such file"
    ):
        open_loader(dataset, "torch")
    with pytest.raises(
        AnnotationError, match=r'expected "<folder> <frames> <label>", got 2 fields'
    ):
        open_set(tmp_path, "a 8\n", kind="frames")
    with pytest.raises(AnnotationError, match=r'expected "<path> <label>", got 3 fields'):
        open_set(tmp_path, "a 8 0\n", kind="videos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="numbered JPEG or PNG files, got none"):
        find_frame_name(tmp_path / "empty")
    for bad in ("x.jpg", "{}/{}.jpg", "{:q}.jpg", "{a}.jpg", "../{}.jpg"):
        with pytest.raises(ValueError, match=r"data\.frame_name"):
            DataConfig(frame_name=bad)
    record = open_set(tmp_path, "a 8 0\n").val[0]
    assert probe_frames(record, "{:05d}.jpg").num_frames == 8
    with pytest.raises(MediaError, match=r"img_1\.jpg is missing"):
        probe_frames(record, "img_{}.jpg")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(b""), "got 0 bytes"),
        (lambda path: path.write_text("<html>"), "got other content"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]), ""),
        (lambda path: Image.new("RGB", (64, 96)).save(path), "got 64 x 96"),
    ],
)
def test_faulty_frames_are_named(
    tmp_path: Path,
    make_frames: MakeFrames,
    decoder: str,
    fault: Callable[[Path], object],
    part: str,
) -> None:
    for k in range(4):
        make_frames(str(k), num_frames=8)
    loader = open_loader(open_set(tmp_path, "0 8 0\n1 8 1\n2 8 0\n3 8 1\n"), decoder)
    fault(tmp_path / "2" / "00004.jpg")
    with pytest.raises(MediaError, match=r"2: 00004\.jpg: ") as caught:
        list(loader.epoch(0))
    assert part in str(caught.value)
    loader.close()


def test_image_headers(tmp_path: Path, make_frames: MakeFrames) -> None:
    for mode, name in (("RGB", "{}.jpg"), ("L", "{}.jpg"), ("RGB", "{}.png")):
        folder = make_frames(f"{mode}{name[2:]}", num_frames=1, frame_name=name, mode=mode)
        path = folder / name.format(1)
        assert image_header(path, path.read_bytes())[1:] == (96, 64)
    for content in (b"", b"\xff\xd8", b"\xff\xd8" + bytes(20), b"\xff\xd8\xff\xe0\x00\x00" * 9):
        with pytest.raises(MediaError, match="expected a JPEG or PNG image"):
            image_header(path, content)


def test_files_larger_than_one_read(tmp_path: Path, make_frames: MakeFrames) -> None:
    folder = make_frames("a", num_frames=1, frame_name="{}.png", width=300, height=200)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(noise).save(folder / "1.png")
    assert (folder / "1.png").stat().st_size > 2 * 65_536
    record = open_set(tmp_path, "a 1 0\n").val[0]
    info = probe_frames(record, "{}.png")
    assert read_encoded(folder, info, [0]) == [(folder / "1.png").read_bytes()]
    assert np.array_equal(read_images(folder, info, [0])[0], noise)


@pytest.mark.slow
def test_training_from_folders_of_frames(tmp_path: Path, make_frames: MakeFrames) -> None:
    """train.py on a generated set, from the list to the summary."""
    lines = ""
    for k in range(8):
        make_frames(f"clips/{k}", num_frames=10 + k, video=k, frame_name="img_{:05d}.jpg")
        lines += f"clips/{k} {10 + k} {k % 2}\n"
    (tmp_path / "list.txt").write_text(lines)
    options = {
        "data.root": tmp_path, "data.train_list": "list.txt", "data.val_list": "list.txt",
        "data.cache_dir": tmp_path / "cache", "sampling.num_segments": 4, "augment.size": 32,
        "augment.resize": 32, "model.depth": 18, "model.width": 8, "model.stages": 2,
        "schedule.epochs": 1, "train.global_batch": 4, "train.micro_batch": 4,
        "loader.threads": 1, "run.device": "cpu", "out": tmp_path / "run",
    }  # fmt: skip
    train = Path(__file__).parents[2] / "train.py"
    command = [sys.executable, str(train), "--recipe", "own_videos"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "summary.json").exists()
