"""profile/gpu_check.py without a GPU: what it runs, leaves out, and writes."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel.models import list_models

ROOT = Path(__file__).resolve().parents[2]
ENV = {"revision": "abc", "sources": "0123", "gpu": "NVIDIA Test", "torch": "2.11"}


@pytest.fixture
def check(monkeypatch):
    """The script as a module, on a machine that claims to have a GPU."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "profile"), *sys.path])
    path = ROOT / "profile/gpu_check.py"
    spec = importlib.util.spec_from_file_location("profile_gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(module, "environment", lambda: ENV)
    return module


def _python(check, name, code, **more):
    return check.Section(name, (sys.executable, "-c", code), **{"operators": "auto", **more})


@pytest.fixture
def run(check, monkeypatch, tmp_path, capsys):
    """Run with other sections: (exit code, report, markdown, stderr)."""

    def run(sections, *arguments):
        monkeypatch.setattr(check, "SECTIONS", tuple(sections))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
        code = check.main()
        report = json.loads((tmp_path / "report.json").read_text())
        return code, report, (tmp_path / "report.md").read_text(), capsys.readouterr().err

    return run


def test_a_section_that_hangs_fails_or_lacks_something_costs_no_other_one(check, run, tmp_path):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
    child += f"open(\\'{tmp_path}/pid\\', \\'w\\').write(str(__import__(\\'os\\').getpid())); "
    child += "time.sleep(60)']); import time; time.sleep(60)"
    sections = [
        _python(check, "hangs", child, limit_s=3),
        _python(check, "fails", "import sys; print('bad | news'); sys.exit(3)"),
        _python(check, "lacks", "print(1)", modules=("json", "no_such_package")),
        check.Section("no_program", ("no-such-program",), operators="auto"),
        _python(check, "garbled", "print('no numbers')", json=True),
        _python(check, "good", "print('x'); print('{\"result\": {\"steps\": 3}}')", json=True),
    ]
    code, report, text, _ = run(sections)
    assert code == 1
    outcomes = {section.name: report[section.name]["outcome"] for section in sections}
    assert outcomes == {
        "hangs": "stopped after 3 s, its limit",
        "fails": "failed (3)",
        "lacks": "not run: no_such_package is not installed",
        "no_program": "not run: no-such-program is not installed",
        "garbled": "failed: its last line is not JSON",
        "good": "passed",
    }
    assert report["good"]["result"] == {"steps": 3} and report["fails"]["last_line"] == "bad | news"
    assert (tmp_path / "fails.log").read_text() == "bad | news\n"
    assert "- revision: abc" in text
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("what a section has started lives on")


def test_the_budget_ends_a_call_and_the_next_one_goes_on(check, run, monkeypatch):
    monkeypatch.setattr(check, "LEAST_S", 1.5)
    code = "import time; time.sleep({}); print(time.time())"
    sections = [
        _python(check, "first", code.format(0)),
        _python(check, "long", code.format(3)),
        _python(check, "late", code.format(0)),
    ]
    status, report, _, _ = run(sections, "--budget", "2.5")
    assert status == 1
    assert "the end of the budget" in report["long"]["outcome"]
    assert report["late"]["outcome"].startswith("not run: the budget is used up")
    first = report["first"]["last_line"]
    status, report, _, _ = run(sections)
    assert status == 0 and report["first"]["last_line"] == first
    assert report["long"]["outcome"] == report["late"]["outcome"] == "passed"
    late = report["late"]["last_line"]
    status, report, _, errors = run(sections, "--only", "l?te")
    assert report["late"]["last_line"] != late and "long" not in errors
    assert run(sections, "--only", "later")[0] == 2
    monkeypatch.setattr(check, "environment", lambda: {**ENV, "sources": "4567"})
    _, report, _, _ = run(sections, "--only", "late")
    assert "first" not in report  # of other code


def test_code_that_is_not_committed_is_other_code(check, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    for name in ("train.py", "pyproject.toml", "kernels/csrc/cuda/a.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = check.sources()
    run = tmp_path / "profile/results/gpu/training_run/recipe.yaml"  # what the check itself writes
    for path in (run, tmp_path / "kernels/_C.so"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    assert check.sources() == before
    (tmp_path / "kernels/csrc/cuda/a.cu").write_text("2")
    assert check.sources() != before


STEP = {
    "tsn": 1.0,
    "tsm": 1.03,
    "tanet": 1.05,
    "masnet": 1.2,
    "tdn": 1.1,
    "amsnet": 1.4,
    "msn": 1.8,
}


def _rows(ratios, **more):
    return {
        "models": [
            {"model": name, "ratio_to_tsn": ratio, "step_ms": 100 * ratio, **more}
            for name, ratio in ratios.items()
        ]
    }


def _bandwidth(op, share, channels=64, size=56, implementation="cuda"):
    return {
        "op": op,
        "form": "any",
        "channels": channels,
        "size": size,
        "direction": "forward",
        "implementation": implementation,
        "median_us": 10.0,
        "gb_s": 1000.0 * share,
        "of_copy": share,
    }


def test_asks_stand_beside_what_was_measured(check):
    from gpu_report.asks import asks
    from gpu_report.text import markdown

    report = {
        "step_fp16": _rows(STEP, clips_per_s=900.0),
        "step_fp32_nchw": _rows({"tanet": 1.0}, clips_per_s=200.0),
        "memory": _rows({"tanet": 1.0, "msn": 1.0}, peak_gib=3.6),
        "step_batch_norm": _rows(
            {
                "tsn@torch": 1.0,
                "tsn@torch+compile": 0.9,
                "tsn@fused": 0.8,
                "tsn@fused+compile": 0.84,
            }
        ),
        "kernels": {
            "environment": {"batch": 8, "num_segments": 8},
            "rows": [
                _bandwidth("temporal_taps", 0.9),
                _bandwidth("temporal_taps", 0.86, size=28),
                _bandwidth("temporal_taps", 0.2, channels=64, size=7),  # 200704 elements
                _bandwidth("temporal_taps", 0.1, implementation="reference"),
                _bandwidth("mas_fuse", 0.7),
            ],
        },
    }
    for name in report:
        report[name] |= {"outcome": "passed", "seconds": 1.0, "last_line": ""}
    found = {ask.what: ask for ask in asks(report)}
    assert found["step of tanet in steps of TSN, fp16"].met is True
    assert found["step of masnet in steps of TSN, fp16"].met is False
    speedup = found["clips/s of tanet, fp16 and fused, in those of plain fp32 NCHW"]
    assert speedup.met and speedup.measured == "4.50 (900 / 200)"
    memory = found["memory of tanet at 8 clips, fp16"]
    assert memory.met is False and memory.measured == "3.87 GB"  # 10^9 bytes
    assert found["memory of msn at 8 clips, fp16"].met is True
    assert found["memory of tdn at 8 clips, fp16"].met is None
    taps = found["bandwidth of temporal_taps in that of a copy"]
    assert taps.met and taps.measured == "86% (any 64 x 28^2 forward; least of 2)"
    assert found["bandwidth of mas_fuse in that of a copy"].met is False
    assert found["bandwidth of ingest in that of a copy"].measured == "not measured"
    norm = found["time that the fused batch norm saves in a step of tsn"]
    assert norm.met and norm.measured == "11.1%"
    assert found["time that the fused batch norm saves in a step of tanet"].met is None
    text = markdown(report)
    assert "| step of masnet in steps of TSN, fp16 | <= 1.10 | 1.2 | no |" in text
    assert "| temporal_taps | any | 64 | 56 | forward | cuda | 10.0 | 900 | 90% |" in text
    # With nothing measured nothing is claimed.
    assert all(ask.met is None and ask.measured == "not measured" for ask in asks({}))


def test_input_pipelines_in_the_report(check):
    from gpu_report.text import markdown

    row = {"name": "jpeg", "backend": "dali_gpu", "clips_per_s": 901.23, "cpu_ms_per_clip": 1.5}
    frames = {"frames": 8, "told_apart": 8, "mean_difference": 1.5, "wrong_frames": 0, "same": True}
    waits = [
        {"decoder": "dali_gpu", "data_wait": 0.015, "loader": "NVDEC, 8 threads"},
        {"decoder": "dali", "data_wait": 0.3, "loader": "DALI"},
        {"decoder": "pyav", "problem": "no clips"},
    ]
    report = {
        "loader": {
            "sets": [{**row, "ratio_to_best_peer": 3.1, "description": "nvJPEG"}],
            "not_measured": {"jpeg": {}, "vp9_gop12": {"dali_gpu": "it fails"}},
        },
        "data_wait": {"data_wait": waits, "batch": 16},
        "decoder_frames": {"frames": [frames]},
    }
    for section in report.values():
        section |= {"outcome": "passed", "seconds": 1.0, "last_line": ""}
    text = markdown(report)
    what = "data wait of tanet on prepared H.264, fp16"
    assert f"| {what} | < 2% | 1.5% (NVDEC, 8 threads) | yes |" in text
    what = "wrong frames of NVDEC, compared with PyAV"
    assert f"| {what} | 0 | 0 of 8, 1.5 levels away at most | yes |" in text
    assert "| jpeg | dali_gpu | 901.2 | 1.5 | 3.1 | nvJPEG |" in text
    assert "- vp9_gop12, dali_gpu: it fails\n" in text and "- pyav: no clips\n" in text


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ({"wrong_frames": 1, "same": False}, "1 of 8, 1.5 levels away at most | no"),
        (
            {"wrong_frames": 0, "same": True},
            "0 of 8, 1.5 levels away at most; files that could not be decoded: 1 | no",
        ),
    ],
)
def test_wrong_frames_fail_their_section_and_are_reported(check, run, found, answer):
    row = {"frames": 8, "told_apart": 8, "mean_difference": 1.5, **found}
    code = f"import json, sys; print(json.dumps({{'frames': [{row}], 'failures': 1}})); sys.exit(1)"
    status, report, text, _ = run([_python(check, "decoder_frames", code, json=True)])
    assert status == 1 and report["decoder_frames"]["outcome"] == "failed (1)"
    assert f"| wrong frames of NVDEC, compared with PyAV | 0 | {answer} |" in text


def test_plain_pytorch_never_stands_in_for_the_operators(check, run, monkeypatch):
    from gpu_report import sections

    monkeypatch.setattr(sections, "_no_operators", lambda: "kernels._C is not built")
    monkeypatch.setattr(sections, "_no_bf16", lambda: None)
    monkeypatch.setattr(sections, "_importable", lambda name: True)
    left_out = {s.name for s in sections.SECTIONS if s.why_not() == "kernels._C is not built"}
    assert {"step_fp16", "kernels", "memory", "training", "data_wait"} <= left_out
    assert not left_out & {"build", "step_reference", "step_fp32_nchw", "loader"}
    for section in sections.SECTIONS:  # nor where only some of them cannot run
        forced = section.variables.get("ACCEL_KERNELS")
        assert forced or section.operators in ("mixed", "auto"), section.name
        assert forced != "reference" or section.name in ("step_reference", "step_fp32_nchw")
    # The library of an earlier build is no better.
    monkeypatch.setattr(sections, "_no_operators", lambda: None)
    code = "import os; print(os.environ.get('ACCEL_KERNELS'))"
    steps = [
        _python(check, "ours", code, operators="cuda"),
        _python(check, "tests", code, operators="mixed"),
        _python(check, "plain", code, operators="reference"),
    ]
    build = _python(check, "build", "import sys; sys.exit(1)")
    status, report, _, _ = run([build, *steps])
    assert status == 1 and report["plain"]["last_line"] == "reference"
    assert report["ours"]["outcome"] == report["tests"]["outcome"] == "not run: the build failed"
    build = _python(check, "build", "")
    status, report, _, _ = run([build, *steps])
    assert status == 0 and report["ours"]["last_line"] == "cuda"


def test_every_section_is_a_command_that_exists(check):
    from gpu_report.sections import SECTIONS

    names = [section.name for section in SECTIONS]
    assert len(set(names)) == len(names)
    for section in SECTIONS:
        assert section.limit_s <= 480
        for part in section.command:
            if part.endswith(".py") or part.startswith("tests/"):
                assert (ROOT / part).exists(), part
        if "compute-sanitizer" in section.command[0] and "racecheck" not in section.command:
            # Tensors in blocks of the caching allocator have no bounds that memcheck could see.
            assert section.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1", section.name
    asked = {"step_fp16", "step_fp32_nchw", "memory", "step_batch_norm", "kernels"}
    assert asked <= {section.name for section in SECTIONS if section.json}


def test_steps_of_every_network_end_within_their_limit(check):
    """Nothing is printed before the end. Half a second per step is slow: see docs/hardware.md."""
    from gpu_report.sections import SECTIONS

    for section in SECTIONS:
        if "profile/step.py" in section.command:
            options = dict(itertools.pairwise(section.command))  # the last of each counts
            labels = options.get("--models", ",".join(list_models())).split(",")
            turns = int(options["--warmups"]) + int(options["--steps"])
            assert turns * len({"tsn", *labels}) * 0.5 <= section.limit_s, section.name


HIDE = """
import sys
HIDDEN = "jsonargparse", "docstring_parser", "av", "nvidia", "nvtx", "pynvml"
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def test_graphs_are_tested_with_nothing_but_pytest(check, tmp_path):
    from gpu_report.sections import SECTIONS

    (section,) = (section for section in SECTIONS if section.name == "tests_graphs")
    assert section.modules == ("pytest",)
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    answer = subprocess.run(
        [*section.command, "--collect-only"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert answer.returncode == 0, answer.stdout
    for name in ("test_graphs_on_gpu", "test_step_benchmark"):
        assert f"{name}.py::test_on_a_gpu" in answer.stdout, answer.stdout


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_minute_of_training_needs_neither_decoder_nor_recipe_parser(tmp_path):
    """Also what the GPU machine runs first: nothing but torch, NumPy, Pillow and PyYAML."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "ACCEL_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "profile/real_training.py", "--clips", "32", "--json"]
    command += ["--seconds", "3", "--epochs", "200", "--out", str(tmp_path / "run")]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout.splitlines()[-1])["result"]
    assert result["processes"] == 2 and result["stopped_and_resumed"] and result["steps"] > 10
    assert "Pillow decodes" in result["loader"]
    # Others say in one line what is missing.
    answer = subprocess.run(
        [sys.executable, "train.py"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "jsonargparse, which is not installed" in answer.stderr
