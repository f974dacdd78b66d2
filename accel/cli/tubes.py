"""`accel tubes`: video-mAP of a trained detector, or of two of different streams fused."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from accel.cli.options import Parser
from accel.detection.fusion import Fusion
from accel.engine.run import resolve_device
from accel.errors import ConfigError
from pipelines.tube_data import DetectionSet, Stream, open_tube_set


def main(argv: Sequence[str]) -> int:
    """Evaluate over all test videos of a set; exit code 3 for a set that cannot be used."""
    from accel.engine.detect_video import load_detector
    from accel.engine.tube_evaluation import FrameDetector, evaluate_tubes

    parser = Parser(prog="accel tubes", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="one, or base and second stream")
    parser.add_argument("--root", required=True, type=Path, help="folder of the set")
    parser.add_argument(
        "--dataset", choices=get_args(DetectionSet), help="default: that of the first run"
    )
    parser.add_argument("--split", type=int, default=0, help="default: that of the first run")
    parser.add_argument(
        "--fusion", choices=[f for f in get_args(Fusion) if f != "none"], help="of two checkpoints"
    )
    parser.add_argument(
        "--streams",
        nargs="+",
        choices=get_args(Stream),
        help="one per checkpoint: whose images it sees; default: as trained",
    )
    parser.add_argument("--linking", choices=("frames", "microtubes"), default="frames")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    paths = options.checkpoints
    if len(paths) != (2 if options.fusion else 1):
        raise ConfigError(
            "accel tubes: expected one checkpoint, or two and --fusion boost, union or mean; got "
            f"{len(paths)} and --fusion {options.fusion or 'none'}."
        )
    if options.streams and len(options.streams) != len(paths):
        raise ConfigError(f"--streams: expected {len(paths)}, got {len(options.streams)}.")
    device = resolve_device(options.device)
    detectors, names = [], []
    for k, path in enumerate(paths):
        model, config, class_names = load_detector(path)
        config = replace(config, linking=options.linking)
        if options.streams:
            config = replace(config, stream=options.streams[k])
        detectors.append(FrameDetector(model.to(device), config, device))
        names.append(class_names)
    first = detectors[0].config
    streams = [name for d in detectors for name, _ in d.config.view.streams]
    data = open_tube_set(
        options.root,
        options.dataset or first.dataset,
        split=options.split or first.split,
        streams=list(dict.fromkeys(streams)),
        least_frames=max(d.config.least_frames for d in detectors),
    )
    for path, own in zip(paths, names, strict=True):
        if own != data.class_names:
            raise ConfigError(f"{path}: was trained on other classes than those of the set.")
    try:
        scores = evaluate_tubes(detectors, data, fusion=options.fusion or "none")
    except ValueError as error:
        raise ConfigError(f"accel tubes: {error}") from error
    if options.json:
        print(json.dumps(asdict(scores)))
        return 0
    print(
        f"video-mAP@0.2 {scores.video_map_20:.4f}  @0.5 {scores.video_map_50:.4f}  "
        f"@0.75 {scores.video_map_75:.4f}  @0.5:0.95 {scores.video_map_50_95:.4f}\n"
        f"frame-mAP@0.5 {scores.frame_map_50:.4f}  accuracy {scores.accuracy:.4f}  "
        f"({scores.num_videos} videos)"
    )
    return 0
