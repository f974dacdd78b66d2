"""`accel detect`: boxes, classes and tubes in a video or a folder of images, drawn and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from accel.cli.options import Parser
from accel.engine.run import resolve_device
from accel.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run the network over the stream; exit code 3 for a video that cannot be read."""
    from accel.engine.detect_video import OnlineDetector, detect_to_folder, load_detector

    parser = Parser(prog="accel detect", description=__doc__)
    parser.add_argument("input", type=Path, help="video file, or folder of JPEG or PNG images")
    parser.add_argument("--checkpoint", required=True, type=Path, help="of a run, or weights")
    parser.add_argument("--out", type=Path, help="folder; default: name of the input + -tubes")
    parser.add_argument("--classes", type=Path, help="class names, one per line")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default 0.5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-video", action="store_true", help="JSON alone")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    options = parser.parse_args(argv)
    if not 0 <= options.threshold < 1:
        raise ConfigError(f"--threshold: got {options.threshold}, expected a number in [0, 1).")
    device = resolve_device(options.device)
    names = _names(options.classes) if options.classes else []
    model, config, class_names = load_detector(options.checkpoint, names)
    if config.fusion != "none":
        raise ConfigError(
            f"{options.checkpoint}: has two streams in one network; accel detect takes one stream, "
            "or two networks."
        )
    detector = OnlineDetector(model.to(device), config, device, options.threshold)
    out = options.out or Path(f"{options.input.name}-tubes")
    video = not options.no_video
    summary = detect_to_folder(options.input, out, detector, class_names, video=video)
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


def _names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes: {path}: cannot be read: {error}.") from error
    return [line.strip() for line in lines if line.strip()]
