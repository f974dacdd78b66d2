"""What gpu_check.py runs: one command per section, the most important first."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

PYTHON = sys.executable
ROOT = Path(__file__).resolve().parents[2]
MOST_S = 480
"""Time limit of the longest sections."""

_CUDA = ("--device", "cuda")
_TESTS = (PYTHON, "-m", "pytest", "-q", "-m", "needs_cuda", "-p", "no:cacheprovider")
_TURNS = ("--warmups", "5", "--steps", "30")  # 7 networks, also where a step takes half a second
_STEP = (PYTHON, "profile/step.py", *_CUDA, *_TURNS, "--json")
_NORMS = ("torch", "torch+compile", "fused", "fused+compile")
_GRAPHED = ("tsn", "tanet", "masnet", "tdn", "amsnet", "msn")
_CASES = (PYTHON, "profile/kernels_bench.py", *_CUDA)
_ONCE = (*_CASES, "--quick", "--batch", "1", "--warmups", "1", "--repeats", "1")
_MINUTE = ("profile/real_training.py", *_CUDA, "--precision", "fp16", "--json", "--seconds", "60")
# A tensor is an allocation of its own: memcheck knows where it ends. The caching allocator cuts
# many tensors from one block, inside of which nothing is out of bounds.
_EXACT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Section:
    """One command; its last line is JSON where the report needs numbers."""

    name: str
    command: tuple[str, ...]
    """`{out}` stands for the folder of the report."""
    limit_s: int = MOST_S
    modules: tuple[str, ...] = ()
    """Python packages without which it is not run."""
    operators: Literal["cuda", "mixed", "reference", "auto"] = "cuda"
    """Which implementation of the operators runs. "cuda": the section is left out where that cannot
    run, so that plain PyTorch never stands in for it. "mixed": left out alike, but others run too,
    on host tensors or as a test chooses. "reference": plain PyTorch. "auto": what there is; the
    report claims nothing of it."""
    environment: dict[str, str] = field(default_factory=dict)
    json: bool = False
    """Whether the last line of the output is a JSON object."""
    obstacle: Callable[[], str | None] = lambda: None
    """Why this machine cannot run it, or None."""

    def why_not(self) -> str | None:
        """One line that says why it cannot run here, or None."""
        missing = [name for name in self.modules if not _importable(name)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            return f"{', '.join(missing)} {verb} not installed"
        if shutil.which(self.command[0]) is None:
            return f"{self.command[0]} is not installed"
        return (_no_operators() if self.needs_build else None) or self.obstacle()

    @property
    def needs_build(self) -> bool:
        """Whether it says nothing without the CUDA operators of this code."""
        return self.operators in ("cuda", "mixed")

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the command, beside those of every section."""
        forced = {"ACCEL_KERNELS": self.operators}
        return (forced if self.operators in ("cuda", "reference") else {}) | self.environment


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


@functools.cache
def _no_operators() -> str | None:
    """Why the CUDA operators cannot run; asked after the build, by a process of its own."""
    code = "from kernels import _library; print(_library.can_run_on('cuda')[1])"
    answer = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if answer.returncode == 0:
        return answer.stdout.strip()[-200:] or None
    said = " ".join(answer.stderr.split())[-200:]
    return said or f"loading the operators ends with exit status {answer.returncode}"


def _one_gpu() -> str | None:
    return "there is one GPU only" if torch.cuda.device_count() < 2 else None


def _no_tf32() -> str | None:
    old = torch.cuda.get_device_capability() < (8, 0)
    return "this GPU has no tf32 arithmetic" if old else None


def _no_bf16() -> str | None:
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    return None if has_it else "this GPU has no bf16 arithmetic"


def sanitizer(*options: str) -> tuple[str, ...]:
    """compute-sanitizer with options; of the toolkit's folder, if it is not on PATH."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)
    return (program or "compute-sanitizer", "--error-exitcode", "9", *options)


SECTIONS = (
    Section(
        "build",
        (PYTHON, "setup.py", "build_ext", "--inplace"),
        limit_s=420,
        modules=("setuptools",),
        operators="auto",
    ),
    # The steps that the project is judged by: every network beside TSN.
    Section("step_fp16", (*_STEP, "--precision", "fp16"), limit_s=240, json=True),
    Section("kernels", (*_CASES, "--json"), limit_s=240, json=True),
    # What published code runs: plain PyTorch, fp32, NCHW.
    Section(
        "step_fp32_nchw",
        (*_STEP, "--layout", "nchw", "--models", "tanet"),
        limit_s=180,
        operators="reference",
        json=True,
    ),
    Section(
        "memory",
        (*_STEP, "--precision", "fp16", "--batch", "8", "--steps", "5", "--warmups", "2"),
        limit_s=180,
        json=True,
    ),
    # Real pixels from JPEG folders, with evaluation, stop, resume and a profile of ten steps.
    Section(
        "training",
        (PYTHON, *_MINUTE, "--out", "{out}/training_run"),
        limit_s=240,
        modules=("PIL", "yaml", "tqdm"),
        json=True,
    ),
    Section(
        "training_report",
        (PYTHON, "profile/nsys_report.py", "{out}/training_run/profile"),
        limit_s=120,
        operators="auto",
    ),
    # The same by one process per GPU.
    Section(
        "training_distributed",
        (
            *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"),
            *(*_MINUTE, "--out", "{out}/distributed_run"),
        ),
        limit_s=240,
        modules=("PIL", "yaml", "tqdm"),
        json=True,
        obstacle=_one_gpu,
    ),
    Section("tests_operators", (*_TESTS, "tests/kernels"), modules=("pytest",), operators="mixed"),
    # A replayed step is the eager one, to the last input and rate; needs nothing beside pytest.
    Section(
        "tests_graphs",
        (*_TESTS, "tests/engine/test_graphs_on_gpu.py", "tests/engine/test_step_benchmark.py"),
        limit_s=180,
        modules=("pytest",),
        operators="auto",
    ),
    # Every operator once, forward and backward: out-of-bounds and misaligned accesses.
    Section("sanitizer", (*sanitizer(), *_ONCE), limit_s=300, environment=_EXACT),
    Section(
        "step_bf16",
        (*_STEP, "--precision", "bf16"),
        limit_s=240,
        json=True,
        obstacle=_no_bf16,
    ),
    # At the published 8 clips the launches of the host show: one by one, and as a CUDA graph.
    Section(
        "step_graph",
        (
            *(*_STEP, "--precision", "fp16", "--batch", "8", "--models"),
            ",".join(f"{name}{mode}" for name in _GRAPHED for mode in ("", "+graph")),
        ),
        limit_s=240,
        json=True,
    ),
    # Graphs and compiled steps must give the losses of eager ones; memory with recomputation.
    Section(
        "graphs",
        (PYTHON, "profile/execution.py", *_CUDA, "--precision", "fp16", "--json"),
        json=True,
    ),
    # The same steps with every operator as plain PyTorch.
    Section(
        "step_reference",
        (*_STEP, "--precision", "fp16"),
        limit_s=300,
        operators="reference",
        json=True,
    ),
    # Decides where model.batch_norm "auto" is "fused": 5 % less than the best of the others.
    Section(
        "step_batch_norm",
        (
            *(*_STEP, "--precision", "fp16", "--models"),
            ",".join(f"{name}@{code}" for name in ("tsn", "tanet") for code in _NORMS),
        ),
        json=True,
    ),
    Section(
        "tests",
        (*_TESTS, "tests/engine", "tests/detection", "tests/models"),
        modules=("pytest", "jsonargparse", "av"),
        operators="auto",
    ),
    Section(
        "bench",
        (
            *(PYTHON, "-m", "accel.cli.main", "bench", "recipe", "loop"),
            *("--run.device", "cuda", "--precision.mode", "fp16"),
        ),
        limit_s=240,
        modules=("jsonargparse", "av"),
    ),
    # NVDEC and nvJPEG: the frames of PyAV, clips/s beside the CPU, and whether training waits.
    Section(
        "decoder_frames",
        (PYTHON, "profile/decoder_frames.py", *_CUDA, "--decoders", "dali_gpu", "--json"),
        limit_s=120,
        modules=("nvidia.dali", "av"),
        operators="auto",
        json=True,
    ),
    Section(
        "loader",
        (
            *(PYTHON, "profile/loader.py", *_CUDA, "--decoders", "dali", "dali_gpu", "pyav"),
            *("--sets", "jpeg", "h264_gop12", "vp9_gop12", "--peers", "pillow", "pyav_seek"),
            "--json",
        ),
        modules=("nvidia.dali", "av", "PIL"),
        operators="auto",
        json=True,
    ),
    Section(
        "data_wait",
        (PYTHON, "profile/data_wait.py", *_CUDA, "--precision", "fp16", "--json"),
        modules=("nvidia.dali", "av", "jsonargparse"),
        json=True,
    ),
    # The detector: heads as convolutions against the published gathered form, steps, and training
    # at 300 px from images on disk.
    Section(
        "amtnet",
        (
            *(PYTHON, "profile/detector.py", *_CUDA, "--precision", "fp16", "--json"),
            *("--batch", "8", "--steps", "20", "--warmups", "5"),
        ),
        limit_s=180,
        operators="auto",
        json=True,
    ),
    Section(
        "amtnet_training",
        (
            *(PYTHON, "train.py", "--recipe", "amtnet_rgb_ucf24", "--json"),
            *("--detection.dataset", "moving_objects", "--detection.pixel_scale", "64"),
            *("--run.device", "cuda", "--precision.mode", "fp16", "--optim.lr", "0.00001"),
            *("--train.max_steps", "40", "--out", "{out}/amtnet_run"),
        ),
        limit_s=300,
        modules=("jsonargparse", "PIL"),
        operators="mixed",  # the evaluation suppresses boxes on the host
        json=True,
    ),
    Section(
        "step_tf32",
        (*_STEP, "--precision", "tf32"),
        limit_s=300,
        json=True,
        obstacle=_no_tf32,
    ),
    Section("step_fp32", (*_STEP, "--precision", "fp32"), json=True),
    Section("kernels_compile", (*_CASES, "--quick", "--compile", "--json"), json=True),
    Section("sanitizer_race", (*sanitizer("--tool", "racecheck"), *_ONCE), limit_s=300),
    Section(
        "sanitizer_tests",
        (*sanitizer(), *_TESTS, "-k", "matches_reference", "tests/kernels"),
        modules=("pytest",),
        operators="mixed",
        environment=_EXACT,
    ),
)
