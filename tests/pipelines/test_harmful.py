"""Videos that kill the process that reads them, or never come back: row D4 of the fault matrix.

The faults are real ones, in real processes: a module that Python imports at its start makes the
functions that open or decode a video crash, or sleep, for one of them.
"""

import errno
import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import decoders, in_flight
from pipelines.audit import audit
from pipelines.config import AugmentConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset
from pipelines.decode import read_frames
from pipelines.errors import DataError, HangError, MediaError
from pipelines.in_flight import InFlight, find_harmful, left_behind
from pipelines.loader import Loader, build_loader
from pipelines.media_index import index_videos
from pipelines.quarantine import Quarantine

MakeVideo = Callable[..., Path]
VICTIM = 5
FAULTS = {
    "crash": "ctypes.string_at(0)",
    "hang": "time.sleep(10**6)",
    "kill": "os.kill(os.getpid(), 9) if os.environ.get('KILLED') else None",
}
# Named like the module that Python imports at its start, from the environment's PYTHONPATH.
SITECUSTOMIZE = """
import ctypes, os, time
import {module} as module
original = module.{function}

def faulty(first, *arguments, **options):
    if "{victim:02d}." in str(getattr(first, "path", first)):
        {fault}
    return original(first, *arguments, **options)

module.{function} = faulty
"""
FAULTY = {
    "dali": ("pipelines.trim", "trimmed_stream"),
    "pyav": ("pipelines.decode", "read_frames"),
    "torch": ("pipelines.decode", "read_frames"),
    "audit": ("pipelines.audit", "_file"),
    "probe": ("pipelines.media", "open_video"),
}
DRIVER = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from pipelines import prefetch
from test_harmful import contents, open_loader, videos_of
prefetch.JOIN_TIMEOUT_S = 0.5
videos = videos_of(Path({root!r}))
loaders = [open_loader(videos, {split!r}, decoder={decoder!r}) for _ in range({loaders})]
print(json.dumps([contents(loader) for loader in loaders]))
"""


def videos_of(root: Path) -> Dataset:
    """The twelve videos of the fixture."""
    from pipelines.annotations import VideoSet

    videos = VideoSet(root, [(f"{k:02d}.webm", k % 3) for k in range(12)])
    return Dataset(videos, videos, ("a", "b", "c"), root / "cache", max_bad_fraction=0.34)


def open_loader(dataset: Dataset, split: str = "train", **changes: Any) -> Loader:
    decoder = changes.pop("decoder", "torch")
    timeout_s = changes.pop("timeout_s", 5.0)
    name = "pyav" if decoder == "torch" else decoder
    with pytest.MonkeyPatch.context() as patch:
        if decoder == "torch":
            patch.setattr(decoders, "dali_installed", lambda: False)
        return build_loader(
            dataset,
            split=split,
            sampling=SamplingConfig(num_segments=4),
            augment=AugmentConfig(size=64, resize=64, scales=(1.0,), flip=False),
            loader=LoaderConfig(threads=2, decoder=name, timeout_s=timeout_s, prefetch=1),
            seed=3,
            micro_batch=2,
            global_batch=4,
            **changes,
        )


def contents(loader: Loader, epoch: int = 0) -> list[Any]:
    """Ids, pixels (sums) and missing ids of the batches of an epoch."""
    return [
        [b.sample_ids.tolist(), b.clips.long().sum((1, 2, 3, 4)).tolist(), list(b.missing)]
        for b in loader.epoch(epoch)
    ]


@pytest.fixture
def dataset(make_video: MakeVideo, tmp_path: Path) -> Dataset:
    """Twelve VP9 clips of 8 frames; a third of them may be bad."""
    for k in range(12):
        make_video(f"{k:02d}.webm", num_frames=8, video=k)
    return videos_of(tmp_path)


@pytest.fixture
def inject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """inject("pyav", "crash"): every process that starts from now on fails so at the victim."""
    paths = [str(tmp_path / "faults"), str(Path(decoders.__file__).resolve().parents[1])]

    def start(where: str, fault: str) -> None:
        module, function = FAULTY[where]
        (tmp_path / "faults").mkdir()
        (tmp_path / "faults/sitecustomize.py").write_text(
            SITECUSTOMIZE.format(
                module=module, function=function, victim=VICTIM, fault=FAULTS[fault]
            )
        )
        monkeypatch.setenv("PYTHONPATH", ":".join(paths))

    return start


def run_one_epoch(
    root: Path, split: str, decoder: str, loaders: int = 1
) -> subprocess.CompletedProcess[str]:
    """In another process, which prints the contents of an epoch of each of its loaders."""
    tests = str(Path(__file__).parent)
    driver = DRIVER.format(
        tests=tests, root=str(root), split=split, decoder=decoder, loaders=loaders
    )
    return subprocess.run(
        [sys.executable, "-c", driver], capture_output=True, text=True, timeout=100
    )


def test_a_crash_takes_the_video_out(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None], decoder: str
) -> None:
    """The process dies; the next one knows why, and goes on without the video."""
    inject(decoder, "crash")
    died = run_one_epoch(tmp_path, "train", decoder)
    assert died.returncode == -signal.SIGSEGV, died.stderr
    assert len(list((tmp_path / "cache/media").glob("*.reading-*"))) == 1

    loader = open_loader(dataset, decoder=decoder)
    (entry,) = loader.quarantine.entries
    assert entry.sample_id == VICTIM
    assert entry.reason == "kills the process that reads it (SIGSEGV)"
    got = contents(loader)
    loader.close()
    assert not list((tmp_path / "cache/media").glob("*.reading-*"))

    expected = open_loader(dataset, decoder=decoder, quarantine=known_bad(dataset))
    assert contents(expected) == got  # the same stand-in, all others as they were
    assert VICTIM not in [k for ids, _, _ in got for k in ids]


def known_bad(dataset: Dataset) -> Quarantine:
    quarantine = Quarantine(dataset.train, split="train", max_bad_fraction=0.34)
    quarantine.add(VICTIM, "known")
    return quarantine


def test_an_evaluation_leaves_it_out_as_wrong(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None]
) -> None:
    inject("torch", "crash")
    assert run_one_epoch(tmp_path, "val", "torch").returncode == -signal.SIGSEGV
    again = run_one_epoch(tmp_path, "val", "torch")  # would die again if it tried
    assert again.returncode == 0, again.stderr
    assert "05.webm" in again.stderr and "SIGSEGV" in again.stderr
    loader = open_loader(dataset, "val")
    assert [k for _, _, missing in contents(loader) for k in missing] == [VICTIM]


def test_a_repaired_video_is_used_again(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None]
) -> None:
    """What a video did counts for as long as its file stays as it is, and no longer."""
    inject("torch", "crash")
    assert run_one_epoch(tmp_path, "train", "torch").returncode == -signal.SIGSEGV
    assert len(open_loader(dataset).quarantine) == 1
    assert len(open_loader(dataset).quarantine) == 1  # nothing is examined again
    path = dataset.train[VICTIM].path
    path.write_bytes(dataset.train[VICTIM - 1].path.read_bytes())
    loader = open_loader(dataset)
    assert len(loader.quarantine) == 0
    assert VICTIM in [k for epoch in range(2) for ids, _, _ in contents(loader, epoch) for k in ids]


def test_without_tolerance_the_sentence_names_the_file(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None]
) -> None:
    inject("torch", "crash")
    assert run_one_epoch(tmp_path, "train", "torch").returncode == -signal.SIGSEGV
    with pytest.raises(MediaError, match=r"05\.webm: kills the process that reads it"):
        open_loader(replace(dataset, max_bad_fraction=0.0))
    assert len(open_loader(dataset).quarantine) == 1  # it is still known


def test_a_hang_takes_the_video_out_and_the_epoch_goes_on(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None]
) -> None:
    """No batch is lost, none comes twice, and the stand-in is that of a video known to be bad."""
    healthy = contents(open_loader(dataset))
    known = contents(open_loader(dataset, quarantine=known_bad(dataset)))
    inject("torch", "hang")
    run = run_one_epoch(tmp_path, "train", "torch")
    assert run.returncode == 0, run.stderr
    assert "05.webm" in run.stderr and "hangs: not read within 5 s" in run.stderr
    assert json.loads(run.stdout) == [known] and known != healthy


def test_evaluations_that_hang_one_after_the_other_go_on(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None]
) -> None:
    """Each finds the video out for itself: it may be the storage's fault of today."""
    healthy = contents(open_loader(dataset, "val"))
    inject("torch", "hang")
    run = run_one_epoch(tmp_path, "val", "torch", loaders=2)
    assert run.returncode == 0, run.stderr
    place = VICTIM // 2
    for got in json.loads(run.stdout):
        assert got[place][0] == [VICTIM - 1] and got[place][2] == [VICTIM]
        assert got[:place] + got[place + 1 :] == healthy[:place] + healthy[place + 1 :]
    assert len(open_loader(dataset, "val").quarantine) == 0


@pytest.mark.needs_dali_video
def test_a_hang_in_the_measurement_of_decoders(
    dataset: Dataset, inject: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_FEWEST_VIDEOS", 1)
    released = threading.Event()

    def hang(sample: Any, **options: Any) -> Any:
        if sample.sample_id == VICTIM:
            released.wait(60)
        return read_frames(sample, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.decoder_settings.read_frames", hang)
        with pytest.raises(HangError, match=r"1 clips are not read within .* 5 \(.*05\.webm\)"):
            open_loader(dataset, decoder="auto", timeout_s=1.0)
    released.set()
    inject("pyav", "hang")
    loader = open_loader(dataset, decoder="auto")
    assert [entry.sample_id for entry in loader.quarantine.entries] == [VICTIM]
    assert "measured" in loader.description


def test_a_killed_process_harms_no_video(
    dataset: Dataset,
    tmp_path: Path,
    inject: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inject("torch", "kill")
    monkeypatch.setenv("KILLED", "1")
    assert run_one_epoch(tmp_path, "train", "torch").returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache/media").glob("*.reading-*"))) == 1
    monkeypatch.delenv("KILLED")
    assert len(open_loader(dataset).quarantine) == 0
    assert not list((tmp_path / "cache/media").glob("*.reading-*"))


@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_a_video_that_kills_the_index(
    dataset: Dataset, tmp_path: Path, inject: Callable[[str, str], None], fault: str
) -> None:
    inject("probe", fault)
    driver = DRIVER.format(
        tests=str(Path(__file__).parent),
        root=str(tmp_path),
        split="train",
        decoder="torch",
        loaders=1,
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache").glob("media/*.probing.reading-*")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1.0)  # it looks at twelve small files
        for _ in range(2 * (fault == "hang")):  # as people end it, before they kill it
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()

    def problems() -> dict[int, str]:
        return index_videos(
            dataset.train, cache_dir=dataset.cache_dir, threads=2, tolerated=4, timeout_s=4.0
        ).problems

    what = {
        "crash": "kills the process that reads it (SIGSEGV)",
        "hang": "hangs: not read within 5 s",
    }
    assert problems() == {VICTIM: what[fault]}
    assert problems() == {VICTIM: what[fault]}
    with pytest.raises(MediaError, match=r"05\.webm: (kills|hangs)"):
        index_videos(dataset.train, cache_dir=dataset.cache_dir, threads=2)


@pytest.mark.parametrize("where", ["audit", "probe"])
def test_the_audit_survives_it(
    dataset: Dataset, inject: Callable[[str, str], None], where: str
) -> None:
    inject(where, "crash")
    (finding,) = audit(dataset.train, threads=2)
    assert finding.record == dataset.train[VICTIM] and finding.fatal
    assert finding.reason == "kills the process that reads it (SIGSEGV)"


@pytest.mark.parametrize("packed", [[], ["--codec", "copy", "--shards", "5"]])
def test_prepare_goes_on_without_it(
    dataset: Dataset, inject: Callable[[str, str], None], tmp_path: Path, packed: list[str]
) -> None:
    inject("probe", "crash")
    lines = "".join(f"{record.name} 0\n" for record in dataset.train)
    (tmp_path / "list.txt").write_text(lines)
    options = ["--root", str(tmp_path), "--list", "list.txt", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "accel.cli.main", "data", "prepare", *options, *packed]
    codes = []
    for _ in range(3):
        done = subprocess.run([*command, "--threads", "2"], capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes == [-signal.SIGSEGV, 3, 3], done.stderr  # the third time, it is not tried again
    assert "not copied: 05.webm: kills the process that reads it (SIGSEGV)" in done.stdout
    assert "11 kept, 1 failed" in done.stdout
    assert len((tmp_path / "out" / "list.txt").read_text().splitlines()) == 11
    assert not list((tmp_path / "out").glob("*.reading-*"))


def test_the_audit_says_that_it_was_killed(
    dataset: Dataset, inject: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject("audit", "kill")
    monkeypatch.setenv("KILLED", "1")
    with pytest.raises(DataError, match=r"exit code -9; it was reading .*05\.webm.* fewer"):
        list(audit(dataset.train, threads=1))


TASKS = """
import ctypes, os, threading, time

def read(items, report):
    for number, item in enumerate(items):
        report(number)
        if "once" in item:  # slow the first time alone
            if not os.path.exists(item):
                open(item, "w").close()
                time.sleep(60)
            continue
        {"sleep": lambda: time.sleep(60), "crash": lambda: ctypes.string_at(0), "good": int,
         "late": lambda: threading.Timer(0.3, ctypes.string_at, (0,)).start(),
         "slow": lambda: time.sleep(1.0),
         "abort": os.abort, "killed": lambda: os.kill(os.getpid(), 9)}[item]()
"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task of a module that a new process can import, too."""
    (tmp_path / "tasks_of_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("tasks_of_test").read


def test_every_guilty_item_is_found(read: Any) -> None:
    found = find_harmful(read, ["good", "crash", "good", "killed", "abort"], timeout_s=20.0)
    assert {k: end.what for k, end in found.items()} == {
        1: "kills the process that reads it (SIGSEGV)",
        4: "kills the process that reads it (SIGABRT)",
    }


def test_a_late_crash_is_not_blamed_on_the_next_item(read: Any) -> None:
    assert find_harmful(read, ["late", "slow", "good"], timeout_s=20.0) == {}


def test_storage_that_does_not_answer_is_no_fault_of_a_video(
    read: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Videos that hang are named where others between them do not."""
    monkeypatch.setattr(in_flight, "_MOST_HANGS", 2)
    items = ["sleep", "good", "sleep", "crash", "sleep", "sleep", "good"]
    found = find_harmful(read, items, timeout_s=1.0)
    assert [(k, end.hung) for k, end in found.items()] == [(0, True), (2, True), (3, False)]
    assert "2 videos in a row are not read in time: that is the storage" in caplog.text


def test_a_process_that_is_stopped_for_a_while_harms_no_video(read: Any, tmp_path: Path) -> None:
    assert find_harmful(read, ["good", str(tmp_path / "once")], timeout_s=2.0) == {}


def test_what_is_read_stands_in_a_file_of_a_process_that_lives(tmp_path: Path) -> None:
    own = InFlight(tmp_path, "set")
    own.write([])
    assert not list(tmp_path.iterdir())  # no file for nothing
    own.write({"samples": list(range(100))})
    own.write({"samples": [1]})
    (path,) = tmp_path.iterdir()
    assert list(left_behind(tmp_path, "set")) == []  # its process lives
    own.keep()
    assert list(left_behind(tmp_path, "set")) == [(path, {"samples": [1]})]
    assert list(left_behind(tmp_path, "other")) == []
    path.write_bytes(b'{"samp')
    assert list(left_behind(tmp_path, "set")) == [(path, None)]
    own.write([2])
    own.remove()
    assert list(tmp_path.iterdir()) == [path]


def test_no_locks_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the owner of a file lives could not be told: it would be taken for dead."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(in_flight.fcntl, "flock", refuse)
    record = InFlight(tmp_path, "set")
    record.write([1])
    record.write([2])
    assert not list(tmp_path.iterdir())
