"""Clips per second of the input pipeline alone.

    python profile/loader.py                                  # the generated set, every decoder
    python profile/loader.py --root /data/set --train-list train.txt --val-list val.txt --size 224

Every decoder reads the same training batches; the first pass is discarded. `--json` adds one line
of JSON with all passes at the end of stdout.
"""

import argparse
import json
import os
import platform
import statistics
import time

from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import DataError
from pipelines.loader import build_loader


def measure(dataset: Dataset, decoder: str, args: argparse.Namespace) -> tuple[str, list[float]]:
    """(description of the loader, clips/s of each pass) for one decoder."""
    loader = build_loader(
        dataset,
        split="train",
        sampling=SamplingConfig(num_segments=args.segments),
        augment=AugmentConfig(size=args.size, resize=0),
        loader=LoaderConfig(decoder=decoder, threads=args.threads),  # type: ignore[arg-type]
        seed=0,
        micro_batch=args.batch,
        global_batch=args.batch,
    )
    rates = []
    for epoch in range(args.passes + 1):
        start, clips = time.perf_counter(), 0
        for batch in loader.epoch(epoch):
            clips += len(batch.labels)
            if clips >= args.clips:
                break
        rates.append(clips / (time.perf_counter() - start))
    loader.close()
    return loader.description, rates[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="", help="folder of the videos; default: motion8")
    parser.add_argument("--train-list", default="", help="list of the training videos")
    parser.add_argument("--val-list", default="", help="list of the validation videos")
    parser.add_argument("--decoders", nargs="+", default=["dali", "pyav"])
    parser.add_argument("--segments", type=int, default=8, help="frames per clip")
    parser.add_argument("--size", type=int, default=64, help="px")
    parser.add_argument("--batch", type=int, default=16, help="clips per batch")
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--clips", type=int, default=320, help="most clips of one pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lists = {"root": args.root, "train_list": args.train_list, "val_list": args.val_list}
    dataset = open_dataset(DataConfig(generate="none" if args.root else "motion8", **lists))
    results = {}
    for decoder in args.decoders:
        try:
            description, rates = measure(dataset, decoder, args)
        except (DataError, ValueError) as error:
            print(f"{decoder:6} skipped: {error}")
            continue
        results[decoder] = rates
        spread = f"{min(rates):.0f}..{max(rates):.0f}"
        print(f"{decoder:6} {statistics.median(rates):8.1f} clips/s ({spread})  {description}")
    if args.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count()}
        print(json.dumps({**machine, **vars(args), "clips_per_s": results}))


if __name__ == "__main__":
    main()
