"""Reading checkpoints that others wrote: safely, strictly, and with the differences named.

A foreign file is untrusted. Its zip checksums are verified first (torch does not: a flipped bit
gives a silently wrong tensor), and it is unpickled with `weights_only=True` and a closed list of
harmless classes; there is no second, looser attempt.
"""

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.errors import CheckpointError
from accel.models.amtnet import AMTNet
from accel.models.convert import TABLES
from accel.models.convert.names import IMAGENET, OURS, NameTable
from accel.models.network import ClipNetwork
from accel.models.resnet import BLOCKS_PER_STAGE
from accel.models.vgg_ssd import SSD300

logger = logging.getLogger(__name__)

NAMED = 5
"""Differences of one kind that a message names; the others are counted."""

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


Network = ClipNetwork | AMTNet | SSD300


class _Ignored:
    """Stands for a NumPy object of the training loop (a score, an RNG state); keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Everything beyond tensors and plain containers that may occur in a file. NumPy's names are bound
# to a stand-in, so that nothing of NumPy runs.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *(
        (_Ignored, f"numpy.{name}")
        for name in (
            "dtype",
            "ndarray",
            "core.multiarray.scalar",
            "core.multiarray._reconstruct",
            "_core.multiarray.scalar",
            "_core.multiarray._reconstruct",
        )
    ),
]


@dataclass(frozen=True)
class ImportReport:
    """What `import_weights` did."""

    layout: str
    """Layout of the file, one of the table's of the system (`accel.models.convert`)."""

    loaded: tuple[str, ...]
    """Names of the model's tensors that were set, in the model's order."""

    kept: tuple[str, ...]
    """Names of the model's tensors that kept their values, in the model's order."""

    ignored: tuple[str, ...] = ()
    """The file's names that no tensor of the model needs, as the layout's files may have them."""


def load_foreign(path: Path | str) -> Any:
    """The object stored in a checkpoint file, on the CPU.

    NumPy objects inside it are replaced by an empty stand-in.

    Raises:
        CheckpointError: the file is missing, damaged, not a PyTorch checkpoint, or holds objects
            other than tensors, plain containers, numbers, strings and `argparse.Namespace`.
    """
    path = Path(path)
    _check_file(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise anything on a damaged or crafted file
        # torch's text is not repeated: it advises to read the file again without protection.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            problem = (
                f"refused, because it holds the Python object {refused[1]}, which may run code "
                "when read. Ask for a file with the state dict alone."
            )
        else:
            problem = (
                f"is damaged or truncated ({type(error).__name__} on reading); fetch it again."
            )
        raise CheckpointError(path, problem) from error


def _check_file(path: Path) -> None:
    """Tell why the file cannot be a checkpoint, before anything is unpickled."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not a file"
        problem = problem if path.exists() else "no such file"
        raise CheckpointError(path, f"{problem}; expected a PyTorch checkpoint.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(_ZIP_MAGIC):
            _check_zip(path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror}).") from error
    if not head:
        raise CheckpointError(path, "is empty (0 bytes); the download or copy failed.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            path, "is a Git LFS pointer, not the weights; run `git lfs pull` where it came from."
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            path, "is a web page, not a checkpoint; the download link needs a browser or a login."
        )
    if head.startswith(_LEGACY_MAGIC):
        logger.warning("%s: legacy format without checksums; damage cannot be detected.", path)
    elif not head.startswith(_ZIP_MAGIC):
        raise CheckpointError(
            path, f"is not a PyTorch checkpoint (it starts with {head[:8]!r}); expected a zip file."
        )


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores without compression; anything else may be a zip bomb.
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise CheckpointError(path, "has compressed members, which torch never writes.")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise CheckpointError(path, "declares more bytes than it has.")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            path, f"is a truncated or damaged zip file ({error}); fetch it again."
        ) from error
    if damaged:
        raise CheckpointError(
            path, f"is damaged: the checksum of {damaged} is wrong; fetch it again."
        )


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """The state dict of a checkpoint file, without the prefix of (Distributed)DataParallel.

    It is the file's `state_dict` or `model` entry, or else the file's object itself.

    Raises:
        CheckpointError: as `load_foreign`, or the file holds no state dict, or values that are not
            finite.
    """
    path = Path(path)
    state = load_foreign(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise CheckpointError(path, f"holds no state dict but a {type(state).__name__}.")
    wrong = [str(name) for name, value in state.items() if not _is_plain(value)]
    if wrong:
        raise CheckpointError(
            path, f"holds no state dict: entries that are not plain tensors: {', '.join(wrong)}."
        )
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise CheckpointError(path, f"has values that are not finite in {', '.join(bad)}.")
    return state


def _is_plain(value: Any) -> bool:
    """Whether it is a dense CPU tensor that stores all its elements (none shared by stride 0)."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def import_weights(
    model: Network,
    path: Path | str,
    *,
    layout: str | None = None,
    allow_classifier_mismatch: bool = False,
) -> ImportReport:
    """Fill `model` from a checkpoint file of any known layout of its system; all or nothing.

    Every tensor must be there with its shape, and nothing else, except:

    * `num_batches_tracked` may be missing (files of old torch versions);
    * an ImageNet ResNet of torchvision fills the trunk alone: its classifier is dropped, and
      temporal modules and head keep their values;
    * names that the system's table ignores.

    Args:
        model: of `build_model` or `build_detector`; its dtype, device and layout are kept.
        path: the file.
        layout: of the file; None: recognized by its names.
        allow_classifier_mismatch: keep the model's classifier when the file's has another class
            count, instead of raising.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: the file cannot be read, its layout is unknown, or it does not fit; then
            the message counts the differences, names some of each kind, and the model is unchanged.
    """
    path = Path(path)
    foreign = read_state_dict(path)
    table = TABLES[model.system]
    layout = layout or _recognize(table, foreign, path, model.system)
    expected = model.state_dict()
    found: dict[str, Tensor] = {}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    unexpected: list[str] = []
    ignored: list[str] = []
    for name, value in foreign.items():
        places = [ours for ours in table.rename_all(name, layout, OURS) if ours in expected]
        if layout == IMAGENET:
            if all(ours in table.classifier for ours in places) and places:
                continue
            for ours in places:
                adapted = table.adapt(ours, value, expected[ours].shape)
                if adapted is None:
                    optional.add(ours)
                else:
                    found[ours] = adapted
        else:
            found |= {ours: _in_our_shape(table, layout, ours, value, expected) for ours in places}
        if not places:
            (ignored if table.ignores(name, layout) else unexpected).append(name)

    if layout == IMAGENET:
        optional |= {n for n in expected if table.rename(n, OURS, layout) is None}
        optional |= set(table.classifier)
    if allow_classifier_mismatch and any(
        name in found and found[name].shape[:1] != expected[name].shape[:1]
        for name in table.classifier
    ):
        optional |= set(table.classifier)
        found = {name: value for name, value in found.items() if name not in table.classifier}
    missing = [name for name in expected if name not in found and name not in optional]
    other = [name for name in found if not _fits(found[name], expected[name])]
    if missing or unexpected or other:
        raise CheckpointError(
            path,
            f'does not fit this model (layout "{layout}"): {len(missing)} missing, '
            f"{len(unexpected)} unexpected, {len(other)} of another shape or type."
            f"{_elsewhere(foreign, model.system, layout)}\n"
            f"{_differences(table, missing, unexpected, other, found, expected)}",
        )

    model.load_state_dict(found, strict=False)
    report = ImportReport(
        layout,
        tuple(name for name in expected if name in found),
        tuple(name for name in expected if name not in found),
        tuple(ignored),
    )
    logger.info(
        'imported %s: layout "%s", %d of %d tensors', path, layout, len(found), len(expected)
    )
    return report


def _recognize(table: NameTable, state: dict[str, Tensor], path: Path, system: str) -> str:
    layout = table.recognize(list(state))
    if layout is None:
        raise CheckpointError(
            path,
            f"has names of no known layout of {system} ({', '.join(table.all_layouts)}), "
            f"such as {next(iter(state))}.",
        )
    return layout


def export_weights(model: Network, layout: str) -> dict[str, Tensor]:
    """The model's state dict as files of the layout have it, in the model's order.

    Args:
        model: a network of `build_model` or `build_detector`.
        layout: one of its system's table, but not IMAGENET, which has no place for all tensors.

    Raises:
        ValueError: the layout lacks a name.
    """
    table = TABLES[model.system]
    prefix = "module." if layout in table.data_parallel else ""
    exported = {}
    for name, value in model.state_dict().items():
        there = table.rename(name, OURS, layout)
        if there is None:
            raise ValueError(f'export_weights: layout "{layout}" has no name for {name}.')
        if layout != OURS and table.to_published is not None:
            value = table.to_published(name, value)
        elif layout != OURS:
            value = value.contiguous().reshape(table.published_shape(name, value.shape))
        exported[prefix + there] = value.contiguous()
    if layout != OURS:
        exported |= {prefix + name: value for name, value in table.constants(model).items()}
    return exported


def describe(
    state: dict[str, Tensor], path: Path, system: str, layout: str | None = None
) -> dict[str, Any]:
    """The arguments with which `build_model` makes the network that a state dict belongs to.

    Args:
        state: of `read_state_dict`.
        path: its file, for messages.
        system: a key of TABLES.
        layout: of the file; None: recognized by its names.

    Returns:
        name, variant, depth, width, stages, stem, num_classes, num_segments (8 where no shape
        depends on it).

    Raises:
        CheckpointError: unknown layout, an ImageNet network, or no stem, block or classifier.
    """
    table = TABLES[system]
    layout = layout or _recognize(table, state, path, system)
    if layout == IMAGENET:
        raise CheckpointError(
            path, "is an ImageNet network without temporal modules; give it to --model.pretrained."
        )
    shapes = {table.rename(name, layout, OURS): value.shape for name, value in state.items()}
    stem, classifier = shapes.get("trunk.conv1.weight"), shapes.get(table.classifier[0])
    blocks = [
        sum(f"trunk.layer{stage}.{block}.conv2.weight" in shapes for block in range(100))
        for stage in range(1, 5)
    ]
    stages = sum(count > 0 for count in blocks)
    bottleneck = "trunk.layer1.0.conv3.weight" in shapes
    depths = [
        depth
        for depth, counts in BLOCKS_PER_STAGE.items()
        if list(counts[:stages]) == blocks[:stages] and (depth >= 50) == bottleneck
    ]
    if stem is None or classifier is None or len(stem) < 4 or not depths or not stages:
        raise CheckpointError(
            path,
            f'is not a network of {system} in layout "{layout}": no stem, no classifier, or '
            f"{blocks} blocks in its stages.{_elsewhere(state, system, layout)}",
        )
    if any(name and name.startswith("trunk.layer3.1.conv1.reduce") for name in shapes):
        variant = "slowonly"
    else:
        variant = "snippet" if stem[1] == 9 else "2d"
    per_segment = shapes.get("trunk.layer1.0.temporal.G.0.weight")  # TAM: [2T, T]
    return {
        "name": system,
        "variant": variant,
        "depth": depths[0],
        "width": stem[0],
        "stages": stages,
        "stem": "small" if stem[-1] == 3 else "imagenet",
        "num_classes": classifier[0],
        "num_segments": per_segment[1] if per_segment else 8,
    }


def _elsewhere(state: dict[str, Tensor], system: str, layout: str) -> str:
    """A sentence on the network whose names these are; empty where no other one knows more."""

    def known(place: tuple[str, str]) -> int:
        table = TABLES[place[0]]
        return sum(table.rename(name, place[1], OURS) is not None for name in state)

    others = [(name, own) for name, table in TABLES.items() for own in table.all_layouts]
    best = max([(system, layout), *others], key=known)
    if best == (system, layout):
        return ""
    return f' Most of its names are those of {best[0]} in layout "{best[1]}".'


def _in_our_shape(
    table: NameTable, layout: str, name: str, value: Tensor, expected: dict[str, Tensor]
) -> Tensor:
    """The value as ours has it, when its shape is the layout's; otherwise unchanged."""
    shape = expected[name].shape
    if layout != OURS and value.shape == table.published_shape(name, shape):
        return table.from_published(name, value, shape)
    return value


def _some(lines: list[str]) -> list[str]:
    """The first lines, and how many are left out."""
    left = len(lines) - NAMED
    return lines if left <= 0 else [*lines[:NAMED], f"  ... and {left} more"]


def _fits(found: Tensor, expected: Tensor) -> bool:
    return (
        found.shape == expected.shape
        and found.is_floating_point() == expected.is_floating_point()
        and not found.is_complex()
    )


def _differences(
    table: NameTable,
    missing: list[str],
    unexpected: list[str],
    other: list[str],
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> str:
    """Some differences, a line each: names of the model, unexpected ones as the file has them."""
    lines = _some([f"  missing: {name}" for name in missing])
    lines += _some([f"  unexpected: {name}" for name in unexpected])
    lines += _some(
        [
            f"  {name}: got {list(found[name].shape)} {found[name].dtype}, "
            f"expected {list(expected[name].shape)} {expected[name].dtype}"
            for name in other
        ]
    )
    if set(table.classifier) & set(other):
        lines.append("The class counts differ: allow_classifier_mismatch keeps the new classifier.")
    if any(name.endswith("temporal.G.0.weight") for name in other):
        lines.append("The weights of TAM's global branch depend on the number of segments.")
    return "\n".join(lines)
