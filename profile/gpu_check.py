"""Checks this checkout on a machine with an NVIDIA GPU: builds, tests, measures, writes a report.

    python profile/gpu_check.py                        # everything
    python profile/gpu_check.py --only env,kernels --out /tmp/report

Writes report.json, report.md and one log per section. Exit code 0: every section that ran has
passed, 1: one failed, 2: no GPU. Every number is measured in this run; what did not run is reported
as such.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
LIMIT_S = 480  # of every section
PYTEST = ("-m", "pytest", "-q", "-m", "needs_cuda")
NORMS = ("torch", "torch+compile", "fused", "fused+compile")
# Section: command and time limit in seconds; env is answered in this process.
COMMANDS = {
    "build": ([PYTHON, "setup.py", "build_ext", "--inplace"], LIMIT_S),
    "tests_operators": ([PYTHON, *PYTEST, "tests/kernels"], LIMIT_S),
    "tests": ([PYTHON, *PYTEST, "--ignore=tests/kernels", "tests"], LIMIT_S),
    "sanitizer": (
        [
            *"compute-sanitizer --error-exitcode 9".split(),
            *f"{PYTHON} -m pytest -q -m needs_cuda -k matches_reference tests/kernels".split(),
        ],
        LIMIT_S,
    ),
    "kernels": (
        [PYTHON, "profile/kernels_bench.py", "--device", "cuda", "--compile", "--json"],
        LIMIT_S,
    ),
    **{
        f"step_{precision}": (
            [PYTHON, "profile/step.py", "--device", "cuda", "--precision", precision, "--json"],
            LIMIT_S,
        )
        for precision in ("bf16", "fp16", "tf32", "fp32")
    },
    # The same steps with every operator as plain PyTorch.
    "step_reference": (
        [
            *("env", "ACCEL_KERNELS=reference", PYTHON, "profile/step.py", "--device", "cuda"),
            *("--precision", "fp16", "--json"),
        ],
        LIMIT_S,
    ),
    # Real training, decoding included, with a profile of ten steps.
    "training": (
        [
            *(PYTHON, "train.py", "--recipe", "demo_motion8", "--run.device", "cuda"),
            *("--precision.mode", "fp16", "--log.profile", "torch", "--out", "{out}/training_run"),
        ],
        LIMIT_S,
    ),
    "training_report": ([PYTHON, "profile/nsys_report.py", "{out}/training_run/profile"], 120),
    "bench": (
        [
            *(PYTHON, "-m", "accel.cli.main", "bench", "--recipe", "demo_motion8"),
            *("--run.device", "cuda", "--precision.mode", "fp16"),
        ],
        LIMIT_S,
    ),
    # Decides where model.batch_norm "auto" is "fused": 5 % less than the best of the others.
    "step_batch_norm": (
        [
            *(PYTHON, "profile/step.py", "--device", "cuda", "--precision", "fp16", "--json"),
            *(
                "--models",
                ",".join(f"{name}@{code}" for name in ("tsn", "tanet") for code in NORMS),
            ),
        ],
        LIMIT_S,
    ),
}
SECTIONS = ("env", *COMMANDS)
SMI_FIELDS = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total"


def environment() -> dict[str, Any]:
    """Versions and hardware, as found."""
    try:
        query = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"nvidia-smi did not answer: {error}"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "revision": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gpus": torch.cuda.device_count(),
        f"nvidia_smi ({SMI_FIELDS})": smi.splitlines(),
        "cpu_threads": os.cpu_count(),
        "dali": importlib.util.find_spec("nvidia") is not None
        and importlib.util.find_spec("nvidia.dali") is not None,
    }


def run_section(name: str, out: Path) -> dict[str, Any]:
    """Run one command with its time limit; its output goes to <out>/<name>.log."""
    command, limit_s = COMMANDS[name]
    command = [part.replace("{out}", str(out.resolve())) for part in command]
    if name == "step_tf32" and torch.cuda.get_device_capability() < (8, 0):
        outcome = "not run: this GPU has no tf32 arithmetic"
        return {"outcome": outcome, "seconds": 0.0, "last_line": ""}
    if name == "step_bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        outcome = "not run: this GPU has no bf16 arithmetic"
        return {"outcome": outcome, "seconds": 0.0, "last_line": ""}
    log = out / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            result = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "ACCEL_REQUIRE": "cuda,extension"},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
            )
            outcome = "passed" if result.returncode == 0 else f"failed ({result.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit_s} s"
        except FileNotFoundError:
            outcome = f"not run: {command[0]} is not installed"
    lines = log.read_text(errors="replace").splitlines()
    section = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    section["last_line"] = lines[-1][:200] if lines else ""
    if name.startswith(("kernels", "step")) and outcome == "passed":
        section.update(json.loads(lines[-1]), last_line="")
    return section


def markdown(report: dict[str, Any]) -> str:
    """The report as text: environment, outcomes, operators beside a copy, steps beside TSN."""
    lines = ["# GPU check", ""]
    lines += [f"- {key}: {value}" for key, value in report.get("env", {}).items()]
    lines += ["", "| section | outcome | seconds | last line |", "|---|---|---|---|"]
    for name in COMMANDS:
        if section := report.get(name):
            values = (section["outcome"], section["seconds"], section["last_line"])
            lines.append(f"| {name} | {values[0]} | {values[1]} | {values[2]} |")
        else:
            lines.append(f"| {name} | not run | | |")
    if rows := report.get("kernels", {}).get("rows"):
        columns = ("op", "form", "channels", "size", "direction", "implementation")
        lines += ["", f"| {' | '.join(columns)} | median us | GB/s | of copy |", "|---" * 9 + "|"]
        for row in rows:
            site = " | ".join(str(row[column]) for column in columns)
            numbers = f"{row['median_us']:.1f} | {row['gb_s']:.0f} | {row['of_copy']:.0%}"
            lines.append(f"| {site} | {numbers} |")
    for name in (name for name in COMMANDS if name.startswith("step")):
        if rows := report.get(name, {}).get("models"):
            columns = ("model", "step_ms", "p10_ms", "p90_ms", "clips_per_s", "ratio_to_tsn")
            columns += ("ratio_to_tsn_min", "tflops", "peak_gib")
            lines += ["", f"{name}: {report[name]['settings']['batch']} clips per step", ""]
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--out", type=Path, help="default: profile/results/<gpu>-<date>")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; one of {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no CUDA device.", file=sys.stderr)
        return 2

    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = args.out or ROOT / "profile" / "results" / f"{gpu}-{date.today().isoformat()}"
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for name in (name for name in SECTIONS if name in wanted):
        print(f"gpu_check: {name} ...", file=sys.stderr, flush=True)
        report[name] = environment() if name == "env" else run_section(name, out)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "report.md").write_text(markdown(report))
    print((out / "report.md").read_text())
    outcomes = [report[name]["outcome"] for name in COMMANDS if name in report]
    return 0 if all(text.startswith(("passed", "not run")) for text in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
