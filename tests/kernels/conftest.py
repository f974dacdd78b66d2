"""CUDA kernels on the host: builds the .cu files as C++ against host_cuda.h."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def build_for_host() -> Callable[..., ctypes.CDLL]:
    """`build`: compile .cu files (by name, without folder and suffix) and load them."""
    return build
