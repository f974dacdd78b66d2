"""Run golden cases: `python tests/parity/run_cases.py FOLDER...`

Every *.json with a `case` field under the folders is run from that field alone, and every array
it stores is compared. One line per case; exit status 0 only when at least one case was found and
all passed.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


def _load(path: Path) -> ModuleType:
    """Import one file under its own name, once.

    Not through sys.path: with tests/ on it, the folder tests/kernels would hide the package.
    """
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


goldens = _load(HERE.parent / "goldens.py")
comparison = _load(HERE / "comparison.py")


def load_families() -> dict[str, Any]:
    """All families of the files `families_*.py` beside this one."""
    _load(HERE / "module_case.py")
    families: dict[str, Any] = {}
    for path in sorted(HERE.glob("families_*.py")):
        families.update(_load(path).FAMILIES)
    return families


def find_files(folders: list[Path]) -> list[Path]:
    """All json files under the folders (or the files themselves), sorted in each."""
    files: list[Path] = []
    for folder in folders:
        files += [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
    return files


def run_case(path: Path, families: dict[str, Any]) -> Any:
    """The Verdict on one file, or None when it holds no case; never raises."""
    try:
        case = goldens.read_case(path)
        if case is None:
            return None
        if case.family not in families:
            raise goldens.CaseError(f'family "{case.family}" is not known')
        family = families[case.family]
        comparison.check_args(case, family)
        return comparison.compare(case, family.run(case))
    except goldens.CaseError as error:
        problem = str(error)
    except Exception as error:  # whatever a malformed case provokes is that case's failure
        problem = f"{type(error).__name__}: {error}"
    return comparison.Verdict(problems=[problem])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="run_cases.py")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("-k", metavar="TEXT", default="", help="only files whose path has TEXT")
    parser.add_argument(
        "--kernels", choices=["reference", "cpp"], help="kernel backend (sets ACCEL_KERNELS)"
    )
    options = parser.parse_args(argv)
    if options.kernels:
        os.environ["ACCEL_KERNELS"] = options.kernels
    missing = [folder for folder in options.folders if not folder.exists()]
    for folder in missing:
        print(f"FAIL  {folder}: no such folder")

    families = load_families()
    passed = failed = 0
    for path in find_files(options.folders):
        if options.k not in str(path):
            continue
        start = time.perf_counter()
        verdict = run_case(path, families)
        if verdict is None:
            continue
        duration_s = time.perf_counter() - start
        state = "FAIL" if verdict.problems else "pass"
        worst = f" ({verdict.worst})" if verdict.worst else ""
        print(
            f"{state}  {path}: max relative error {verdict.error:.2g}{worst}, "
            f"{verdict.checked} compared, {duration_s:.1f} s",
            flush=True,
        )
        for problem in verdict.problems[:20]:
            print(f"      {problem[:500]}")
        if len(verdict.problems) > 20:
            print(f"      and {len(verdict.problems) - 20} more")
        passed += not verdict.problems
        failed += bool(verdict.problems)
    print(f"{passed} passed, {failed} failed" if passed + failed else "no case found")
    return 0 if passed and not failed and not missing else 1


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))  # so that it runs from a checkout, uninstalled
    sys.exit(main())
