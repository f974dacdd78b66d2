"""`accel detect`: boxes, classes and tubes in videos and cameras, drawn and as JSON."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from accel.cli.options import Parser
from accel.engine.run import resolve_device
from accel.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run the network over the stream; exit code 3 for a video that cannot be read."""
    from accel.engine.detect_video import OnlineDetector, detect_to_folder, load_detector
    from accel.engine.tube_evaluation import FrameDetector
    from pipelines.flow import FlowMethod, flow_function

    parser = Parser(prog="accel detect", description=__doc__)
    parser.add_argument(
        "input",
        help="video file, folder of JPEG or PNG images, camera (0, /dev/video0), or URL (rtsp://)",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="of a run, or weights")
    parser.add_argument("--second", type=Path, help="checkpoint of a second stream's network")
    parser.add_argument(
        "--second-input",
        default="",
        help="images of the second stream; default: flow computed from the input (not published)",
    )
    parser.add_argument(
        "--fusion", choices=("boost", "union", "mean"), default="boost", help="with --second"
    )
    parser.add_argument(
        "--flow", choices=get_args(FlowMethod), default="opencv", help="how flow is computed"
    )
    parser.add_argument("--out", type=Path, help="folder; default: name of the input + -tubes")
    parser.add_argument("--classes", type=Path, help="class names, one per line")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default 0.5)")
    parser.add_argument("--max-frames", type=int, default=0, help="end after so many (0: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-video", action="store_true", help="JSON alone")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not 0 <= options.threshold < 1:
        raise ConfigError(f"--threshold: got {options.threshold}, expected a number in [0, 1).")
    if options.max_frames < 0:
        raise ConfigError(f"--max-frames: expected 0 or more, got {options.max_frames}.")
    if options.second_input and not options.second:
        raise ConfigError("--second-input: needs --second, the checkpoint of its network.")
    device = resolve_device(options.device)
    names = _names(options.classes) if options.classes else []
    detectors = []
    for path in filter(None, (options.checkpoint, options.second)):
        model, config, class_names = load_detector(path, names)
        detectors.append(FrameDetector(model.to(device), config, device))
    compute_flow = None
    if options.second and not options.second_input and config.stream != "rgb":
        if config.stream != "flow":
            raise ConfigError(
                f"{options.second}: was trained on {config.stream} images, which cannot be "
                "computed here; --second-input names their folder."
            )
        compute_flow = flow_function(options.flow)
    detector = OnlineDetector(
        detectors,
        options.threshold,
        fusion=options.fusion if options.second else "none",
        compute_flow=compute_flow,
    )
    out = options.out or Path(f"{_short_name(options.input)}-tubes")
    video = not options.no_video
    summary = detect_to_folder(
        options.input,
        out,
        detector,
        class_names,
        second=options.second_input,
        video=video,
        max_frames=options.max_frames,
    )
    if options.json:
        print(json.dumps(summary))
        return 0
    budget = ", ".join(f"{name} {value:.1f}" for name, value in summary["ms_per_frame"].items())
    print(f"{summary['frames']} frames, {summary['fps']:.1f} frames/s; ms per frame: {budget}")
    for row in summary["tubes"][:10]:
        print(
            f"  tube {row['tube']}: {row['class']}, frames {row['first_frame']} to "
            f"{row['last_frame']}, {row['boxes']} boxes, score {row['score']:.2f}"
        )
    print(f"wrote {out / 'tubes.json'}" + (f" and {out / 'tubes.webm'}" if video else ""))
    return 0


def _short_name(source: str) -> str:
    """A name for the folder of the results."""
    if "://" in source:
        source = source.partition("://")[2].split("@")[-1].replace(":", "-")
    name = Path(source.rstrip("/")).name or "stream"
    return f"camera{name}" if name.isdigit() else name


def _names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes: {path}: cannot be read: {error}.") from error
    return [line.strip() for line in lines if line.strip()]
