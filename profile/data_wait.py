"""How long training waits for data: TANet-R50 on H.264 that accel data prepare has written.

    python profile/data_wait.py --device cuda --precision fp16 --json

Generated videos (the set h264_gop12 of loader.py, written once) are prepared, then `accel bench`
measures the network alone, the input alone and both, for each decoder that is asked for. Data wait
is the share of a step's time in which the training thread waits for the next clips.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from loader import write_set

from accel.cli.main import main as accel
from pipelines.config import DataConfig

ASK = 0.02
LINES = 4096  # of the list: no epoch ends during a measurement


def prepared(videos: int, frames: int) -> Path:
    """The folder of the prepared set, with a long list; made once."""
    cache = DataConfig().resolved_cache_dir() / f"data-wait-{videos}x{frames}"
    write_set(cache / "in", "h264_gop12", videos, frames)
    command = ["data", "prepare", "--root", str(cache / "in"), "--list", "list.txt"]
    if accel([*command, "--out", str(cache / "out")]):
        raise SystemExit("data_wait: the set cannot be prepared.")
    lines = (cache / "out" / "list.txt").read_text().splitlines(keepends=True)
    (cache / "out" / "long.txt").write_text("".join(lines * (LINES // len(lines) + 1)))
    return cache / "out"


def measure(root: Path, decoder: str, args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The rates of one decoder, or why there are none."""
    options = {
        "data.root": root, "data.train_list": "long.txt", "data.val_list": "list.txt",
        "data.classes_file": "", "data.num_classes": 2, "run.device": args.device,
        "precision.mode": args.precision, "train.micro_batch": args.batch,
        "train.global_batch": args.batch, "loader.decoder": decoder,
    }  # fmt: skip
    command = [sys.executable, "-m", "accel.cli.main", "bench", "recipe", "--json"]
    command += ["--recipe", args.recipe, "--steps", str(args.steps)]
    command += [f"--{key}={value}" for key, value in options.items()]
    answer = subprocess.run([*command, *rest], capture_output=True, text=True)
    if answer.returncode:
        said = (answer.stderr.strip() or answer.stdout.strip() or "nothing").splitlines()[-1]
        print(f"{decoder}: not measured: {said}")
        return {"decoder": decoder, "problem": said}
    found = json.loads(answer.stdout.splitlines()[-1])["recipe"]
    rates = {f"{row['mode']}_clips_per_s": row["clips_per_s"] for row in found["rows"]}
    (train,) = (row for row in found["rows"] if row["mode"] == "train")
    print(f"{decoder}: data wait {train['data_wait']:.1%}, {train['clips_per_s']} clips/s")
    row = {"decoder": decoder, "loader": found["loader"], "step_ms": train["step_ms"], **rates}
    return {**row, "data_wait": train["data_wait"], "met": train["data_wait"] < ASK}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Keys of the recipe are options, too."
    )
    parser.add_argument("--recipe", default="tanet_r50_8f_k400")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=16, help="clips per step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--frames", type=int, default=300, help="of each video")
    parser.add_argument("--decoders", nargs="+", default=["dali_gpu", "pyav"])
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args()
    root = prepared(args.videos, args.frames)
    rows = [measure(root, decoder, args, rest) for decoder in args.decoders]
    if args.json:
        print(json.dumps({"data_wait": rows, "ask": ASK, "batch": args.batch}))
    return 1 if all("problem" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
