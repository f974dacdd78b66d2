"""Checks this checkout on a machine with an NVIDIA GPU: builds, tests, measures, writes a report.

    python profile/gpu_check.py                              # the most important first, 9 minutes
    python profile/gpu_check.py                              # again: what is missing yet
    python profile/gpu_check.py --budget 0 --out /tmp/report # everything, however long
    python profile/gpu_check.py --only "step_*,kernels"      # these, also if they are done

Writes report.json, report.md (what is asked beside what was measured) and one log per section into
the folder of the report, anew after each section. A section that hangs is ended at its own limit
and costs no other one; one whose packages are missing here is left out, in one line. Exit code 0:
every section that ran has passed, 1: one failed, 2: no GPU, or wrong options. Every number is
measured by the commands of this report; what did not run is reported as such.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can load this file as a module

from gpu_report.sections import SECTIONS, Section
from gpu_report.text import markdown

ROOT = Path(__file__).resolve().parents[1]
CODE = (".cpp", ".cu", ".cuh", ".h", ".py", ".toml", ".yaml")
LEAST_S = 20  # of the budget, with which no section is started any more
SMI_FIELDS = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total"


def sources() -> str:
    """Hash of the code here, committed or not."""
    results = ROOT / "profile" / "results"  # recipes of runs among them
    paths = [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]
    for folder in ("accel", "kernels", "pipelines", "profile", "tests"):
        paths += (ROOT / folder).rglob("*")
    digest = hashlib.sha256()
    for path in sorted(p for p in paths if p.suffix in CODE and results not in p.parents):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions and hardware, as found."""
    try:
        query = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"nvidia-smi did not answer: {error}"
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        revision = None
    return {
        "revision": revision,
        "sources": sources(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gpus": torch.cuda.device_count(),
        f"nvidia_smi ({SMI_FIELDS})": smi.splitlines(),
        "cpu_threads": os.cpu_count(),
    }


def run_section(section: Section, out: Path, left_s: float, build: str) -> dict[str, Any]:
    """Run one command with its time limit; its output goes to <out>/<name>.log.

    Args:
        section: what to run.
        out: folder of the report.
        left_s: seconds of the budget that are left; infinite without one.
        build: outcome of the section of that name, or "".
    """
    reason = section.why_not()
    if section.needs_build and build.startswith(("failed", "stopped")):
        reason = "the build failed"  # a library of an earlier one may lie there
    if reason:
        return {"outcome": f"not run: {reason}", "seconds": 0.0, "last_line": ""}
    if left_s < LEAST_S:
        outcome = "not run: the budget is used up; the same command goes on"
        return {"outcome": outcome, "seconds": 0.0, "last_line": ""}
    command = [part.replace("{out}", str(out.resolve())) for part in section.command]
    limit_s = min(section.limit_s, left_s)
    variables = {"ACCEL_REQUIRE": "cuda,extension", "PYTHONUNBUFFERED": "1"}
    # This GPU's code alone: the build takes a fifth of that for all architectures.
    variables["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # if it is not installed
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    log = out / f"{section.name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables, **section.variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            code = process.wait(timeout=limit_s)
            outcome = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            why = "its limit" if limit_s == section.limit_s else "the end of the budget"
            outcome = f"stopped after {limit_s:.0f} s, {why}"
        finally:
            end_group(process)
    lines = log.read_text(errors="replace").splitlines()
    result: dict[str, Any] = {
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "last_line": lines[-1][:200] if lines else "",
        "command": " ".join(section.command),
    }
    if section.json:  # also of one that failed: wrong frames are a number, too
        try:
            result |= {**dict(json.loads(lines[-1])), **result, "last_line": ""}
        except (ValueError, TypeError, IndexError):
            if outcome == "passed":
                result["outcome"] = "failed: its last line is not JSON"
    return result


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a command and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wanted_sections(only: str, done: dict[str, Any]) -> list[Section]:
    """The sections to run: those named, else those that have not passed yet.

    Raises:
        ValueError: a name that means none.
    """
    if not only:
        passed = [name for name, result in done.items() if result.get("outcome") == "passed"]
        return [section for section in SECTIONS if section.name not in passed]
    patterns = only.split(",")
    names = [section.name for section in SECTIONS] + ["env"]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--only: no section {pattern!r}; there are {', '.join(names)}.")
    return [s for s in SECTIONS if any(fnmatch.fnmatch(s.name, p) for p in patterns)]


def stored(out: Path, env: dict[str, Any]) -> dict[str, Any]:
    """The sections that an earlier call has stored of the same code on the same GPU."""
    try:
        report = json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return {}
    same = ("sources", "gpu", "torch")
    if any(report.get("env", {}).get(key) != env[key] for key in same):
        print("gpu_check: the report there is of other code or another GPU: begun anew.")
        return {}
    return {key: value for key, value in report.items() if key != "env"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names or patterns, comma-separated")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds of this call; 0 = no limit (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="default: profile/results/<gpu>-<date>")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no CUDA device.", file=sys.stderr)
        return 2

    start = time.monotonic()
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = args.out or ROOT / "profile" / "results" / f"{gpu}-{date.today().isoformat()}"
    out.mkdir(parents=True, exist_ok=True)
    env = environment()
    done = stored(out, env)
    try:
        wanted = wanted_sections(args.only, done)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"env": env, **done}
    write(report, out)
    for section in wanted:
        print(f"gpu_check: {section.name} ...", file=sys.stderr, flush=True)
        left_s = args.budget - (time.monotonic() - start) if args.budget else float("inf")
        build = report.get("build", {}).get("outcome", "")
        report[section.name] = result = run_section(section, out, left_s, build)
        print(f"gpu_check: {result['outcome']}, {result['seconds']} s", file=sys.stderr, flush=True)
        write(report, out)
    print((out / "report.md").read_text())
    outcomes = [report[section.name]["outcome"] for section in wanted]
    return 0 if all(text.startswith(("passed", "not run")) for text in outcomes) else 1


def write(report: dict[str, Any], out: Path) -> None:
    """Both forms of the report."""
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(markdown(report))


if __name__ == "__main__":
    sys.exit(main())
