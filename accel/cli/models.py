"""`accel models`: the networks with their parameters and multiply-adds per clip."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from accel.cli.options import Parser
from accel.models import build_model, list_models
from accel.models.config import ModelName, variants
from accel.models.cost import detector_cost, network_cost
from accel.models.detectors import build_detector

SEGMENTS = (8, 16)
_UCF24 = 25  # classes with background
DETECTORS: tuple[dict[str, Any], ...] = (
    {"title": "ssd300", "name": "ssd300"},
    {"title": "amtnet", "name": "amtnet"},
    {"title": "amtnet, flow x 5", "name": "amtnet", "input_frames": 5},
    {"title": "amtnet, sum with flow x 5", "name": "amtnet", "fusion": "sum", "extra_frames": 5},
    {"title": "amtnet, cat with flow x 5", "name": "amtnet", "fusion": "cat", "extra_frames": 5},
)


def main(argv: Sequence[str]) -> int:
    """Print the table, or the list as JSON."""
    parser = Parser(prog="accel models", description=__doc__)
    parser.add_argument("--classes", type=int, default=174, help="classes, >= 1 (default 174)")
    parser.add_argument("--size", type=int, default=224, help="frame size, pixels (default 224)")
    parser.add_argument("--depth", type=int, choices=(50, 101), default=50, help="default 50")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    options = parser.parse_args(argv)
    if options.size < 32:
        parser.error(f"--size: got {options.size}, expected at least 32")
    rows = [
        describe_network(name, variant, options.classes, options.size, options.depth)
        for name in list_models()
        for variant in variants(name, options.depth)
    ]
    detectors = [describe_detector(**network) for network in DETECTORS]
    if options.json:
        print(json.dumps(rows + detectors, indent=1))
        return 0
    print(
        f"{'network':20}{'parameters':>14}" + "".join(f"{f'GMAC, T = {t}':>16}" for t in SEGMENTS)
    )
    for row in rows:
        name = row["name"] if row["variant"] == "2d" else f"{row['name']} {row['variant']}"
        costs = "".join(f"{row['gmac'][str(t)]:16.2f}" for t in SEGMENTS)
        print(f"{name:20}{row['parameters']:14,}{costs}")
    print(
        f"ResNet-{options.depth}, {options.classes} classes; multiply-adds (10^9) of convolutions "
        f"and linear maps for one clip of {options.size} x {options.size} pixels, in evaluation."
    )
    print(f"\n{'detector':28}{'parameters':>14}{'GMAC':>10}")
    for row in detectors:
        print(f"{row['title']:28}{row['parameters']:14,}{row['gmac']:10.2f}")
    print("24 classes and background; one micro-tube (ssd300: one frame) of 300 x 300 pixels.")
    return 0


def describe_network(
    name: ModelName, variant: str, num_classes: int, size: int, depth: int
) -> dict[str, Any]:
    """Parameters (T = 8) and GMAC of one network; nothing is allocated."""
    row: dict[str, Any] = {"name": name, "variant": variant, "depth": depth, "gmac": {}}
    for num_segments in SEGMENTS:
        build = partial(
            build_model,
            name,
            variant=variant,
            depth=depth,
            num_classes=num_classes,
            num_segments=num_segments,
        )
        parameters, multiply_adds = network_cost(build, size=size)
        row.setdefault("parameters", parameters)
        row["gmac"][str(num_segments)] = multiply_adds / 1e9
    return row


def describe_detector(title: str, **network: Any) -> dict[str, Any]:
    """Parameters and GMAC of one published detector; nothing is allocated."""
    build = partial(build_detector, num_classes=_UCF24, **network)
    parameters, multiply_adds = detector_cost(build)
    return {"title": title, **network, "parameters": parameters, "gmac": multiply_adds / 1e9}
