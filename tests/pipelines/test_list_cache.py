"""Long lists: parsed once, taken up afterwards, and nothing is done per file when a run starts."""

import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines import cache, datasets, list_cache, media_index
from pipelines.annotations import VideoSet, read_list
from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import open_dataset
from pipelines.errors import AnnotationError
from pipelines.loader import build_loader


@pytest.fixture(autouse=True)
def _every_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_cache, "_FEWEST_BYTES", 1)


LINES = "".join(f"ü{k}/clip {k}.webm\t{k % 7}\n" for k in range(500))


def config(root: Path, **changes: Any) -> DataConfig:
    lists = {"train_list": "list.txt", "val_list": "list.txt"}
    return DataConfig(root=str(root), cache_dir=str(root / "cache"), **lists, **changes)


def test_the_same_set_without_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text(LINES)
    expected = read_list(tmp_path / "list.txt", root=tmp_path)
    first = open_dataset(config(tmp_path)).train
    calls = []
    parse = datasets.read_list
    monkeypatch.setattr(
        datasets, "read_list", lambda path, **options: calls.append(path) or parse(path, **options)
    )
    again = open_dataset(config(tmp_path)).train
    assert not calls
    for videos in (first, again):
        assert list(videos) == list(expected) and videos == expected
        assert videos.fingerprint == expected.fingerprint and videos.digest == expected.digest
        assert videos.labels.tolist() == expected.labels.tolist()
        assert [name.decode() for name in videos.encoded_names()] == [r.name for r in expected]
    with pytest.raises(ValueError, match="read-only"):
        again.labels[0] = 3
    open_dataset(config(tmp_path, num_classes=9))  # other rules: parsed anew
    assert len(calls) == 1
    (tmp_path / "list.txt").write_text(LINES.replace("clip 7.", "clip x."))
    os.utime(tmp_path / "list.txt", ns=(1, 1))
    assert open_dataset(config(tmp_path)).train[7].name == "ü7/clip x.webm" and len(calls) == 2
    (tmp_path / "list.txt").write_text(LINES + "bad\n")
    for _ in range(2):
        with pytest.raises(AnnotationError, match=r"list\.txt:501: "):
            open_dataset(config(tmp_path))


@pytest.mark.parametrize(
    ("kind", "local"), [("ext4", True), ("nfs4", False), ("fuse.sshfs", False), ("", False)]
)
def test_only_local_files_are_mapped(
    tmp_path: Path,
    make_video: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    local: bool,
) -> None:
    make_video("a.webm", num_frames=6)
    (tmp_path / "list.txt").write_text("a.webm 0\n" * 300)
    device = tmp_path.stat().st_dev
    place = f"{os.major(device)}:{os.minor(device)}" if kind else "9999:1"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 {place} / /data rw,noatime shared:1 - {kind or 'ext4'} host:/x rw\n")
    monkeypatch.setattr(cache, "_MOUNTS", mounts)
    mapped = []

    def noted(*arguments: Any, **options: Any) -> mmap.mmap:
        mapped.append(arguments)
        return mmap.mmap(*arguments, **options)

    used = SimpleNamespace(mmap=noted, ACCESS_READ=mmap.ACCESS_READ)
    monkeypatch.setattr(cache, "mmap", used)
    for _ in range(2):  # the second time from the caches
        videos = open_dataset(config(tmp_path)).train
        index = media_index.index_videos(videos, cache_dir=tmp_path / "cache", threads=1)
        assert videos == read_list(tmp_path / "list.txt", root=tmp_path)
        assert index.num_frames.tolist() == [6] * 300
    assert bool(mapped) == local


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:-1], lambda c: c[:300] + b"?" + c[301:], lambda c: b"x" * 99],
)
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.txt").write_text(LINES)
    expected = list(open_dataset(config(tmp_path)).train)
    (file,) = tmp_path.rglob("*.list")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        assert list(open_dataset(config(tmp_path)).train) == expected
    assert "ignoring an unreadable list cache" in caplog.text
    assert file.read_bytes() == content and not list(tmp_path.rglob("*.tmp-*"))


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.txt").write_text(LINES)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lists").touch()
    assert len(open_dataset(config(tmp_path)).train) == 500
    assert "cannot be kept" in caplog.text


def test_selected_videos(tmp_path: Path) -> None:
    rows = [(f"ü{k}", k, 10 + k, k) for k in range(30)]
    videos = VideoSet(tmp_path, rows)
    for keep in (np.arange(30) % 3 == 0, np.zeros(30, bool), np.ones(30, bool)):
        chosen = [row for row, kept in zip(rows, keep, strict=True) if kept]
        assert videos.selected(keep) == VideoSet(tmp_path, chosen)
        assert list(videos.selected(keep)) == list(VideoSet(tmp_path, chosen))


def test_no_file_is_touched_per_line(
    tmp_path: Path, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warm index, 2 000 lines take as many calls of the system as 40."""
    monkeypatch.setattr(media_index, "_STAMPS_CHECKED", 10)
    for k in range(4):
        make_video(f"{k}.webm", num_frames=6)
    touched: list[object] = []

    def count(name: str) -> None:
        original = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            touched.append((name, arguments[:1]))
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, counted)

    for name in ("stat", "lstat", "open", "scandir", "listdir"):
        count(name)
    calls = {}
    for lines in (40, 2000):
        (tmp_path / "list.txt").write_text("".join(f"{k % 4}.webm 0\n" for k in range(lines)))
        for _ in range(2):
            touched.clear()
            loader = build_loader(
                open_dataset(config(tmp_path)),
                split="train",
                sampling=SamplingConfig(num_segments=4),
                augment=AugmentConfig(size=32, resize=32),
                loader=LoaderConfig(threads=1),
                seed=0,
                micro_batch=4,
                global_batch=4,
            )
        calls[lines] = [call for call in touched if "webm" in str(call)]
        next(loader.epoch(0))
        loader.close()
    assert calls == {40: [], 2000: []}
