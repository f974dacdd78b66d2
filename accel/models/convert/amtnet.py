"""AMTNet and ROAD's SSD300: parameter names and shapes of published state dicts and ours.

    accel     ours
    original  the authors' code (AMTNet: without the `module.` of DataParallel)

AMTNet's published heads are linear layers over gathered windows; here they are convolutions.
Published files also hold constant index tables, which are left out on import and written on export.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.models.amtnet_heads import WINDOW
from accel.models.convert.amtnet_heads import convolution_from_linear, linear_from_convolution
from accel.models.convert.names import NameTable
from accel.models.vgg_ssd import SOURCE_CHANNELS, map_sizes


def _core(ours: str, published: str) -> list[tuple[str, str]]:
    return [
        (f"{ours}.vgg.{{i}}.{{leaf}}", f"{published}vgg.{{i}}.{{leaf}}"),
        (f"{ours}.norm.{{leaf}}", f"{published}L2Norm.{{leaf}}"),
        (f"{ours}.extras.{{i}}.{{leaf}}", f"{published}extras.{{i}}.{{leaf}}"),
        # No published file has norms; the row names them in ours.
        (f"{ours}.extra_norms.{{i}}.{{leaf}}", f"{published}extra_norms.{{i}}.{{leaf}}"),
    ]


def _channels(name: str) -> int | None:
    """Channels of the map of a head's weight, published width; None for any other tensor."""
    part = name.split(".")
    return SOURCE_CHANNELS[int(part[1])] if part[0] == "heads" and part[3] == "weight" else None


def _published_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    is_head = _channels(name) is not None and len(shape) == 4
    return (shape[0], shape[1] * WINDOW**2) if is_head else tuple(shape)


def _to_published(name: str, value: Tensor) -> Tensor:
    """Head weights [O, T*C, 3, 3] as [O, T*9*C]."""
    if "running_" in name:
        raise ValueError(f"{name}: networks with batch norm have no published layout.")
    channels = _channels(name)
    if channels is None or value.dim() != 4:
        return value
    if value.shape[1] % channels:
        raise ValueError(
            f"{name}: the published layout has {channels} channels in each frame of this map, "
            f"got {value.shape[1]} in all; networks of another width have no published layout."
        )
    return linear_from_convolution(value, value.shape[1] // channels)


def _from_published(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    channels = _channels(name)
    if channels is None or len(shape) != 4 or shape[1] % channels:
        return value.reshape(tuple(shape))
    return convolution_from_linear(value, shape[1] // channels)


def _index_tables(model: Any) -> dict[str, Tensor]:
    """The constants that published AMTNet files hold, by their names there."""
    tables = {}
    frames, levels = model.num_frames, model.levels
    cores = ("core_base", "core_extra")[: len(model.trunks)]
    for core in cores:
        for k, size in enumerate(map_sizes(300, levels)):
            cells = torch.arange(size**2)
            row, column = cells // size, cells % size
            window = torch.arange(WINDOW)
            padded = (row[:, None] + window)[:, :, None] * (size + 2)
            padded = padded + (column[:, None] + window)[:, None, :]  # [h*h, 3, 3]
            tables[f"{core}.featPool{k}.ffm_index"] = cells.repeat(frames, 1)
            tables[f"{core}.featPool{k}.spatial_pool.counts"] = padded.flatten(1)
    return tables


_CONSTANTS = tuple(
    f"core_{stream}.featPool{{i}}.{rest}"
    for stream in ("base", "extra")
    for rest in ("ffm_index", "spatial_pool.counts")
)

TABLE = NameTable(
    ("accel", "original"),
    (
        *_core("base", "core_base."),
        *_core("extra", "core_extra."),
        ("heads.{i}.loc.{leaf}", "loc.{i}.{leaf}"),
        ("heads.{i}.conf.{leaf}", "conf.{i}.{leaf}"),
    ),
    ignored={"original": _CONSTANTS},
    data_parallel=("original",),
    classifier=tuple(f"heads.{k}.conf.{leaf}" for k in range(6) for leaf in ("weight", "bias")),
    published_shape=_published_shape,
    to_published=_to_published,
    from_published=_from_published,
    constants=_index_tables,
)

SSD300_TABLE = NameTable(
    ("accel", "original"),
    (
        *_core("base", ""),
        ("loc.{i}.{leaf}", "loc.{i}.{leaf}"),
        ("conf.{i}.{leaf}", "conf.{i}.{leaf}"),
    ),
    classifier=tuple(f"conf.{k}.{leaf}" for k in range(6) for leaf in ("weight", "bias")),
    to_published=_to_published,
)


@dataclass(frozen=True)
class CoreReport:
    """What `fill_trunk` did."""

    loaded: tuple[str, ...]
    """Tensors of the trunk that were set, in its order, by published names (`vgg.0.weight`)."""

    kept: tuple[str, ...]
    """Those that were not."""

    skipped: tuple[str, ...]
    """Names of the checkpoint that no tensor of the trunk has, in its order."""


def fill_trunk(
    trunk: nn.Module, state: Mapping[str, Tensor], *, published_rule: bool = False
) -> CoreReport:
    """Start one trunk from a checkpoint of ROAD's SSD, or of AMTNet with one stream.

    A first convolution with another number of input channels is repeated along them and divided
    by the repeats, so that flow stacks start from single images.

    Args:
        trunk: an `SSDTrunk`.
        state: published names, with or without `module.`, or a state dict of ours.
        published_rule: find names exactly as the released code: AMTNet files need the `module.`
            of DataParallel there.

    Raises:
        ValueError: a tensor of another shape.
    """
    own = trunk.state_dict()
    by_published = {name.replace("norm.", "L2Norm."): name for name in own}
    loaded, skipped = {}, []
    for name, value in state.items():
        parts = name.split(".")
        # Parity: AMTNet: the first two parts are dropped, or none: a checkpoint of one device
        # (`core_base.vgg...`) fills nothing there, and the core silently keeps its start.
        readings = [".".join(parts[2:]), name]
        if not published_rule:
            readings += [".".join(parts[1:]), ".".join(parts[1:]).replace("norm.", "L2Norm.")]
        found = next((r for r in readings if r in by_published), None)
        if found is None:
            skipped.append(name)
            continue
        ours = by_published[found]
        wanted = own[ours].shape
        if value.dim() == 4 and value.shape[1] != wanted[1] and wanted[1] % value.shape[1] == 0:
            repeats = wanted[1] // value.shape[1]
            value = value.repeat(1, repeats, 1, 1) / repeats
        if value.shape != wanted:
            raise ValueError(f"{name}: got {list(value.shape)}, expected {list(wanted)}.")
        loaded[ours] = value
    trunk.load_state_dict(loaded, strict=False)
    return CoreReport(
        tuple(name for name, ours in by_published.items() if ours in loaded),
        tuple(name for name, ours in by_published.items() if ours not in loaded),
        tuple(skipped),
    )
