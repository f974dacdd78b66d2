"""The benchmarks of a checkout: the scripts of profile/, run one after the other, and their rows.

profile/ is no package and not installed; its scripts run as programs of their own, so that each
measures in a fresh process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.errors import AccelError

PROFILE = Path(__file__).resolve().parents[2] / "profile"

# Sizes at which the whole suite takes under three minutes on two CPU cores; ratios at such sizes
# say what is broken, not what is fast. Else the scripts' own sizes: 8 x 224 x 224.
_SMALL_STEPS = "--frames 4 --size 112 --batch 2 --warmups 1 --steps 3".split()
_SMALL_KERNELS = "--quick --repeats 3".split()
_SMALL_INPUT = "--turns 1".split()


class BenchError(AccelError):
    """A benchmark that could not run or did not end well."""


def steps(device: str, precision: str, threads: int, *, full: bool) -> dict[str, Any]:
    """Training steps of every network beside TSN: with our operators, and with plain PyTorch.

    Returns:
        `settings`, and a row per network: model, step_ms, p10_ms, p90_ms, clips_per_s,
        ratio_to_tsn, plain_ms (median of the steps in plain PyTorch), gain (plain_ms / step_ms).
    """
    command = ["--device", device, "--precision", precision, "--threads", str(threads), "--json"]
    command += [] if full else _SMALL_STEPS
    fused = run_script("step.py", command)
    plain = run_script("step.py", command, {"ACCEL_KERNELS": "reference"})
    plain_ms = {row["model"]: row["step_ms"] for row in plain["models"]}
    columns = ("model", "step_ms", "p10_ms", "p90_ms", "clips_per_s", "ratio_to_tsn")
    rows = []
    for row in fused["models"]:
        slow = plain_ms[row["model"]]
        chosen = {name: row[name] for name in columns}
        rows.append({**chosen, "plain_ms": slow, "gain": round(slow / row["step_ms"], 3)})
    return {"settings": fused["settings"], "rows": rows}


def operators(device: str, threads: int, *, full: bool) -> dict[str, Any]:
    """Each operator over all sites of ResNet-50, forward and backward, beside plain PyTorch.

    Returns:
        `settings`, and a row per operator: op, us (sum of the medians), of_copy (bandwidth in that
        of a copy), plain_us (the reference), gain (plain_us / us).
    """
    command = ["--device", device, "--json", *(["--threads", str(threads)] if threads else [])]
    report = run_script("kernels_bench.py", [*command, *([] if full else _SMALL_KERNELS)])
    rows = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        found = [row for row in report["rows"] if row["op"] == op]
        ours = [row for row in found if row["implementation"] in ("cpp", "cuda")]
        plain = [row for row in found if row["implementation"] == "reference"]
        us, plain_us = (sum(float(row["median_us"]) for row in part) for part in (ours, plain))
        moved = sum(row["gb_s"] * row["median_us"] for row in ours)
        copied = sum(row["copy_gb_s"] * row["median_us"] for row in ours)
        rows.append(
            {
                "op": op,
                "us": round(us, 1),
                "of_copy": round(moved / copied, 3),
                "plain_us": round(plain_us, 1),
                "gain": round(plain_us / us, 3),
            }
        )
    return {"settings": report["environment"], "rows": rows}


def loop(recipe: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    """What the training loop itself costs, of `profile/loop_overhead.py`."""
    options = [f"--{key}={value}" for key, value in overrides.items()]
    return run_script("loop_overhead.py", ["--recipe", recipe, "--json", *options])


def readers(cache: Path, threads: int, *, full: bool) -> dict[str, Any]:
    """Clips/s of our decoders beside other loaders, on the generated sets that are there.

    Args:
        cache: the cache folder.
        threads: of each loader; 0 = all cores.
        full: write the sets that are missing first, which takes minutes.

    Raises:
        BenchError: there is no set.
    """
    written = sorted(path.parent.name for path in cache.glob("loader-bench-12/*/list.txt"))
    if not written and not full:
        raise BenchError("no set is there yet; --full writes them once (minutes).")
    options = ["--json", "--threads", str(threads)]
    if not full:
        options += [*_SMALL_INPUT, "--sets", *written]
    report = run_script("loader.py", options)
    return {"settings": report["settings"], "rows": report["sets"]}


def run_script(
    name: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object that a script of profile/ prints as its last line.

    Raises:
        BenchError: there is no profile/ here, or the script failed; with its last line.
    """
    script = PROFILE / name
    if not script.is_file():
        raise BenchError(f"{script}: no such file; the scripts are in a checkout of the sources.")
    paths = [str(PROFILE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(variables or {})}
    answer = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        said = (answer.stderr.strip() or answer.stdout.strip() or "nothing").splitlines()[-1]
        raise BenchError(f"profile/{name} failed ({answer.returncode}): {said}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result
