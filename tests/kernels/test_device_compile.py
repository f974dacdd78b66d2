"""Compiles all CUDA code for every supported GPU and guards registers, shared memory and spills.

`python tests/kernels/test_device_compile.py [NAME...]` rewrites the tables
kernels/csrc/cuda/resources/NAME.csv, one for each .cu file (default: all).
"""

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kernels" / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TABLES = CSRC / "cuda" / "resources"
ARCHITECTURES = (75, 80, 86, 89, 90)
COLUMNS = ("kernel", "sm", "registers", "shared_bytes", "spill_bytes")
REGISTERS_TOLERATED = 16  # more than in the table: compilers differ, mistakes differ more

# What torch's extension builder adds: no implicit conversion or operator of the 16-bit types.
TORCH_FLAGS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
]

pytestmark = [pytest.mark.needs_nvcc, pytest.mark.slow]


def compile_source(source: Path, folder: Path) -> str:
    """What ptxas reports when `source` is compiled for all architectures."""
    command = ["nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", f"-I{CSRC}", "-c"]
    command += TORCH_FLAGS
    for sm in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]
    command += [str(source), "-o", str(folder / f"{source.stem}.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return result.stderr


def short_name(mangled: str) -> str:
    """Kernel name with template arguments, without namespaces and parameters."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|accel_kernels::|^void ", "", full.strip())
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


def measure(source: Path) -> dict[tuple[str, int], dict[str, int]]:
    """Resources of every kernel of a source for every architecture."""
    with tempfile.TemporaryDirectory() as folder:
        return resources(compile_source(source, Path(folder)))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_resources_are_those_of_the_table(source: Path) -> None:
    with (TABLES / f"{source.stem}.csv").open(newline="") as file:
        table = {(row["kernel"], int(row["sm"])): row for row in csv.DictReader(file)}
    measured = measure(source)
    assert measured.keys() == table.keys(), f"run {Path(__file__).name} {source.stem}"
    for key, row in measured.items():
        before = {name: int(value) for name, value in table[key].items() if name != "kernel"}
        assert row["spill_bytes"] <= before["spill_bytes"], key
        assert row["shared_bytes"] <= before["shared_bytes"], key
        assert row["registers"] <= before["registers"] + REGISTERS_TOLERATED, key


def test_every_table_has_a_source() -> None:
    assert {path.stem for path in TABLES.glob("*.csv")} == {path.stem for path in SOURCES}


@pytest.mark.parametrize("source", sorted((CSRC / "bindings").glob("*.cpp")), ids=lambda s: s.stem)
def test_bindings_compile_with_cuda(source: Path, tmp_path: Path) -> None:
    """The CUDA half of a binding, syntax only: torch's CPU wheels carry the c10/cuda headers."""
    listing = subprocess.run(
        ["nvcc", "-M", "-x", "cu", "-"],
        input="#include <cuda_runtime_api.h>\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    toolkit = re.search(r"(\S+)/cuda_runtime_api\.h", listing)[1]
    torch_include = Path(torch.__file__).parent / "include"
    generated = "c10/cuda/impl/cuda_cmake_macros.h"
    if not (torch_include / generated).exists():  # made when torch is built for CUDA
        (tmp_path / generated).parent.mkdir(parents=True)
        (tmp_path / generated).write_text("#pragma once\n")
    command = ["c++", "-std=c++20", "-fsyntax-only", "-DACCEL_WITH_CUDA", "-Wall", "-Werror"]
    command += [f"-I{CSRC}", f"-I{tmp_path}", "-isystem", toolkit, "-isystem", str(torch_include)]
    command += ["-isystem", str(torch_include / "torch/csrc/api/include")]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def main() -> None:
    TABLES.mkdir(exist_ok=True)
    for source in SOURCES:
        if sys.argv[1:] and source.stem not in sys.argv[1:]:
            continue
        rows = sorted(measure(source).items())
        with (TABLES / f"{source.stem}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((name, sm, *row.values()) for (name, sm), row in rows)
        sys.stdout.write(f"{source.stem}: {len(rows)} rows\n")


if __name__ == "__main__":
    main()
