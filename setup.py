"""Builds the optional extension kernels._C; all metadata is in pyproject.toml.

CUDA kernels are compiled if torch is a CUDA build and nvcc of the same major version is found, else
the C++ twins alone, else (no torch, no C++ compiler, or ACCEL_BUILD=python) nothing: the package
then runs on its plain PyTorch reference. What is left out, and why, is one line on stderr.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = Path("kernels/csrc")
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"  # Turing to Hopper; newer GPUs use the PTX


def notice(text: str) -> None:
    """One line for whoever reads the build log."""
    print(f"accel: {text}", file=sys.stderr)


def cuda_obstacle(cuda_version: str | None, cuda_home: str | None) -> str | None:
    """Why the CUDA kernels cannot be compiled, or None if they can."""
    if cuda_version is None:
        return "this torch is a CPU build"
    nvcc = Path(cuda_home) / "bin" / "nvcc" if cuda_home else None
    if nvcc is None or not nvcc.exists():
        return "nvcc was not found (set CUDA_HOME)"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", text)
    if found is None or found[1] != cuda_version.split(".")[0]:
        return f"nvcc is release {found[1] if found else '?'}, torch is built for {cuda_version}"
    return None


def extension() -> dict[str, object]:
    """Arguments of setup() that build kernels._C, or none."""
    if os.environ.get("ACCEL_BUILD") == "python":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        notice(f"kernels._C is not built: torch cannot be imported ({error}).")
        return {}
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        notice("kernels._C is not built: no C++ compiler was found (set CXX).")
        return {}

    obstacle = cuda_obstacle(torch.version.cuda, cpp_extension.CUDA_HOME)
    sources = [*sorted((CSRC / "bindings").glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]
    headers = [*CSRC.glob("**/*.h"), *CSRC.glob("**/*.cuh")]
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() and os.name == "posix" else []
    # -g0 undoes the -g of Python's own flags, a third of the compile time and most of the library's
    # size. Without the last flag, loops with a select on floating-point values stay scalar.
    flags = {"cxx": ["-O3", "-g0", "-Wall", *openmp, "-fno-trapping-math"]}
    build = cpp_extension.CppExtension
    if obstacle is None:
        sources += sorted((CSRC / "cuda").glob("*.cu"))
        flags = {"cxx": [*flags["cxx"], "-DACCEL_WITH_CUDA"], "nvcc": ["-O3", "-lineinfo"]}
        build = cpp_extension.CUDAExtension
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    else:
        notice(f"kernels._C is built without CUDA kernels: {obstacle}.")
    module = build(
        "kernels._C",
        [str(path) for path in sources],
        include_dirs=[str(ROOT / CSRC)],
        depends=[str(path) for path in sorted(headers)],
        extra_compile_args=flags,
        extra_link_args=openmp,
        py_limited_api=True,  # no Python symbol is used: one binary for every Python
    )
    # The library is no Python module, so its name carries no Python ABI: kernels/_C.so.
    builder = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [module], "cmdclass": {"build_ext": builder}}


os.chdir(ROOT)
setup(
    # By name: profile/ and tests/ must never be installed.
    packages=find_packages(include=["accel", "accel.*", "kernels", "pipelines"]),
    include_package_data=False,  # the C++ sources are for building only
    package_data={"accel": ["recipes/*.yaml", "recipes/facts/*.yaml"]},
    **extension(),
)
