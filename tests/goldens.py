"""Golden cases: reading them, and the rule that turns a tensor's name into its values.

A case states parameters and inputs by name and shape alone. The values follow from the name: its
CRC-32 seeds NumPy's PCG64 generator, whose streams are fixed across versions and machines.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def _stream(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def fill_value(name: str, shape: Sequence[int]) -> np.ndarray:
    """Values, float64, of the parameter or buffer `name`.

    num_batches_tracked: 0. running_mean: 0.1 N(0, 1). running_var: U(0.5, 1.5). A weight of one
    dimension (the scale of a norm): U(0.25, 0.75). Any other tensor of one dimension (a bias):
    0.1 N(0, 1). The rest: N(0, 1 / fan_in), fan_in being the product of all sizes but the first.
    """
    kind = name.split(".")[-1]
    size = tuple(shape)
    stream = _stream(name)
    if kind == "num_batches_tracked":
        return np.zeros(size)
    if kind == "running_var":
        return 0.5 + stream.random(size)
    if len(size) < 2 and kind == "weight":
        return 0.25 + 0.5 * stream.random(size)
    if len(size) < 2 or kind == "running_mean":
        return 0.1 * stream.standard_normal(size)
    return stream.standard_normal(size) * np.sqrt(1.0 / np.prod(size[1:]))


def fill_input(name: str, shape: Sequence[int]) -> np.ndarray:
    """Values, float64, N(0, 1), of the input or cotangent `name`."""
    return _stream(f"input:{name}").standard_normal(tuple(shape))


class CaseError(Exception):
    """A case file that cannot be run as it is."""


@dataclass(frozen=True)
class Case:
    """One golden case."""

    path: Path
    """The json file."""

    family: str
    """`<system>.<family>`."""

    args: dict[str, Any]
    """Everything a run needs, besides `content` fields that the family names."""

    content: dict[str, Any]
    """The whole json."""

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of the module's parameters and buffers."""
        return {name: tuple(shape) for name, shape in self.content.get("state_dict", {}).items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The stored arrays; empty when the case has none to compare."""
        path = self.path.with_suffix(".npz")
        if not self.args.get("outputs") and not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:  # zipfile, zlib, OSError, ValueError: all mean the same here
            raise CaseError(f"{path.name}: {type(error).__name__}: {error}") from error


def read_case(path: Path) -> Case | None:
    """The case in a json file, or None when the file is a json without a `case` field.

    Raises:
        CaseError: not a json, or a malformed `case` field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CaseError(f"cannot be read: {error}") from error
    if not isinstance(content, dict) or "case" not in content:
        return None
    case = content["case"]
    if (
        not isinstance(case, dict)
        or not isinstance(case.get("family"), str)
        or not isinstance(case.get("args"), dict)
    ):
        raise CaseError('field "case" must be {"family": str, "args": {...}}')
    return Case(path, case["family"], case["args"], content)
