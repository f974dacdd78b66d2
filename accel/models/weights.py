"""Reading checkpoints that others wrote: safely, strictly, and with every difference named.

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
from accel.models.convert import TABLES
from accel.models.convert.names import IMAGENET, OURS, NameTable
from accel.models.network import ClipNetwork

logger = logging.getLogger(__name__)

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


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
        problem = "is not a file" if path.exists() else "no such file"
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
    model: ClipNetwork, path: Path | str, *, allow_classifier_mismatch: bool = False
) -> ImportReport:
    """Fill `model` from a checkpoint file of any known layout of its system; all or nothing.

    Every tensor must be there with its shape, and nothing else, except:

    * `num_batches_tracked` may be missing (files of old torch versions);
    * an ImageNet ResNet of torchvision fills the trunk alone: its classifier is dropped, and
      temporal modules and head keep their values;
    * names that the system's table ignores.

    Args:
        model: a network of `build_model`; its dtype, device and layout are kept.
        path: the file.
        allow_classifier_mismatch: keep the model's classifier when the file's has another class
            count, instead of raising.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: the file cannot be read, its layout is unknown, or it does not fit; then
            the message lists every difference and the model is unchanged.
    """
    path = Path(path)
    foreign = read_state_dict(path)
    table = TABLES[model.system]
    layout = table.recognize(list(foreign))
    if layout is None:
        raise CheckpointError(
            path,
            f"has names of no known layout of {model.system} ({', '.join(table.all_layouts)}), "
            f"such as {next(iter(foreign))}.",
        )
    expected = model.state_dict()
    found: dict[str, Tensor] = {}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    unexpected = []
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
            found |= dict.fromkeys(places, value)
        if not places and not table.ignores(name, layout):
            unexpected.append(name)

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
            path, _differences(table, layout, missing, unexpected, other, found, expected)
        )

    model.load_state_dict(found, strict=False)
    report = ImportReport(
        layout,
        tuple(name for name in expected if name in found),
        tuple(name for name in expected if name not in found),
    )
    logger.info(
        'imported %s: layout "%s", %d of %d tensors', path, layout, len(found), len(expected)
    )
    return report


def _fits(found: Tensor, expected: Tensor) -> bool:
    return (
        found.shape == expected.shape
        and found.is_floating_point() == expected.is_floating_point()
        and not found.is_complex()
    )


def _differences(
    table: NameTable,
    layout: str,
    missing: list[str],
    unexpected: list[str],
    other: list[str],
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> str:
    """All differences in one message: names of the model, unexpected ones as the file has them."""
    lines = [
        f'does not fit this model (layout "{layout}"): {len(missing)} missing, '
        f"{len(unexpected)} unexpected, {len(other)} of another shape or type."
    ]
    lines += [f"  missing: {name}" for name in missing]
    lines += [f"  unexpected: {name}" for name in unexpected]
    lines += [
        f"  {name}: got {list(found[name].shape)} {found[name].dtype}, "
        f"expected {list(expected[name].shape)} {expected[name].dtype}"
        for name in other
    ]
    if set(table.classifier) & set(other):
        lines.append("The class counts differ: allow_classifier_mismatch keeps the new classifier.")
    if any(name.endswith("temporal.G.0.weight") for name in other):
        lines.append("The weights of TAM's global branch depend on the number of segments.")
    return "\n".join(lines)
