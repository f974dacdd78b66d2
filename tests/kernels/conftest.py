"""State that tests of operators start from; CUDA kernels on the host: builds the .cu files as C++
against host_cuda.h."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kernels import _backend

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kernels" / "csrc"
SHIM = Path(__file__).with_name("host_cuda.h")
BUILD = ROOT / "build" / "host_cuda"

# Set by test_sanitizer.py, which runs these tests again with checked memory accesses.
SANITIZE = os.environ.get("ACCEL_SANITIZE", "")


def cuda_include_flags() -> list[str]:
    """-I flags of the toolkit's headers, from nvcc's own list of what cuda_fp16.h pulls in."""
    listing = subprocess.run(
        ["nvcc", "-M", "-x", "cu", "-"],
        input="#include <cuda_fp16.h>\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {
        re.sub(f"/{header}$", "", path)
        for path in listing.replace("\\\n", " ").split()
        for header in ("cuda_fp16.h", "nv/target")
        if path.endswith(f"/{header}")
    }
    return [f"-I{directory}" for directory in sorted(found)]


def build(*sources: Path | str) -> ctypes.CDLL:
    """Compile .cu sources as C++ into a shared library, once for each state of the sources.

    A name stands for kernels/csrc/cuda/<name>.cu.
    """
    paths = [CSRC / "cuda" / f"{s}.cu" if isinstance(s, str) else s for s in sources]
    inputs = [SHIM, *paths, *sorted(CSRC.glob("**/*.h")), *sorted(CSRC.glob("**/*.cuh"))]
    content = SANITIZE.encode() + b"".join(path.read_bytes() for path in inputs)
    library = BUILD / f"{paths[0].stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        command = [shutil.which("c++") or "g++", "-std=c++17", "-O1", "-shared", "-fPIC"]
        command += ["-include", str(SHIM), f"-I{CSRC}", *cuda_include_flags()]
        if SANITIZE:
            command += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g"]
        command += ["-x", "c++", *map(str, paths), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


# What torch's extension builder adds: no implicit conversion or operator of the 16-bit types.
TORCH_FLAGS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
]
ARCHITECTURES = (75, 80, 86, 89, 90)
DEVICE_OBJECTS = ROOT / "build" / "device_objects"


def compile_for_device(source: Path) -> tuple[Path, str]:
    """Compile a .cu source for all architectures, once for each state of the sources.

    Returns:
        The object file, and what ptxas reported.
    """
    inputs = [source, *sorted(CSRC.glob("**/*.h")), *sorted(CSRC.glob("**/*.cuh"))]
    command = ["nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
    command += [f"-I{CSRC}", "-c", *TORCH_FLAGS]
    for sm in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]
    content = repr(command).encode() + b"".join(path.read_bytes() for path in inputs)
    target = DEVICE_OBJECTS / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
    report = target.with_suffix(".txt")
    if not report.exists():
        DEVICE_OBJECTS.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [*command, str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        report.write_text(result.stderr)
    return target, report.read_text()


@pytest.fixture(scope="session")
def object_for_device() -> Callable[[Path], tuple[Path, str]]:
    """`compile_for_device`."""
    return compile_for_device


@pytest.fixture(scope="session")
def build_for_host() -> Callable[..., ctypes.CDLL]:
    """`build`: compile .cu files (by name, without folder and suffix) and load them."""
    return build


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend from the environment, and no fallback reported yet."""
    monkeypatch.delenv(_backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_backend, "_reported", set())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
