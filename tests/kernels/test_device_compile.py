"""Compiles all CUDA code for every supported GPU and guards registers, shared memory and spills.

`python tests/kernels/test_device_compile.py [NAME...]` rewrites the tables
kernels/csrc/cuda/resources/NAME.csv, one for each .cu file (default: all).
"""

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kernels" / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
BINDINGS = sorted((CSRC / "bindings").glob("*.cpp"))
TABLES = CSRC / "cuda" / "resources"
CUDA_TORCH = ROOT / "build" / "cuda-torch" / "torch"  # unpacked by `make cuda-torch`
COLUMNS = ("kernel", "sm", "registers", "shared_bytes", "spill_bytes")
REGISTERS_TOLERATED = 16  # more than in the table: compilers differ, mistakes differ more

pytestmark = [pytest.mark.needs_nvcc, pytest.mark.slow]


def short_name(mangled: str) -> str:
    """Kernel name with template arguments, without namespaces and parameters."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|accel_kernels::|^void ", "", full.strip())
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # of a constant: (IngestForm)1
    return name.split("(")[0]


def resources(report: str) -> dict[tuple[str, int], dict[str, int]]:
    """(kernel, sm) to registers, shared and spilled bytes."""
    rows = {}
    for entry in report.split("Compiling entry function ")[1:]:
        mangled, sm = re.match(r"'(\w+)' for 'sm_(\d+)'", entry).groups()
        shared = re.search(r"(\d+) bytes smem", entry)
        rows[short_name(mangled), int(sm)] = {
            "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
            "shared_bytes": int(shared[1]) if shared else 0,
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", entry))),
        }
    return rows


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_resources_are_those_of_the_table(
    source: Path, object_for_device: Callable[[Path], tuple[Path, str]]
) -> None:
    with (TABLES / f"{source.stem}.csv").open(newline="") as file:
        table = {(row["kernel"], int(row["sm"])): row for row in csv.DictReader(file)}
    measured = resources(object_for_device(source)[1])
    assert measured.keys() == table.keys(), f"run {Path(__file__).name} {source.stem}"
    for key, row in measured.items():
        before = {name: int(value) for name, value in table[key].items() if name != "kernel"}
        assert row["spill_bytes"] <= before["spill_bytes"], key
        assert row["shared_bytes"] <= before["shared_bytes"], key
        assert row["registers"] <= before["registers"] + REGISTERS_TOLERATED, key


def test_every_table_has_a_source() -> None:
    assert {path.stem for path in TABLES.glob("*.csv")} == {path.stem for path in SOURCES}


def toolkit_include() -> str:
    """The folder of the CUDA toolkit's headers."""
    listing = subprocess.run(
        ["nvcc", "-M", "-x", "cu", "-"],
        input="#include <cuda_runtime_api.h>\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return re.search(r"(\S+)/cuda_runtime_api\.h", listing)[1]


def compile_binding(source: Path, torch_include: Path, *arguments: str) -> None:
    command = ["c++", "-std=c++20", "-DACCEL_WITH_CUDA", "-Wall", "-Werror", f"-I{CSRC}"]
    command += ["-isystem", toolkit_include(), "-isystem", str(torch_include)]
    command += ["-isystem", str(torch_include / "torch/csrc/api/include"), *arguments]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(CUDA_TORCH.exists(), reason="the whole extension is built against CUDA torch")
@pytest.mark.parametrize("source", BINDINGS, ids=lambda source: source.stem)
def test_bindings_compile_with_cuda(source: Path, tmp_path: Path) -> None:
    """The CUDA half of a binding, syntax only: torch's CPU wheels carry the c10/cuda headers."""
    torch_include = Path(torch.__file__).parent / "include"
    generated = "c10/cuda/impl/cuda_cmake_macros.h"
    if not (torch_include / generated).exists():  # made when torch is built for CUDA
        (tmp_path / generated).parent.mkdir(parents=True)
        (tmp_path / generated).write_text("#pragma once\n")
    compile_binding(source, torch_include, "-fsyntax-only", f"-I{tmp_path}")


@pytest.mark.needs_cuda_torch
def test_whole_extension_links_against_cuda_torch(
    tmp_path: Path, object_for_device: Callable[[Path], tuple[Path, str]]
) -> None:
    """Every symbol is found; the result is not loaded, since that takes CUDA's own libraries."""
    objects = [str(object_for_device(source)[0]) for source in SOURCES]

    def compile_host(source: Path) -> str:
        target = tmp_path / f"{source.parent.name}_{source.stem}.o"
        compile_binding(
            source, CUDA_TORCH / "include", "-O0", "-fPIC", "-fopenmp", "-c", "-o", str(target)
        )
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects += pool.map(compile_host, [*BINDINGS, *sorted((CSRC / "cpu").glob("*.cpp"))])
    found = [
        library
        for folder in Path(toolkit_include()).resolve().parents
        for library in folder.glob("lib*/libcudart.so*")
    ]
    assert found, "the toolkit has no libcudart"
    command = ["c++", "-shared", "-fopenmp", "-o", str(tmp_path / "_C.so"), *objects, str(found[0])]
    command += [f"-L{CUDA_TORCH / 'lib'}", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch"]
    command += ["-Wl,--no-undefined", "-Wl,--unresolved-symbols=ignore-in-shared-libs"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import compile_for_device

    TABLES.mkdir(exist_ok=True)
    for source in SOURCES:
        if sys.argv[1:] and source.stem not in sys.argv[1:]:
            continue
        rows = sorted(resources(compile_for_device(source)[1]).items())
        with (TABLES / f"{source.stem}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((name, sm, *row.values()) for (name, sm), row in rows)
        sys.stdout.write(f"{source.stem}: {len(rows)} rows\n")


if __name__ == "__main__":
    main()
