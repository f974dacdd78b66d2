"""What captured training steps spend their time on: a table, a verdict, and one HTML page.

    python profile/nsys_report.py runs/mine/profile        # a folder written by --log.profile
    python profile/nsys_report.py report.sqlite            # of `nsys export --type sqlite`
    python profile/nsys_report.py trace.json --json        # of torch.profiler, CPU or GPU

Beside a capture, `facts.json` (written by the run) says what a step computes; without it rates are
left out. See profile/README.md.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can load this file as a module

from trace_report.analysis import analyze
from trace_report.page import as_json, page, text_table
from trace_report.reading import TraceError, read_trace

CAPTURES = ("nsys.sqlite", "trace.json", "trace.json.gz")


def find_capture(path: Path) -> Path:
    """The newest capture in a folder, or the file itself."""
    if not path.is_dir():
        return path
    found = [path / name for name in CAPTURES if (path / name).exists()]
    if not found:
        raise TraceError(f"{path}: holds none of {', '.join(CAPTURES)}.")
    return max(found, key=lambda file: file.stat().st_mtime)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture", type=Path, help="folder, .sqlite of nsys or .json of torch")
    parser.add_argument("--facts", type=Path, help="default: facts.json beside the capture")
    parser.add_argument("--html", type=Path, help="default: report.html beside the capture")
    parser.add_argument("--json", action="store_true", help="JSON as the last line of stdout")
    args = parser.parse_args()
    try:
        capture = find_capture(args.capture)
        facts_file = args.facts or capture.with_name("facts.json")
        if args.facts and not facts_file.exists():
            raise TraceError(f"{facts_file}: no such file.")
        facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
        trace = read_trace(capture)
        analysis = analyze(trace, facts)
        target = args.html or capture.with_name("report.html")
        target.write_text(page(analysis, trace), encoding="utf-8")
    except (TraceError, OSError, ValueError) as error:
        print(f"nsys_report: {error}", file=sys.stderr)
        return 2
    lines = [text_table(analysis), f"\npage: {target}"]
    if args.json:
        lines.append(json.dumps(as_json(analysis)))
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
