"""The rules of the tree: who imports whom, what is imported where, and what imports cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("accel", "kernels", "pipelines")
# Package -> first-party packages it may import. Longest match wins.
ALLOWED = {
    "kernels": {"kernels"},
    "pipelines": {"pipelines"},
    "accel.errors": set(),
    "accel.detection": {"accel.detection", "kernels"},
    "accel.models": {"accel.models", "accel.errors", "kernels"},
    "accel.models.amtnet": {"accel.models", "accel.detection.priors"},
    "accel.models.vgg_ssd": {"accel.models", "accel.detection.priors"},
    "accel.engine": {"accel", "pipelines", "kernels"},
    "accel.cli": {"accel", "pipelines", "kernels"},
    "accel": {"accel"},
    "train": {"accel.cli"},
}
# Third-party module -> the only files (globs) that may import it.
ONLY_IN = {
    "nvidia.dali": ["pipelines/dali_*.py"],
    "jsonargparse": ["accel/engine/config.py"],
    "torch.distributed": ["accel/engine/distributed.py"],
    "matplotlib": ["accel/engine/report.py"],
    "nvtx": ["accel/engine/timing.py"],
    "pynvml": ["accel/engine/gpu_sampling.py", "accel/cli/doctor.py"],
    "av": ["pipelines/*.py"],
    "PIL": ["pipelines/*.py"],
}


def _sources():
    files = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return [*files, ROOT / "train.py"]


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path):
    """Every dotted name a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path):
    module = _module(path)
    rule = max((prefix for prefix in ALLOWED if _within(module, prefix)), key=len)
    for name in _imports(path):
        if any(_within(name, package) for package in (*PACKAGES, "tests", "profile")):
            allowed = any(_within(name, prefix) for prefix in ALLOWED[rule])
            assert allowed, f"{module} ({rule}) may not import {name}"
        for library, places in ONLY_IN.items():
            if _within(name, library):
                here = path.relative_to(ROOT)
                assert any(here.match(place) for place in places), f"{here} imports {library}"


def test_torch_load_is_called_in_one_place_and_never_unsafely():
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"):
                continue
            assert path.relative_to(ROOT).as_posix() == "accel/models/weights.py"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords["weights_only"] == "True"


def test_no_catch_all_module_names_and_no_shadowing():
    names = {path.stem for path in _sources()}
    assert not names & {"utils", "misc", "common", "helpers"}
    assert not (ROOT / "profile" / "__init__.py").exists()
    scripts = {path.stem for path in (ROOT / "profile").glob("*.py")}
    assert not scripts & set(sys.stdlib_module_names)
    assert not list((ROOT / "tests").rglob("__init__.py"))
    tests = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(tests) == len(set(tests)), "test file names must be unique"


def test_no_notimplementederror_or_bare_except_in_released_code():
    for path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = [ast.unparse(n.exc) for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc]
        assert not [text for text in raised if "NotImplemented" in text], path
        bare = [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]
        assert not bare, path


def test_prints_only_where_results_are_shown():
    allowed = {"accel/engine/journal.py"}  # the progress line
    for path in _sources():
        here = path.relative_to(ROOT).as_posix()
        if here.startswith("accel/cli/") or here in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_print = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            assert not is_print, f"{here}:{node.lineno} prints"


def test_importing_the_packages_needs_no_gpu_dali_decoder_or_extension():
    code = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        libraries = ("nvidia", "av", "PIL", "jsonargparse", "matplotlib", "nvtx", "pynvml")
        if name.split(".")[0] in libraries:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
def refuse(*args): raise OSError("no extension here")
torch.ops.load_library = refuse
torch.cuda.init = refuse
import accel, pipelines, kernels
import pipelines.loader, accel.models
assert not torch.cuda.is_initialized()
print(kernels.temporal_taps(torch.ones(2, 8, 1, 1), torch.ones(8, 3), num_segments=2).sum().item())
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "32.0"
