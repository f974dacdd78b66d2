"""Packed shards: the same bits as from files, only what is sampled is read, faults are named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.cli.main import main
from pipelines import decoders, packets
from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import open_dataset
from pipelines.errors import DataError
from pipelines.loader import Loader, build_loader
from pipelines.shards import HEADER_BYTES, Shard

MakeMedia = Callable[..., Path]
GOP = {"g": "6", "keyint_min": "6"}
# Set -> how its videos are made.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": (".mp4", {"codec": "libx264", "options": {**GOP, "bf": "2", "preset": "medium"}}),
    "vp9": (".webm", {"codec": "libvpx-vp9", "options": {**GOP, "cpu-used": "8"}}),
    "mpeg4": (".avi", {"codec": "mpeg4"}),
}


@pytest.fixture
def make_set(make_video: MakeMedia, make_frames: MakeMedia, tmp_path: Path) -> Callable[..., Path]:
    """A folder of five videos with a list: make_set("h264")."""

    def make(kind: str) -> Path:
        lines = []
        for k in range(5):
            if kind == "jpeg":
                make_frames(f"in/clips/{k}", num_frames=18 + k, video=k, frame_name="f{:03d}.jpg")
                lines.append(f"clips/{k} {18 + k} {k % 3}\n")
            else:
                suffix, options = FILES[kind]
                make_video(f"in/clips/{k}{suffix}", num_frames=18 + k, video=k, **options)
                lines.append(f"clips/{k}{suffix} {k % 3}\n")
        (tmp_path / "in" / "list.txt").write_text("".join(lines))
        return tmp_path / "in"

    return make


def pack(root: Path, out: Path, *options: str) -> int:
    shards = ["--shards", "2", "--threads", "2", *options]
    return main(
        ["data", "prepare", "--root", str(root), "--list", "list.txt", "--out", str(out), *shards]
    )


def open_loader(root: Path, decoder: str = "auto") -> Loader:
    lists = {"train_list": "list.txt", "val_list": "list.txt"}
    dataset = open_dataset(DataConfig(root=str(root), cache_dir=str(root / "cache"), **lists))
    with pytest.MonkeyPatch.context() as patch:
        if decoder == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(
            dataset,
            split="train",
            sampling=SamplingConfig(num_segments=4),
            augment=AugmentConfig(size=48, flip=True),
            loader=LoaderConfig(
                decoder=decoder if decoder != "torch" else "auto",  # type: ignore[arg-type]
                threads=2,
                timeout_s=60,
            ),
            seed=3,
            micro_batch=5,
            global_batch=5,
        )


def clips(loader: Loader) -> np.ndarray:
    (batch,) = loader.epoch(1)
    loader.close()
    return batch.clips.numpy()


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        pytest.param("jpeg", "dali", marks=pytest.mark.needs_dali),
        pytest.param("jpeg", "pyav", marks=pytest.mark.needs_dali),
        ("jpeg", "torch"),
        pytest.param("vp9", "dali", marks=pytest.mark.needs_dali_video),
        pytest.param("vp9", "pyav", marks=pytest.mark.needs_dali),
        ("vp9", "torch"),
        pytest.param("h264", "pyav", marks=pytest.mark.needs_dali),
        ("h264", "torch"),
    ],
)
def test_packed_videos_give_the_same_bits(
    tmp_path: Path, make_set: Callable[..., Path], kind: str, decoder: str
) -> None:
    root, out = make_set(kind), tmp_path / "out"
    assert pack(root, out, "--codec", "copy") == 0
    names = [line.split("\t")[0] for line in (out / "list.txt").read_text().splitlines()]
    suffix = FILES[kind][0] if kind in FILES else ""
    assert names == [f"0000{k // 2}.shard/clips/{k}{suffix}" for k in range(5)]
    shutil.copytree(root, tmp_path / "files")
    shutil.rmtree(root)  # nothing of the originals is needed
    assert np.array_equal(
        clips(open_loader(out, decoder)), clips(open_loader(tmp_path / "files", decoder))
    )
    # A record is the original, byte by byte.
    record = Shard(out / "00001.shard").record(f"clips/2{suffix}")
    files = sorted((tmp_path / "files" / f"clips/2{suffix}").glob("*")) or [
        tmp_path / "files" / f"clips/2{suffix}"
    ]
    assert record.content == b"".join(file.read_bytes() for file in files)


@pytest.mark.parametrize("kind", ["jpeg", "h264"])
def test_only_what_is_sampled_is_read(
    tmp_path: Path,
    make_set: Callable[..., Path],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, out = make_set(kind), tmp_path / "out"
    assert pack(root, out, "--codec", "copy") == 0
    monkeypatch.setattr(packets, "_GAP_BYTES", 0)
    loader = open_loader(out, "torch")
    wanted = 0
    for sample in loader.samples(1, 0):
        table = sample.info.packets
        assert table is not None and str(sample.path.parents[1]).endswith(".shard")
        wanted += int(table.sizes[np.concatenate(table.spans(sample.frame_indices.tolist()))].sum())
    read = []
    real = os.pread

    def counted(handle: int, count: int, place: int) -> bytes:
        content = real(handle, count, place)
        read.append(len(content))
        return content

    monkeypatch.setattr(packets.os, "pread", counted)
    clips(loader)
    total = sum(path.stat().st_size for path in out.glob("*.shard"))
    # `samples` above read the packet tables through the same function; an epoch reads them again.
    assert wanted <= sum(read) < wanted + 5 * 1024 and wanted < 0.8 * total


def change(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        handle.write(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "00000.shard: the shard cannot be read: No such file"),
    "empty": (
        lambda path: path.write_bytes(b""),
        "expected a shard of accel data prepare, got 0 b",
    ),
    "other": (lambda path: path.write_text("<html>"), "prepare, got other content"),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size - 9), "the shard is cut off"),
    "header": (lambda path: change(path, 20, b"\xff"), "the header of the shard is damaged"),
    "index": (lambda path: change(path, path.stat().st_size - 1, b"!"), "a wrong checksum"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_shard_is_named_in_one_sentence(
    tmp_path: Path,
    make_set: Callable[..., Path],
    fault: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, out = make_set("jpeg"), tmp_path / "out"
    assert pack(root, out, "--codec", "copy") == 0
    damage, part = FAULTS[fault]
    damage(out / "00000.shard")
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    capsys.readouterr()
    sentence = r"2 of 5 videos cannot be used, allowed 0 .*\n.*\n +2  .*00000\.shard: [^\n]*$"
    with pytest.raises(DataError, match=sentence) as error:
        open_loader(out, "torch")
    assert str(error.value).count(part) == 1
    assert main(["data", "stats", "--root", str(out), "--list", "list.txt"]) == 3
    output = capsys.readouterr()
    assert part in output.out and "2 cannot be used" in output.out and not output.err
    for quick in ([], ["--quick"]):
        assert main(["data", "check", "--root", str(out), "--list", "list.txt", *quick]) == 3
        output = capsys.readouterr().out
        assert output.count(part) == 1 and "(2 videos)\n5 lines checked, 2 videos cannot" in output
        assert "mend the shard" in output and not (out / "deny.txt").exists()
    # What is there is repaired by the same command.
    assert pack(root, out, "--codec", "copy") == 0
    assert "2 copies written, 3 kept, 0 failed" in capsys.readouterr().out
    assert len(Shard(out / "00000.shard").names) == 2


def test_faults_after_the_index_was_made(tmp_path: Path, make_set: Callable[..., Path]) -> None:
    root, out = make_set("jpeg"), tmp_path / "out"
    assert pack(root, out, "--codec", "copy") == 0
    loader = open_loader(out, "torch")
    os.truncate(out / "00001.shard", 5000)
    with pytest.raises(
        DataError, match=r"00001.shard/clips/[23]: expected \d+ bytes as indexed, got"
    ):
        clips(loader)
    (out / "00001.shard").unlink()
    with pytest.raises(
        DataError, match=r"00001.shard/clips/[23]: cannot be read any more: No such"
    ):
        clips(loader)


def test_damaged_records_are_found_and_packed_again(
    tmp_path: Path, make_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Through encoding: copies are packed, checked, repaired, and a mended original is added."""
    root, out = make_set("vp9"), tmp_path / "out"
    good = (root / "clips/3.webm").read_bytes()
    (root / "clips/3.webm").write_bytes(good[:500])
    assert pack(root, out, "--short-side", "48", "--gop", "4") == 3
    output = capsys.readouterr().out
    assert "not copied: clips/3.webm" in output and "4 copies written, 0 kept, 1 failed" in output
    assert not list(out.rglob("*.mp4")) and Shard(out / "00001.shard").names == ["clips/2.mp4"]
    check = ["data", "check", "--root", str(out), "--list", "list.txt", "--threads", "1"]
    assert main(check) == 0
    change(out / "00000.shard", HEADER_BYTES + 2000, b"damage")
    assert main(check) == 3
    output = capsys.readouterr().out
    assert "bad  00000.shard/clips/0.mp4: its bytes in the shard have a wrong checksum" in output
    assert "delete the shard, then copy it again, or run accel data prepare again" in output
    (out / "00000.shard").unlink()
    stamp = (out / "00002.shard").stat().st_mtime_ns
    (root / "clips/3.webm").write_bytes(good)
    assert pack(root, out, "--short-side", "48", "--gop", "4") == 0
    assert "3 copies written, 2 kept, 0 failed" in capsys.readouterr().out
    assert main(check) == 0
    assert Shard(out / "00001.shard").names == ["clips/2.mp4", "clips/3.mp4"]
    assert (out / "00002.shard").stat().st_mtime_ns == stamp
    assert pack(root, out, "--short-side", "48") == 3  # other settings
    assert "other settings" in capsys.readouterr().err


def test_originals_that_changed_are_packed_again(
    tmp_path: Path, make_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Frames written anew (the folder keeps its time), and some with the times of older ones."""
    root, out = make_set("jpeg"), tmp_path / "out"
    assert pack(root, out, "--codec", "copy") == 0
    shutil.copy(root / "clips/3/f005.jpg", root / "clips/0/f005.jpg")
    shutil.copy(root / "clips/1/f007.jpg", root / "clips/4/f007.jpg")
    os.utime(root / "clips/4/f007.jpg", (1e9, 1e9))
    for folder in ("clips/0", "clips/4"):
        os.utime(root / folder, (1e9, 1e9))
    shutil.rmtree(root / "clips/2")  # gone: stays as packed
    capsys.readouterr()
    assert pack(root, out, "--codec", "copy") == 0
    assert "2 copies written, 3 kept, 0 failed" in capsys.readouterr().out
    packed = Shard(out / "00000.shard").record("clips/0").content
    assert (root / "clips/3/f005.jpg").read_bytes() in packed
    assert pack(root, out, "--codec", "copy") == 0
    assert "0 copies written, 5 kept, 0 failed" in capsys.readouterr().out


def test_what_cannot_be_packed_is_refused(
    tmp_path: Path, make_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_set("mpeg4"), tmp_path / "out"
    assert pack(root, out, "--codec", "copy") == 3
    assert "clips/0.avi: mpeg4 in avi whose packets cannot be cut out; encode it anew" in (
        capsys.readouterr().out
    )
    command = ["data", "prepare", "--root", str(root), "--list", "list.txt", "--out", str(out)]
    assert main([*command, "--codec", "copy"]) == 2
    assert "--shards: expected it with --codec copy" in capsys.readouterr().err
    assert main([*command, "--shards", "-1"]) == 2
    assert pack(root, tmp_path / "h264", "--short-side", "48") == 0
    assert pack(tmp_path / "h264", tmp_path / "again", "--short-side", "48") == 3
    assert "is packed already" in capsys.readouterr().err


@pytest.mark.multi_process
def test_a_killed_run_is_continued(
    tmp_path: Path, make_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_set("jpeg"), tmp_path / "out"
    arguments = ["data", "prepare", "--root", str(root), "--list", "list.txt", "--out", str(out)]
    arguments += ["--codec", "copy", "--shards", "1", "--threads", "1"]
    # The process kills itself in the middle of its third shard.
    script = f"""
import os, signal
from accel.cli.main import main
from pipelines import packing
write, count = packing.write_shard, 0
def killed(path, records):
    global count
    count += 1
    if count == 3:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, records)
packing.write_shard = killed
main({arguments!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(out.glob("*.part-*"))) == 1 and not (out / "list.txt").exists()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("0000[01].shard")}
    assert len(stamps) == 2
    time.sleep(0.01)
    assert main(arguments) == 0
    assert "3 copies written, 2 kept, 0 failed" in capsys.readouterr().out
    assert not list(out.glob("*.part-*"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert np.array_equal(clips(open_loader(out, "torch")), clips(open_loader(root, "torch")))


def test_reads_that_give_less_go_on_and_folders_may_be_called_like_shards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_set: Callable[..., Path]
) -> None:
    root = make_set("h264")
    assert pack(root, tmp_path / "raw.shard") == 0
    (name,) = (line.split()[0] for line in (tmp_path / "raw.shard/list.txt").open() if "/0" in line)
    path = tmp_path / "raw.shard" / name
    assert packets.media_file(path).name == "00000.shard"

    whole = packets.media_file(path).read_bytes()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, place: pread(fd, min(size, 100), place))
    with packets.media_file(path).open("rb") as handle:
        assert packets._read_at(handle.fileno(), len(whole) - 7, 7) == whole[7:]
        with pytest.raises(OSError, match="ends 3 bytes too early"):
            packets._read_at(handle.fileno(), len(whole), 3)
