"""Tables of state-dict names: one row per kind of tensor, one column per layout.

Each system has one table (`accel.models.convert.<system>.TABLE`). A layout is the set of names
that one program gives to the tensors of a network; values are equal in all of them, shapes up to
sizes of 1, except in "torchvision", the ImageNet network whose tensors fill a trunk.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

OURS = "accel"
IMAGENET = "torchvision"

_FIELDS = {
    "block": r"layer\d+\.\d+",  # layer2.0
    "stage": r"\d+",
    "index": r"\d+",
    "i": r"\d+",
    "leaf": r"[a-z_]+",  # weight, bias, running_mean, ...
    "inner": r"\d+\.[a-z_]+",  # 0.weight
    "rest": r"[A-Za-z0-9_.]+",  # the same in all layouts
}

Adapt = Callable[[str, Tensor, Sequence[int]], Tensor | None]
"""(our name, ImageNet tensor, shape of ours) -> value of ours, or None: ours keeps its value."""


PublishedShape = Callable[[str, Sequence[int]], tuple[int, ...]]
"""(our name, our shape) -> shape in every layout but OURS and IMAGENET."""


ToPublished = Callable[[str, Tensor], Tensor]
"""(our name, our tensor) -> the published tensor."""

FromPublished = Callable[[str, Tensor, Sequence[int]], Tensor]
"""(our name, published tensor, our shape) -> our tensor; inverse of ToPublished."""


def _unchanged(_name: str, value: Tensor, _shape: Sequence[int]) -> Tensor:
    return value


def _same_shape(_name: str, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)


def _no_constants(_model: Any) -> dict[str, Tensor]:
    return {}


def _reshaped(_name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    return value.reshape(tuple(shape))


@dataclass(frozen=True)
class NameTable:
    """The names of one system's tensors in all layouts.

    A template is a name with fields in braces (`_FIELDS`); a field stands for the same text in
    every column of its row. Within a layout, the rows' names exclude each other (in IMAGENET they
    may agree: one tensor then fills several of ours), so every other map is one to one.
    """

    layouts: tuple[str, ...]
    """Names of the columns; the first is OURS."""

    rows: tuple[tuple[str | None, ...], ...]
    """Templates; None: the layout has no such tensor."""

    derived: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)
    """Layout -> (an earlier layout, replacements in its templates)."""

    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layout -> templates of tensors that its files may hold and that nothing needs."""

    data_parallel: tuple[str, ...] = ()
    """Layouts whose files put `module.` before every name."""

    classifier: tuple[str, ...] = ("head.fc.weight", "head.fc.bias")
    """Our tensors whose shape is that of the class count."""

    adapt: Adapt = _unchanged
    """What a tensor of IMAGENET becomes in ours."""

    published_shape: PublishedShape = _same_shape
    """Shape of our tensor in the published layouts."""

    to_published: ToPublished | None = None
    """The published tensor; None: ours in the published shape, the elements in the same order."""

    from_published: FromPublished = _reshaped
    """Our tensor from a published one of the published shape."""

    constants: Callable[[Any], dict[str, Tensor]] = _no_constants
    """(model) -> tensors that published files hold beside those of the rows, by their names."""

    @property
    def all_layouts(self) -> tuple[str, ...]:
        """OURS, the other columns, the derived layouts."""
        return (*self.layouts, *self.derived)

    def rename_all(self, name: str, source: str, target: str) -> tuple[str, ...]:
        """The names in layout `target` of the tensor that layout `source` calls `name`.

        Args:
            name: a state-dict name, without a `module.` prefix.
            source: layout of `name`.
            target: layout of the result.

        Returns:
            None, one, or (from IMAGENET) several names.
        """
        rows = zip(self._columns[source], self._columns[target], strict=True)
        return tuple(
            template.format(**match.groupdict())
            for (pattern, _), (_, template) in rows
            if template and pattern and (match := pattern.fullmatch(name))
        )

    def rename(self, name: str, source: str, target: str) -> str | None:
        """The first of `rename_all`, or None."""
        return next(iter(self.rename_all(name, source, target)), None)

    def ignores(self, name: str, layout: str) -> bool:
        """Whether files of the layout may hold this name although no tensor of ours needs it."""
        return any(_pattern(t).fullmatch(name) for t in self.ignored.get(layout, ()))

    def recognize(self, names: Sequence[str]) -> str | None:
        """The layout to which most of the names belong, or None when none belongs to any."""
        counts = {
            layout: sum(self.rename(name, layout, OURS) is not None for name in names)
            for layout in self.all_layouts
        }
        best = max(self.all_layouts, key=lambda layout: counts[layout])
        return best if counts[best] else None

    @functools.cached_property
    def _columns(self) -> dict[str, list[tuple[re.Pattern[str] | None, str | None]]]:
        """By layout: what matches the names of each row, and the row's template."""
        templates = {
            layout: [row[column] for row in self.rows] for column, layout in enumerate(self.layouts)
        }
        for layout, (base, replacements) in self.derived.items():
            templates[layout] = templates[base]
            for old, new in replacements.items():
                templates[layout] = [t and t.replace(old, new) for t in templates[layout]]
        return {
            layout: [(_pattern(t) if t else None, t) for t in column]
            for layout, column in templates.items()
        }


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """What matches the names of one template."""
    pattern = re.escape(template)
    for name, expression in _FIELDS.items():
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})")
    return re.compile(pattern)
