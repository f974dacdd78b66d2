"""`accel convert`: a published checkpoint into ours, and ours into a published layout."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import accel
from accel.cli.options import Parser
from accel.engine.checkpoint import write_atomically
from accel.engine.config import Recipe
from accel.errors import CheckpointError, ConfigError
from accel.models import build_model, list_models
from accel.models.convert import TABLES
from accel.models.convert.names import IMAGENET, OURS
from accel.models.detectors import build_detector, describe_detector, list_detectors
from accel.models.vgg_ssd import MEAN_RGB
from accel.models.weights import describe, export_weights, import_weights, read_state_dict

FORMAT = "accel-weights-1"


def main(argv: Sequence[str]) -> int:
    """Convert one file; exit code 2 and the differences when it does not fit."""
    parser = Parser(prog="accel convert", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint of any known layout")
    parser.add_argument(
        "--system", required=True, choices=[*list_models(), *list_detectors()], help="its network"
    )
    parser.add_argument("--layout", help="its layout (default: recognized by the names)")
    parser.add_argument("--to", default=OURS, metavar="LAYOUT", help=f"default: {OURS}")
    parser.add_argument("--out", required=True, type=Path, help="file to write; must not exist")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(argv)

    layouts = [name for name in TABLES[options.system].all_layouts if name != IMAGENET]
    for name in ("layout", "to"):
        if getattr(options, name) not in (None, *layouts):
            raise ConfigError(
                f"--{name}: got {getattr(options, name)!r}, expected one of {', '.join(layouts)}."
            )
    if options.out.exists():
        raise ConfigError(f"--out: {options.out} exists; choose another file.")
    report = convert(options.file, options.system, options.layout, options.to, options.out)
    if options.json:
        print(json.dumps(report))
    else:
        source, network = report["source"], report["network"]
        print(f'{options.file}: layout "{source["layout"]}", sha256 {source["sha256"]}')
        ignored = source["ignored"]
        print(f"ignored:  {', '.join(ignored) if ignored else 'nothing'}")
        print(f"network:  {', '.join(f'{key} {value}' for key, value in network.items())}")
        print(f'wrote:    {options.out}, layout "{options.to}", {report["tensors"]} tensors')
    return 0


def convert(file: Path, system: str, layout: str | None, to: str, out: Path) -> dict[str, Any]:
    """Read `file` as a network of `system` and write it to `out` in the layout `to`.

    Returns:
        What the written file says about itself, and its number of tensors.

    Raises:
        CheckpointError: the file cannot be read or does not fit, or `out` cannot be written.
    """
    state = read_state_dict(file)
    is_detector = system in list_detectors()
    network = (describe_detector if is_detector else describe)(state, file, system, layout)
    model = (build_detector if is_detector else build_model)(**network)
    loaded = import_weights(model, file, layout=layout)
    try:
        tensors = export_weights(model, to)
    except ValueError as error:
        raise CheckpointError(file, str(error)) from error
    about: dict[str, Any] = {
        "network": network,
        "source": {
            "file": file.name,
            "sha256": _sha256(file),
            "layout": loaded.layout,
            "ignored": list(loaded.ignored),
        },
        "preprocessing": _detection_preprocessing() if is_detector else _preprocessing(),
        "written_by": f"accel {accel.__version__}",
    }
    ours = to == OURS
    content = {"format": FORMAT, "model": tensors} if ours else {"state_dict": tensors}
    buffer = io.BytesIO()
    torch.save(content | about, buffer)
    try:
        write_atomically(out, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(out, f"cannot be written ({error.strerror}).") from error
    return about | {"tensors": len(tensors)}


def _preprocessing() -> dict[str, Any]:
    """What every published network of this family of codes expects of its input."""
    data = Recipe().data
    return {"colors": "RGB", "range": [0.0, 1.0], "mean": list(data.mean), "std": list(data.std)}


def _detection_preprocessing() -> dict[str, Any]:
    """What AMTNet and ROAD expect: bytes minus means, no division."""
    return {"colors": "RGB", "range": [0, 255], "mean": list(MEAN_RGB), "std": [1.0, 1.0, 1.0]}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
