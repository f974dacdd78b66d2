"""The command line: one sentence and the right exit code for every wrong input, nothing lost."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from accel.cli.main import main as accel
from accel.cli.rendering import run_guarded
from accel.cli.start import start
from accel.cli.train import main as train
from accel.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HMDB = ROOT / "tests" / "data" / "hmdb51"

RECIPE = """
data: {{root: {root}, train_list: train.txt, val_list: val.txt, num_classes: 2}}
sampling: {{num_segments: 4}}
augment: {{size: 32, resize: 32}}
model: {{depth: 18, width: 8, stages: 1, dropout: 0}}
schedule: {{epochs: 1}}
train: {{global_batch: 2, micro_batch: 2, max_steps: 1}}
log: {{tensorboard: false}}
run: {{threads: 1, device: cpu}}
"""


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path):
    """A recipe over four real clips in a folder of their own, two per split."""
    root = tmp_path / "set"
    root.mkdir()
    clips = sorted(HMDB.glob("*.webm"))[:4] or sorted(HMDB.glob("*.mp4"))[:4]
    assert len(clips) >= 3
    lines = []
    for number, clip in enumerate(clips):
        (root / f"{number}{clip.suffix}").write_bytes(clip.read_bytes())
        lines.append(f"{number}{clip.suffix} {number % 2}\n")
    (root / "train.txt").write_text("".join(lines))
    (root / "val.txt").write_text("".join(lines[:2]))
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(root=root))
    return path


def _run(capfd, *arguments):
    code = run_guarded(train, [str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def _one_sentence(errors):
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


def test_a_run_prints_its_summary_and_json_last(capfd, recipe, tmp_path):
    code, out, err = _run(capfd, "--recipe", recipe, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert {"val_top1", "val_loss", "clips_per_s", "data_wait", "wall_s", "checkpoint"} <= set(
        summary
    )
    assert Path(summary["checkpoint"]).is_file()
    assert "val top-1" in out and "curves" in out
    assert "step 1/1" in err
    again, second, _ = _run(capfd, "--recipe", recipe, "--out", tmp_path / "run", "--json")
    assert again == 0
    assert json.loads(second.splitlines()[-1]) == summary


def _edit(name, text):
    def change(root):
        (root / name).write_text(text)

    return change


def _cut(root):
    clip = next(path for path in sorted(root.iterdir()) if path.stem == "1")
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])


def _replace(content):
    def change(root):
        next(path for path in sorted(root.iterdir()) if path.stem == "1").write_bytes(content)

    return change


BAD_DATA = {
    "missing list": (lambda root: (root / "train.txt").unlink(), "train.txt"),
    "list is a folder": (
        lambda root: ((root / "train.txt").unlink(), (root / "train.txt").mkdir()),
        "train.txt",
    ),
    "empty list": (_edit("train.txt", ""), "train.txt"),
    "too many fields": (_edit("train.txt", "a.webm 0\nb c d e\n"), "train.txt:2:"),
    "label is no number": (_edit("train.txt", "a.webm zero\n"), "train.txt:1:"),
    "negative label": (_edit("train.txt", "a.webm -1\n"), "train.txt:1:"),
    "label out of range": (_edit("train.txt", "a.webm 2\n"), "train.txt:1:"),
    "outside the root": (_edit("train.txt", "../../etc/passwd 0\n"), "train.txt:1:"),
    "missing file": (_edit("train.txt", "gone.webm 0\n" * 2), "gone.webm"),
    "zero bytes": (_replace(b""), "1."),
    "truncated": (_cut, "1."),
    "text": (_replace(b"this is not a video\n" * 100), "1."),
    "HTML": (_replace(b"<!DOCTYPE html><html></html>"), "1."),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_ends_with_3_and_names_the_place(capfd, recipe, tmp_path, fault):
    change, where = BAD_DATA[fault]
    change(tmp_path / "set")
    out = tmp_path / "run"
    code, stdout, err = _run(capfd, "--recipe", recipe, "--out", out)
    sentence = _one_sentence(err)
    assert code == 3, err
    assert where in sentence
    assert stdout == ""
    assert not (out / "checkpoints").exists()


def test_classes_without_training_videos_are_said(capfd, recipe, tmp_path):
    root = tmp_path / "set"
    names = [line.split()[0] for line in (root / "train.txt").read_text().splitlines()]
    (root / "train.txt").write_text(f"{names[0]} 1\n{names[1]} 2\n{names[0]} 5\n")
    (root / "val.txt").write_text(f"{names[0]} 0\n{names[1]} 1\n{names[1]} 2\n")
    options = ("--data.num_classes", "0", "--dry-run")
    code, _, err = _run(capfd, "--recipe", recipe, *options)
    assert code == 0, err
    assert "3 of 6 classes without a training video, '0', '3', '4': is that meant?" in err
    assert "1 of 3 validation videos are of classes that never occur in training, '0':" in err
    (root / "train.txt").write_text(f"{names[0]} 5\n{names[1]} 5\n")
    _, _, err = _run(capfd, "--recipe", recipe, *options)
    assert "5 of 6 classes without a training video, '0', '1', '2' and 2 more:" in err
    (root / "classes.txt").write_text("walk\nrun\njump\n")
    (root / "train.txt").write_text(f"{names[0]} 0\n{names[1]} 2\n")
    (root / "val.txt").write_text(f"{names[0]} 0\n")
    named = ("--data.num_classes", "0", "--data.classes_file", "classes.txt", "--dry-run")
    _, _, err = _run(capfd, "--recipe", recipe, *named)
    assert "1 of 3 classes without a training video, 'run':" in err
    assert "never occur" not in err


def test_a_video_shorter_than_the_clip_is_an_error(capfd, recipe, tmp_path):
    code, _, err = _run(capfd, "--recipe", recipe, "--sampling.num_segments", "5000")
    assert code == 3
    assert "fewer frames than sampling.num_segments = 5000" in _one_sentence(err)


BAD_OPTIONS = [
    (["--recipe", "demo_motion9"], "Did you mean demo_motion8? accel recipes lists all."),
    (["--recipe", "masnet_r50_8f"], "Did you mean masnet_r50_8f_sthv2, masnet_r50_8f_sthv1 or "),
    (["--recipe", "ssd"], "The closest are ssd300_brox_ucf24, ssd300_fastof_ucf24, ssd300_rgb_"),
    (["--recipe", "none.yaml"], "none.yaml: no such recipe"),
    (["--foo.bar", "1"], ", optim.lr; accel train --help lists all."),
    (["--optim.learning_rate", "0.1"], "Did you mean"),
    (["--optim.lr"], "expected a value"),
    (["--optim.lr", "x"], "optim.lr"),
    (["--optm", "3"], "command line"),
    (["--data.root", "/nonexistent"], "/nonexistent"),
    (["--recipe", "own_videos"], "data.root: expected the folder of the videos"),
    (["--run.device", "cuda"], "run.device: cuda was asked for"),
    (["--precision.mode", "tf32"], "precision.mode"),
    (["--resume", "missing.pt"], "no such checkpoint"),
    (["--train.global_batch", "3"], "train.global_batch: must be a multiple"),
    (["--model.pretrained", "missing.pth"], "missing.pth"),
    (["--out", "/dev/null"], "cannot be used as a run folder"),
    (["--loader.decoder", "opencv"], "loader.decoder"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_OPTIONS)
def test_bad_options_end_with_2_or_3_and_one_sentence(capfd, recipe, arguments, expected):
    if arguments[:1] == ["--run.device"] and torch.cuda.is_available():
        arguments, expected = ["--run.device", "tpu"], "run.device"
    base = [] if "--recipe" in arguments else ["--recipe", recipe]
    code, out, err = _run(capfd, *base, *arguments)
    assert code in (2, 3), err
    assert (code == 3) == (arguments[0] == "--data.root")
    assert expected in _one_sentence(err)
    assert out == ""


def test_a_damaged_pretrained_checkpoint_is_named(capfd, recipe, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {"module.new_fc.weight": torch.zeros(2, 2)}}, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(bytes(content))
    code, _, err = _run(capfd, "--recipe", recipe, "--model.pretrained", file)
    assert code == 2
    assert "weights.pth" in _one_sentence(err)
    file.write_bytes(bytes(content)[:40])
    code, _, err = _run(capfd, "--recipe", recipe, "--model.pretrained", file)
    assert code == 2
    assert "weights.pth" in _one_sentence(err)


def test_a_full_disk_is_one_sentence(capfd):
    def fill(_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/r/summary.json")

    assert run_guarded(fill, []) == 2
    told = "runs/r/summary.json: No space left on device; make room and repeat the command."
    assert _one_sentence(capfd.readouterr().err) == f"error: {told}"


def test_print_config_and_dry_run_write_nothing(capfd, recipe, tmp_path):
    code, out, _ = _run(capfd, "--recipe", recipe, "--print-config", "--optim.lr", "0.5")
    assert code == 0
    assert "lr: 0.5" in out
    code, out, _ = _run(capfd, "--recipe", recipe, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["clips"] == [2, 4, 32, 32, 3]
    assert not (tmp_path / "runs").exists()


def test_help_lists_every_key_with_its_description(capfd):
    code, out, _ = _run(capfd, "--help")
    assert code == 0
    assert "--optim.lr" in out and "--data.root" in out and "Learning rate for" in out


def test_the_accel_command(capfd):
    assert accel(["--version"]) == 0
    assert accel(["--help"]) == 0
    assert "train" in capfd.readouterr().out
    assert accel([]) == 2
    assert accel(["trian"]) == 2
    assert "unknown command 'trian'" in capfd.readouterr().err
    assert accel(["doctor"]) == 0
    assert "torch" in capfd.readouterr().out
    assert accel(["doctor", "--fast"]) == 2


@pytest.mark.parametrize("entry", [["train.py"], ["-m", "accel.cli.main", "data"]])
@pytest.mark.parametrize(
    ("torch_py", "code", "told"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("import not_there_at_all", 2, "has no package 'not_there_at_all'; activate the env"),
    ],
)
def test_what_happens_while_packages_are_imported(tmp_path, entry, torch_py, code, told):
    (tmp_path / "torch.py").write_text(torch_py)
    answer = subprocess.run(
        [sys.executable, *entry, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert answer.returncode == code, answer.stderr
    assert told in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_a_missing_module_of_ours_is_no_missing_package():
    with pytest.raises(ModuleNotFoundError, match=r"accel\.cli\.missing"):
        start("missing:main", [])


def test_class_folders_work_as_a_dataset(capfd, tmp_path):
    for number, clip in enumerate(sorted(HMDB.glob("*.*4"))[:4]):
        folder = tmp_path / "own" / ("wave" if number % 2 else "cartwheel")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}{clip.suffix}").write_bytes(clip.read_bytes())
    recipe = tmp_path / "own.yaml"
    text = RECIPE.format(root=tmp_path / "own")
    recipe.write_text(
        text.replace(", train_list: train.txt, val_list: val.txt, num_classes: 2", "")
    )
    code, out, err = _run(capfd, "--recipe", recipe, "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["num_classes"] == 2


def test_videos_gone_from_class_folders_are_named_by_a_resumed_run(capfd, tmp_path):
    clip = sorted(HMDB.glob("*.webm"))[0].read_bytes()
    for split, numbers in (("train", range(4)), ("val", range(2))):
        for name in ("a", "b"):
            for number in numbers:
                path = tmp_path / "set" / split / name / f"{number}.webm"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(clip if (name, number) != ("b", 3) else b"")  # one in quarantine
    recipe = tmp_path / "r.yaml"
    folders = "data: {{root: {root}, max_bad_fraction: 0.5}}"
    recipe.write_text(RECIPE.replace(RECIPE.splitlines()[1], folders).format(root=tmp_path / "set"))
    command = ["--recipe", recipe, "--out", tmp_path / "run"]
    code, _, err = _run(capfd, *command)
    assert code == 0, err
    assert (tmp_path / "run/quarantine.csv").is_file()

    (tmp_path / "set/train/a/1.webm").unlink()
    (tmp_path / "set/val/a/1.webm").unlink()
    code, _, err = _run(capfd, *command, "--train.max_steps", "2")
    assert code == 2
    sentence = _one_sentence(err)
    assert "(8 for training and 4 for validation then, 7 for training and 3 for" in sentence
    assert "put videos that are gone back" in sentence and "--resume-allow" in sentence
    code, _, err = _run(capfd, *command, "--resume-allow", "data")  # the file's ids are others'
    assert code == 3 and f"or delete {tmp_path}/run/quarantine.csv" in _one_sentence(err)
    assert accel(["evaluate", str(tmp_path / "run")]) == 0
    told = "not the validation videos of its training (3 now, 4 then): the results do not compare"
    assert told in capfd.readouterr().err

    for path in sorted((tmp_path / "set").glob("*/b/*")):
        path.unlink()
    for split in ("train", "val"):
        (tmp_path / "set" / split / "b").rmdir()
    code, _, err = _run(capfd, *command)
    assert code == 2 and "without the classes 'b'" in _one_sentence(err)
    # a checkpoint of before the numbers were stored
    checkpoint = next((tmp_path / "run/checkpoints").glob("*.pt"))
    state = torch.load(checkpoint, weights_only=True)
    del state["num_videos"]
    torch.save(state, checkpoint)
    (tmp_path / "run/checkpoints/index.json").unlink()
    code, _, err = _run(capfd, *command)
    assert code == 2 and "(3 for training and 1 for validation now;" in _one_sentence(err)


def test_runs_of_other_networks_appear_in_the_summary(capfd, recipe):
    _run(capfd, "--recipe", recipe)
    _run(capfd, "--recipe", recipe, "--model.name", "tsn")
    code, out, _ = _run(capfd, "--recipe", recipe, "--model.temporal", "none")
    assert code == 0
    line = next(line for line in out.splitlines() if "by network" in line)
    assert all(name in line for name in ("tanet 0.", "tanet without temporal module", "tsn 0."))


def test_torchrun_shows_what_ended_the_process(capfd, tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def shown(command):
        code = run_guarded(command, [])
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))
        return str(ChildFailedError("train.py", {0: failure})).partition("Root Cause")[2]

    def refuse(argv):
        raise ConfigError("optim.lr: must be > 0.")

    assert "  traceback : error: optim.lr: must be > 0.\n===" in shown(refuse)
    crash = shown(lambda argv: 1 // 0)
    assert "traceback : Traceback (most" in crash and "ZeroDivisionError: integer" in crash
    assert capfd.readouterr().err.startswith("error: optim.lr: must be > 0.\nTraceback")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder"))
    assert run_guarded(refuse, []) == 2


def test_too_many_open_files_are_one_sentence(capfd):
    def fail(number):
        def command(argv):
            raise OSError(number, os.strerror(number))

        return run_guarded(command, [])

    assert fail(errno.EMFILE) == 2
    remedy = "raise the limit of open files (ulimit -n) and repeat the command"
    assert capfd.readouterr().err == f"error: Too many open files; {remedy}.\n"
    assert fail(errno.EBADF) == 1
    assert "this is a bug in accel" in capfd.readouterr().err
