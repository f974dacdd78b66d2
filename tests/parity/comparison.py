"""What a family returns, and the comparison of its results with the arrays of a case."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from goldens import Case, CaseError

NO_GRADIENT = -1.0  # stands in `grad_norms` for a parameter that the loss does not reach


@dataclass
class Results:
    """Everything a run produced."""

    arrays: dict[tuple[str, str], np.ndarray | None] = field(default_factory=dict)
    """By `kind` and `of` of the case's records; None for a gradient that does not exist."""

    facts: int = 0
    """Number of facts (names, groups) that the family compared itself, exactly."""

    differences: list[str] = field(default_factory=list)
    """What was wrong among these facts."""

    compared: set[str] = field(default_factory=set)
    """Arrays of the npz among these facts."""

    def expect(self, what: str, value: object, expected: object) -> None:
        """Compare a fact, exactly."""
        self.facts += 1
        if value != expected:
            self.differences.append(
                f"{what}: got {str(value)[:200]}, expected {str(expected)[:200]}"
            )

    def expect_array(self, case: Case, name: str, value: Any, *, rtol: float = 0.0) -> None:
        """Compare an array with one that the case stores without a record."""
        self.facts += 1
        self.compared.add(name)
        value, expected = np.asarray(value), case.arrays()[name]
        if value.shape != expected.shape or not np.allclose(value, expected, rtol=rtol, atol=0):
            self.differences.append(f"{name}: got {value!r:.200}, expected {expected!r:.200}")


@dataclass(frozen=True)
class Family:
    """How to run the cases of one family."""

    run: Callable[[Case], Results]
    """Builds, fills and runs the thing under test, from the case alone."""

    args: frozenset[str]
    """Names of the arguments that every case of the family has."""


@dataclass
class Verdict:
    """The comparison of one case."""

    checked: int = 0
    """Arrays and facts compared."""

    error: float = 0.0
    """Largest |a - b| / max|b| over arrays with a relative tolerance and max|b| above `atol`."""

    worst: str = ""
    """Array with that error."""

    problems: list[str] = field(default_factory=list)
    """One sentence for each failure; empty: passed."""


def check_args(case: Case, family: Family) -> None:
    """Raise CaseError unless the case has exactly the family's arguments."""
    missing = family.args - case.args.keys()
    unknown = case.args.keys() - family.args - {"input_arrays"}
    if missing or unknown:
        raise CaseError(
            f"arguments differ from the family's: missing {sorted(missing)}, "
            f"unknown {sorted(unknown)}"
        )


def compare(case: Case, results: Results) -> Verdict:
    """Compare every record, every absent gradient, and see that no stored array is left over."""
    stored = case.arrays()
    verdict = Verdict(checked=results.facts, problems=list(results.differences))
    unused = set(stored) - set(case.args.get("input_arrays", [])) - results.compared
    for record in case.args.get("outputs", []):
        name = record["array"]
        try:
            computed = _computed(case, results, record)
            for key, value in _selections(record, computed, stored):
                unused.discard(key)
                if key not in stored:
                    raise CaseError("the npz has no such array")
                verdict.checked += 1
                _compare_array(key, value, stored[key], record, verdict)
        except (CaseError, IndexError) as error:
            verdict.problems.append(f"{name}: {error}")
    for name in case.args.get("absent_gradients", []):
        gradient = results.arrays.get(("grad_param", name), np.ones(1))
        if gradient is not None and np.any(gradient):
            verdict.problems.append(f"{name}: has a gradient (or does not exist), expected none")
    verdict.problems += [f"{name}: stored, but no record names it" for name in sorted(unused)]
    if not verdict.checked:
        verdict.problems.append("nothing to compare")
    return verdict


def _computed(case: Case, results: Results, record: dict[str, Any]) -> np.ndarray:
    kind, of = record["kind"], record["of"]
    if kind == "grad_norms":
        gradients = [results.arrays[("grad_param", name)] for name in case.content[of]]
        value = np.array([NO_GRADIENT if g is None else np.linalg.norm(g) for g in gradients])
    elif (kind, of) not in results.arrays:
        raise CaseError(f'the run has no {kind} "{of}"')
    else:
        found = results.arrays[(kind, of)]
        value = np.zeros(record["shape"]) if found is None else found
    if list(value.shape) != list(record["shape"]):
        raise CaseError(f"shape is {list(value.shape)}, expected {record['shape']}")
    return value


def _selections(
    record: dict[str, Any], value: np.ndarray, stored: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The stored arrays that one record stands for, and what each should hold."""
    name, stride = record["array"], record["stride"]
    rows, item = record.get("rows", "all"), record.get("item", -1)
    reduce, axis = record.get("reduce", "none"), record.get("axis", -1)
    if rows != "all":
        value = value[:, stored[rows]]
    if item >= 0:
        value = value[item]
    if reduce != "none":
        over = None if axis < 0 else axis
        total, norm = value.sum(axis=over), np.sqrt(np.square(value).sum(axis=over))
        parts = {"sum": [total], "l2": [norm], "sum_l2": [total, norm]}[reduce]
        yield name, np.array(parts if reduce == "sum_l2" else parts[0])
    elif name not in stored and f"{name}.sample" in stored:
        yield f"{name}.sample", value.reshape(-1)[::stride]
        stats = [value.sum(), np.linalg.norm(value), np.abs(value).max()]
        yield f"{name}.stats", np.array(stats)
    elif stride == 1 and name in stored and stored[name].shape == value.shape:
        yield name, value
    else:
        yield name, value.reshape(-1)[::stride]


def _compare_array(
    name: str, value: np.ndarray, stored: np.ndarray, record: dict[str, Any], verdict: Verdict
) -> None:
    if value.size != stored.size:
        raise CaseError(f"{value.size} values, stored are {stored.size}")
    value = value.reshape(stored.shape)
    if stored.dtype.kind not in "fiub":
        if not np.array_equal(value, stored):
            verdict.problems.append(f"{name}: differs")
        return
    a, b = value.astype(np.float64), stored.astype(np.float64)
    difference = np.abs(a - b)
    largest = float(np.abs(b).max(initial=0.0))
    allowed = record["atol"] + record["rtol"] * np.abs(b) + record["rtol_of_max"] * largest
    if not np.all(difference <= allowed):  # also when a value is not finite
        verdict.problems.append(
            f"{name}: off by {difference.max():.3g}, the largest value being {largest:.3g}"
        )
    relative = record["rtol"] > 0 or record["rtol_of_max"] > 0
    if relative and largest > record["atol"]:
        error = float(difference.max()) / largest
        if not error <= verdict.error:
            verdict.error, verdict.worst = error, name
