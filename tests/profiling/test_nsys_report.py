"""The report on captured steps: stored exports of nsys with known shares, and a live CPU run."""

import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accel.engine.cards import CARDS, find_card
from accel.engine.journal import LogConfig
from accel.engine.profiling import OperandBytes, StepProfiler
from accel.engine.timing import Ranges
from accel.models import build_model, list_models

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = Path(__file__).parent / "exports"
CPU = torch.device("cpu")


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """Run profile/nsys_report.py on a file: (exit code, JSON or None, stdout, page, stderr)."""
    spec = importlib.util.spec_from_file_location(
        "profile_nsys_report", ROOT / "profile/nsys_report.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)

    def report(capture, *arguments):
        page = tmp_path / "page.html"
        argv = ["nsys_report.py", str(capture), "--json", "--html", str(page), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        code = module.main()
        captured = capsys.readouterr()
        values = json.loads(captured.out.splitlines()[-1]) if code == 0 else None
        return code, values, captured.out, page, captured.err

    return report


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # By construction of tests/profiling/make_exports.py; the last step's update is not in.
        ("input_bound", {"busy": 0.66, "idle_input": 0.34, "idle_host": 0.0, "data_wait": 0.4}),
        ("compute_bound", {"busy": 0.96, "idle_input": 0.02, "idle_host": 0.02, "sync_wait": 0.01}),
        ("launch_bound", {"busy": 0.4, "idle_input": 0.01, "idle_host": 0.59, "launches": 40}),
    ],
)
def test_verdict_and_shares_of_stored_exports(report, name, expected):
    code, values, out, _, _ = report(EXPORTS / f"{name}.sqlite")
    assert code == 0
    assert values["kind"] == name.replace("_", "-")
    assert out.startswith(f"{values['kind']}: ")
    assert values["num_steps"] == 4 and values["step_ms"] == pytest.approx(10.0)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, abs=1e-9), key


def test_device_work_counts_for_the_range_that_launched_it(report):
    _, values, _, _, _ = report(EXPORTS / "input_bound.sqlite")
    ranges = {tuple(row["path"]): row for row in values["ranges"]}
    assert ranges[("step", "forward", "layer1", "TAM")]["device_ms"] == pytest.approx(0.2)
    assert ranges[("step", "forward")]["device_ms"] == pytest.approx(2.5)
    # Launched by the autograd thread, which has no range of its own.
    assert ranges[("step", "backward")]["device_ms"] == pytest.approx(3.4)
    # Runs in the next step; that of the last step is not in the file.
    assert ranges[("step", "optimizer")]["device_ms"] == pytest.approx(0.6 * 3 / 4)
    assert ranges[("step", "data wait", "upload")]["device_ms"] == pytest.approx(0.1)
    assert values["copied_bytes"] == 4_816_896
    assert values["kernels"][0]["category"] == "convolution or matrix product"
    assert {k["name"]: k["category"] for k in values["kernels"]}["copy Host-to-Device"] == "copy"


def test_rates_are_shares_of_the_cards_limits(report, tmp_path):
    facts = {
        "precision": "fp16",
        "clips_per_step": 16,
        "flop_per_step": 3.2e12,
        "operand_bytes_per_step": 24e9,
    }
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    _, values, out, page, _ = report(
        EXPORTS / "compute_bound.sqlite", "--facts", str(tmp_path / "facts.json")
    )
    rates = values["rates"]
    assert rates["clips_per_s"] == pytest.approx(1600)
    assert rates["tflops"] == pytest.approx(320)
    assert rates["of_peak_tflops"] == pytest.approx(320 / 989)
    assert rates["of_bandwidth"] == pytest.approx(2400 / 4800)
    assert "memory bandwidth is the nearer limit" in values["verdict"]
    assert "H200 data sheet" in out and "50.0 % of 4800" in page.read_text()


def test_the_page_needs_no_other_file(report):
    _, values, _, page, _ = report(EXPORTS / "launch_bound.sqlite")
    text = page.read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert values["verdict"] in text
    assert text.count("<rect") > 45  # ranges and kernels of the step shown
    assert text.count("<table") == text.count("</table>") == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page(report):
    _, values, _, page, _ = report(EXPORTS / "launch_bound.sqlite")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    shown = subprocess.run(
        [*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and values["verdict"] in shown.stdout
    assert shown.stdout.count("<rect") > 45 and "CONSOLE" not in shown.stderr


def test_exports_are_what_their_script_writes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "make_exports", EXPORTS.with_name("make_exports.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    for name in ("input_bound", "compute_bound", "launch_bound"):
        getattr(module, name)()
        written, stored = (
            list(sqlite3.connect(folder / f"{name}.sqlite").iterdump())
            for folder in (tmp_path, EXPORTS)
        )
        assert written == stored


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        (b"hello", "neither an SQLite export of nsys nor a trace"),
        (b'{"traceEvents": []}', "holds no range named step"),
        (b"SQLite format 3\0garbage", "not an export of nsys"),
    ],
)
def test_other_files_are_refused_in_one_sentence(report, tmp_path, content, sentence):
    path = tmp_path / "capture"
    if content is not None:
        path.write_bytes(content)
    code, _, _, page, errors = report(path)
    assert code == 2 and sentence in errors and errors.count("\n") == 1
    assert not page.exists()


def test_a_live_run_through_torch_profiler(report, tmp_path):
    """Steps whose shares are imposed: sleeping in the data wait, then working."""
    facts = {"clips_per_step": 2, "precision": "fp32"}
    config = LogConfig(profile="torch", profile_start=2, profile_steps=3)
    profiler = StepProfiler(config, tmp_path / "profile", CPU, lambda: facts)
    ranges = Ranges("torch")
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    ranges.mark([("layer1", model)])
    wait = torch.zeros(4_000_000)
    x = torch.randn(512, 256)
    for _ in range(6):
        with profiler.step(), ranges("step"):
            with ranges("data wait"):
                for _ in range(4):
                    wait.add_(1)
            with ranges("forward"):
                loss = model(x).sum()
            with ranges("backward"):
                loss.backward()
    profiler.stop()
    code, values, _, _, _ = report(tmp_path / "profile")
    assert code == 0 and values["num_steps"] == 3 and not values["on_gpu"]
    paths = {tuple(row["path"]): row for row in values["ranges"]}
    assert paths[("step", "forward", "layer1")]["count"] == 1
    assert paths[("step", "backward")]["device_ms"] > 0
    assert values["idle_input"] == pytest.approx(values["data_wait"])
    assert values["busy"] + values["idle_input"] + values["idle_host"] == pytest.approx(1)
    # Forward 2 * 512 * 256 * 256, the same for the gradient of the weight.
    assert values["facts"]["flop_per_step"] == 2 * 2 * 512 * 256 * 256
    counted = next(k for k in values["kernels"] if k["name"] == "aten::addmm")
    assert counted["count"] == 1


@pytest.mark.parametrize(
    ("profile", "steps", "said"),
    [
        ("torch", 2, "log.profile torch captures nothing, because 2 steps are to be made; "),
        ("nsys", 4, "log.profile nsys captures only 1 of 2 steps, "),
        ("torch", 5, None),
        ("none", 2, None),
    ],
)
def test_a_window_that_the_run_does_not_reach_is_said(profile, steps, said, tmp_path, caplog):
    config = LogConfig(profile=profile, profile_start=3, profile_steps=2)
    StepProfiler(config, tmp_path, CPU, dict).check_window(steps)
    if said is None:
        assert not caplog.text
    else:
        assert (
            said in caplog.text and "log.profile_start (3) + log.profile_steps (2)" in caplog.text
        )


def test_operand_bytes_count_every_operand_once_and_views_never():
    x = torch.zeros(10, 4)
    with OperandBytes() as counter:
        x.t().reshape(4, 10) + 1  # reads and writes 160 bytes
        x.view(-1).mul_(2)  # 160 in, the same tensor out
    assert counter.total == 4 * 160


@pytest.mark.parametrize("name", list_models())
def test_parts_of_a_network_are_marked(name):
    model = build_model(name, num_classes=2, num_segments=2, depth=50, width=8)
    parts = list(model.named_parts())
    names = [part for part, _ in parts]
    assert {"layer1", "layer2", "layer3", "layer4", "head"} <= set(names)
    own = {type(module).__name__ for part, module in parts if part == type(module).__name__}
    assert bool(own) == (name != "tsn"), own
    assert len({id(module) for _, module in parts}) == len(parts)


def test_a_mark_closes_when_a_module_fails():
    class Failing(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    ranges, module = Ranges("torch"), Failing()
    ranges.mark([("part", module)])
    with pytest.raises(RuntimeError, match="no"):
        module(torch.zeros(1))
    assert ranges._open.contexts == []


def test_cards_are_found_by_the_drivers_name():
    names = {
        "NVIDIA GeForce RTX 2080 Ti": "RTX 2080 Ti",
        "NVIDIA TITAN RTX": "TITAN RTX",
        "NVIDIA A100-SXM4-40GB": "A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB": "A100-SXM4-80GB",
        "NVIDIA A10": "A10",
        "NVIDIA L4": "L4",
        "NVIDIA L40S": "L40S",
        "NVIDIA H200": "H200",
        "NVIDIA H100 80GB HBM3": "H100 80GB HBM3",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "Tesla T4": "T4",
    }
    assert {name: find_card(name).name for name in names} == names
    others = "GTX 1080 Ti,RTX 3090 Ti,RTX 4090 Laptop GPU,RTX 4090 D".split(",")
    assert all(find_card(f"NVIDIA GeForce {name}") is None for name in others)
    assert find_card("NVIDIA H200 NVL") is find_card("NVIDIA A10G") is None
    for card in CARDS:
        assert find_card(f"NVIDIA {card.name}") is card, card.name
        assert card.tensor16_tflops >= card.fp32_tflops and card.source
    assert find_card("Tesla T4").peak_tflops("bf16") is None


FAKE_NSYS = """#!{python}
import shutil, subprocess, sys
arguments = sys.argv[1:]
if arguments[0] == "profile":
    command = [a for a in arguments[1:]]
    while command[0].startswith("--"):
        option = command.pop(0)
        if option.startswith("--output="):
            output = option.removeprefix("--output=")
    code = subprocess.run(command).returncode
    if code == 0:
        shutil.copy({export!r}, output + ".nsys-rep")
    sys.exit(code)
assert arguments[0] == "export" and arguments[1] == "--type=sqlite", arguments
target = next(a for a in arguments if a.startswith("--output=")).removeprefix("--output=")
shutil.copy(arguments[-1], target)
"""


@pytest.mark.slow
def test_nsys_train_runs_exports_and_reports(tmp_path):
    """With a stand-in for nsys that runs the command and hands out a stored export."""
    from pipelines.synthetic import generate_motion8

    root = generate_motion8(tmp_path / "set", num_train=16, num_val=8, progress=False)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"data: {{root: {root}, train_list: train.txt, val_list: val.txt,"
        " classes_file: classes.txt}\n"
        "sampling: {num_segments: 2}\n"
        "augment: {size: 32, resize: 32, flip: false}\n"
        "loader: {threads: 1}\n"
        "model: {depth: 18, width: 8, stages: 2}\n"
        "schedule: {kind: constant, epochs: 9}\n"
        "train: {global_batch: 4, micro_batch: 4}\n"
        "log: {tensorboard: false}\n"
        "run: {threads: 1, device: cpu}\n"
    )
    nsys = tmp_path / "nsys"
    export = str(EXPORTS / "input_bound.sqlite")
    nsys.write_text(FAKE_NSYS.format(python=sys.executable, export=export))
    nsys.chmod(0o755)
    environment = os.environ | {
        "NSYS": str(nsys),
        "PYTHON": sys.executable,
        "START": "1",
        "STEPS": "2",
        "PYTHONPATH": str(ROOT),
        "ACCEL_CACHE": str(tmp_path / "cache"),
    }
    script = str(ROOT / "profile/nsys_train.sh")
    out = tmp_path / "run"

    def run(*arguments, **changes):
        return subprocess.run(
            [script, "--recipe", str(recipe), *arguments],
            env=environment | changes,
            capture_output=True,
            text=True,
        )

    answer = run("--out", str(out))
    assert answer.returncode == 0, answer.stderr
    assert "input-bound: 34 % of the step" in answer.stdout
    assert (out / "profile/report.html").exists()
    facts = json.loads((out / "profile/facts.json").read_text())
    assert facts["captured_steps"] == 2 and facts["flop_per_step"] > 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4 + 1  # and an evaluation
    assert run().returncode == 2 and "--out" in run().stderr
    missing = run("--out", str(out), NSYS="no-such-nsys")
    assert missing.returncode == 2 and "is not installed" in missing.stderr
