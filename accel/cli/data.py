"""`accel data`: what concerns the videos of a dataset."""

import argparse
import shlex
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from accel.cli.data_source import Source, add_set_options, open_source
from accel.cli.options import Parser
from accel.errors import ConfigError
from pipelines.config import DataConfig, LoaderConfig
from pipelines.deny_list import read_deny_list, update_deny_list
from pipelines.errors import counted
from pipelines.tube_data import DetectionSet, Stream, audit_tube_set


def main(argv: Sequence[str]) -> int:
    """Run `accel data SUBCOMMAND`."""
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        rows = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
        if argv and argv[0] in ("-h", "--help"):
            print(f"usage: accel data SUBCOMMAND [options]\n\n{rows}")
            return 0
        got = f"unknown subcommand {argv[0]!r}" if argv else "no subcommand"
        raise ConfigError(f"accel data: {got}; expected one of {', '.join(COMMANDS)}.")
    command, _ = COMMANDS[argv[0]]
    return command(argv[1:])


def import_main(argv: Sequence[str]) -> int:
    """Match official annotation files with the media at hand and write our lists."""
    from pipelines.adapters import DATASETS, import_dataset

    parser = Parser(
        prog="accel data import",
        description="Write train.txt, val.txt and classes.txt for a known dataset into the folder "
        "of its videos or frame folders, from its official annotation files; nothing is "
        "downloaded.",
        epilog="; ".join(f"{name}: {', '.join(facts.files)}" for name, facts in DATASETS.items()),
    )
    parser.add_argument("dataset", choices=sorted(DATASETS))
    parser.add_argument("--annotations", required=True, help="folder of the annotation files")
    parser.add_argument("--media", required=True, help="folder of the videos or frame folders")
    parser.add_argument(
        "--numbering",
        choices=("alphabetical", "official"),
        default="alphabetical",
        help="sthv1: labels by class name (TSM, MAS-Net, TDN, MSN, AMS-Net; default) or in the "
        "order of the official labels file (TANet's mmaction2 rows)",
    )
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="ucf101, hmdb51")
    options = parser.parse_args(argv)
    report = import_dataset(
        options.dataset,
        Path(options.annotations),
        Path(options.media),
        numbering=options.numbering,
        split=options.split,
    )
    for split, found in report.found.items():
        lacking = report.missing[split]
        more = f"; {len(lacking)} missing, e.g. {', '.join(lacking[:3])}" if lacking else ""
        print(f"{split}: {found} videos{more}")
    if any(report.missing.values()):
        print(f"all missing videos: {Path(options.media) / 'missing.txt'}")
    if report.unused:
        print(f"{report.unused} files or folders are in no list")
    print(f"{report.num_classes} classes; now: --data.root {options.media}")
    return 0


def check_main(argv: Sequence[str]) -> int:
    """Audit lists and media; write the deny-list."""
    from pipelines.audit import Finding, audit, deny_reasons, list_notes

    parser = Parser(
        prog="accel data check",
        description="Open and decode every video of some lists, or of class folders; print "
        "what is wrong, and write what training must not use to a deny-list (data.deny_list). Exit "
        "code 3 if there is any.",
    )
    add_set_options(parser)
    parser.add_argument("--quick", action="store_true", help="do not decode")
    parser.add_argument("--out", default="deny.txt", help="deny-list, relative to the root")
    parser.add_argument(
        "--tubes",
        choices=get_args(DetectionSet),
        help="a detection set, its boxes and its images",
    )
    parser.add_argument("--split", type=int, default=1, help="--tubes: number of the training list")
    parser.add_argument(
        "--streams", nargs="+", choices=get_args(Stream), default=["rgb"], help="--tubes: whose"
    )
    options = parser.parse_args(argv)
    if options.tubes and options.lists:
        raise ConfigError("accel data check: expected --list or --tubes, got both.")
    if options.tubes:
        return _check_tubes(options)
    threads = options.threads or LoaderConfig().resolved_threads()
    findings: list[Finding] = []
    faulty_shards: dict[str, set[str]] = {}  # what is wrong -> its videos
    checked = 0
    splits = open_source(options).splits
    out = Path(options.root).expanduser().absolute() / options.out
    if out in [Path(split.title) for split in splits]:
        raise ConfigError(f"--out: expected another file than the lists, got '{options.out}'.")
    if out.exists():
        read_deny_list(out)  # what is wrong with it is said now, and not after hours
    names: set[str] = set()
    for note in list_notes((split.title, split.videos) for split in splits):
        print(note)
    for _, _, videos in splits:
        checked += len(videos)
        names.update(record.name for record in videos)
        for finding in audit(
            videos, threads=threads, frame_name=options.frame_name, decode=not options.quick
        ):
            findings.append(finding)
            if finding.shard is not None:
                owners = faulty_shards.setdefault(f"{finding.shard}: {finding.reason}", set())
                owners.add(finding.record.name)
                continue
            print(f"{'bad ' if finding.fatal else 'note'} {finding.record.name}: {finding.reason}")
    denied = deny_reasons(findings)
    for reason, owners in faulty_shards.items():
        print(f"bad  {reason} ({counted(len(owners), 'video')})")
    count = len(denied) + sum(map(len, faulty_shards.values()))
    what = counted(checked, "line" if options.lists else "video")
    print(f"{what} checked, {counted(count, 'video')} cannot be used")
    if faulty_shards:
        print("videos of a faulty shard are not denied: mend the shard, then check again")
        names.difference_update(*faulty_shards.values())
    _update_deny_list(out, denied, () if options.quick else names)
    return 3 if count else 0


def _update_deny_list(
    path: Path, reasons: Mapping[str, str], checked: Container[str] | None
) -> None:
    """See `pipelines.deny_list.update_deny_list`; says what has become of the list."""
    if not reasons and not path.exists():
        return
    entries, mended, not_ours = update_deny_list(path, reasons, checked)
    for name in mended:
        print(f"mended {name}: it is taken off the deny-list")
    for name in not_ours:
        print(f"note {name}: nothing was found; no check wrote its line in the deny-list: kept")
    print(f"deny-list: {path} (--data.deny_list), {counted(entries, 'video')} in it")


def _check_tubes(options: argparse.Namespace) -> int:
    root = Path(options.root).expanduser().absolute()
    out = root / options.out
    if out.exists():
        read_deny_list(out)
    checked, reasons = audit_tube_set(
        root,
        options.tubes,
        split=options.split,
        streams=options.streams,
        decode=not options.quick,
    )
    for name, reason in reasons.items():
        print(f"bad  {name}: {reason}")
    print(f"{counted(checked, 'video')} checked, {len(reasons)} cannot be used")
    _update_deny_list(out, reasons, () if options.quick else None)
    return 3 if reasons else 0


def stats_main(argv: Sequence[str]) -> int:
    """What a set consists of."""
    from pipelines.media_index import index_videos

    parser = Parser(
        prog="accel data stats",
        description="Videos, classes, frames, sizes, codecs of some lists, or of class folders, "
        "from the media index. "
        "Exit code 3 if there are videos that cannot be used; the rest is described.",
    )
    add_set_options(parser)
    options = parser.parse_args(argv)
    threads = options.threads or LoaderConfig().resolved_threads()
    bad = 0
    for title, _, videos in open_source(options).splits:
        index = index_videos(
            videos,
            cache_dir=DataConfig().resolved_cache_dir(),
            threads=threads,
            frame_name=options.frame_name,
            tolerated=len(videos),
        )
        bad += len(index.problems)
        classes = np.bincount(videos.labels)
        used = classes[classes > 0]
        print(title)
        print(f"  videos     {len(videos)}")
        print(f"  classes    {len(used)}, {used.min()} to {used.max()} videos each")
        if index.problems:
            example, reason = next(iter(index.problems.items()))
            total = f"{len(index.problems)} cannot be used and are not counted below"
            print(f"  bad        {total}, e.g. {videos[example].name}: {reason}")
        frames = index.num_frames[index.num_frames > 0]
        if not len(frames):
            continue
        print(f"  frames     {frames.min()} to {frames.max()}, median {np.median(frames):.0f}")
        sizes = ", ".join(f"{width} x {height}" for width, height in index.sizes[:5])
        more = f" and {len(index.sizes) - 5} more" if len(index.sizes) > 5 else ""
        print(f"  sizes      {sizes}{more}")
        for kind, example in index.kinds:
            name = kind.frame_name or f"{kind.codec} {kind.pixel_format} in {kind.container}"
            print(f"  {'files':10} {name}, e.g. {videos[example].name}")
    if not bad:
        return 0
    print(f"{counted(bad, 'video')} cannot be used; `accel data check {shlex.join(argv)}`")
    print(
        "names each and writes a deny-list, with which training leaves them out (--data.deny_list)"
    )
    return 3


def prepare_main(argv: Sequence[str]) -> int:
    """Re-encode or pack a set for training."""
    from pipelines.prepare import Encoding, prepare

    parser = Parser(
        prog="accel data prepare",
        description="Write a copy of every video of some lists, and the lists, that is cheap to "
        "sample from: small frames, short GOPs, constant frame rate. Frame k stays frame k. Of "
        "class folders: the same folders, train.txt, val.txt and classes.txt. Can be "
        "interrupted and repeated. Exit code 3 if a video cannot be copied. With --shards the "
        "copies stand in a few large files, for network disks.",
    )
    add_set_options(parser)
    parser.add_argument("--out", required=True, help="folder of the copies")
    parser.add_argument("--short-side", type=int, default=256, help="px (default 256)")
    parser.add_argument("--gop", type=int, default=12, help="frames between keyframes (default 12)")
    parser.add_argument(
        "--codec",
        choices=("h264", "vp9", "copy"),
        default="h264",
        help="copy = pack files and folders of frames as they are (with --shards)",
    )
    parser.add_argument("--quality", type=int, default=20, help="constant rate factor (default 20)")
    parser.add_argument(
        "--shards",
        type=int,
        nargs="?",
        const=500,
        metavar="N",
        help="pack N videos each (default 500) into <out>/00000.shard, ...",
    )
    options = parser.parse_args(argv)
    if options.shards is None and options.codec == "copy":
        raise ConfigError("--shards: expected it with --codec copy.")
    if options.shards is not None and options.shards < 1:
        raise ConfigError(f"--shards: expected a number of videos >= 1, got {options.shards}.")
    for key, value, low in (("gop", options.gop, 1), ("short-side", options.short_side, 16)):
        if value < low:
            raise ConfigError(f"--{key}: expected an integer >= {low}, got {value}.")
    most = {"h264": 51, "vp9": 63}.get(options.codec)
    if most is not None and not 0 <= options.quality <= most:
        raise ConfigError(f"--quality: expected 0..{most}, got {options.quality}.")
    source = open_source(options)
    if len({split.list_name for split in source.splits}) < len(source.splits):
        raise ConfigError("--list: expected lists of different file names.")
    out = Path(options.out).expanduser().absolute()
    root = Path(options.root).expanduser()
    if source.class_names and out.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"--out: expected a folder outside of --root, whose folders are classes, got '{out}'."
        )
    of_lists = ((root / name).parent for name in options.lists or ())
    if out.resolve() in {folder.resolve() for folder in (root, *of_lists)}:
        raise ConfigError(
            f"--out: expected another folder than --root and those of the lists, got '{out}'; the "
            "lists there would be overwritten."
        )
    report = prepare(
        [(split.list_name, split.videos) for split in source.splits],
        out,
        Encoding(
            options.codec, options.short_side, options.gop, options.quality, options.shards or 0
        ),
        threads=options.threads or LoaderConfig().resolved_threads(),
        frame_name=options.frame_name,
        class_names=source.class_names,
    )
    for (name, _, _), reason in report.failed.items():
        print(f"not copied: {name}: {reason}")
    print(f"{report.written} copies written, {report.kept} kept, {len(report.failed)} failed")
    before_mb, after_mb = report.bytes_before / 1e6, report.bytes_after / 1e6
    print(f"size        {before_mb:.1f} MB before, {after_mb:.1f} MB after")
    before, after = report.clips_per_s_before, report.clips_per_s_after
    print(f"decoding    {before:.1f} clips/s before, {after:.1f} after (8 frames, one thread)")
    if not report.failed:
        print(f"now         {_how_to_train(out, source)}")
        return 0
    for _, list_name, videos in source.splits:
        lacking = sum(record.part in report.failed for record in videos)
        if lacking:
            print(
                f"{list_name}: {lacking} of {len(videos)} videos are missing in the copy: "
                "results would not be comparable"
            )
    print("incomplete  mend or replace the originals named above, then run this again")
    return 3


def _how_to_train(out: Path, source: Source) -> str:
    """The options of training for the copies."""
    options = ["--data.root", str(out)]
    names = [split.list_name for split in source.splits]
    if len(names) == 2:
        train, val = sorted(names, key=lambda name: "train" not in name)  # else in the order given
        options += ["--data.train_list", train, "--data.val_list", val]
    if source.class_names:
        options += ["--data.classes_file", "classes.txt"]
    text = shlex.join(options)
    if len(names) == 2:
        return text
    return f"{text} (--data.train_list, --data.val_list: {', '.join(names)})"


def flow_main(argv: Sequence[str]) -> int:
    """Compute flow for a detection set that has none."""
    import torch

    from pipelines.decoders import dali_installed
    from pipelines.flow import FlowMethod, flow_function, write_flow
    from pipelines.tube_data import open_tube_set

    parser = Parser(
        prog="accel data flow",
        description="Write flow-images/ beside the rgb-images/ of a detection set "
        "(--detection.stream flow). It is not the published flow, whose making is not released. "
        "Can be interrupted and repeated.",
    )
    parser.add_argument("--root", required=True, help="folder of the set")
    parser.add_argument("--dataset", required=True, choices=get_args(DetectionSet))
    parser.add_argument("--split", type=int, default=1, help="number of the training list")
    parser.add_argument(
        "--method",
        choices=("auto", *get_args(FlowMethod)),
        default="auto",
        help="opencv: DIS on the CPU; dali: the GPU's engine; auto: dali if GPU and DALI are there",
    )
    parser.add_argument(
        "--bound", type=float, default=20.0, help="longest motion a byte can tell, px (default 20)"
    )
    parser.add_argument("--threads", type=int, default=1, help="videos at a time")
    options = parser.parse_args(argv)
    if not 0 < options.bound < 1e4:
        raise ConfigError(f"--bound: expected a number of pixels > 0, got {options.bound}.")
    if options.threads < 1:
        raise ConfigError(f"--threads: expected an integer >= 1, got {options.threads}.")
    method: FlowMethod = options.method
    if options.method == "auto":
        method = "dali" if torch.cuda.is_available() and dali_installed() else "opencv"
    compute = flow_function(method)
    root = Path(options.root).expanduser().absolute()
    data = open_tube_set(root, options.dataset, split=options.split)
    done = list(
        write_flow(data, compute, method=method, bound_px=options.bound, threads=options.threads)
    )
    written = sum(now for _, now in done)
    print(f"{written} videos written, {len(done) - written} were there; not the published flow")
    print(f"now         --data.root {root} --detection.stream flow --detection.stack 5")
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "check": (check_main, "audit a set and its media, write the deny-list"),
    "prepare": (prepare_main, "re-encode or pack a set once, so that sampling from it is cheap"),
    "stats": (stats_main, "videos, classes, frames, sizes and codecs of a set"),
    "flow": (flow_main, "optical flow for a detection set (not the published one)"),
    "import": (import_main, "lists of a known dataset from its official annotation files"),
}
