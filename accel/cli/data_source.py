"""Which videos an `accel data` command is about: lists, or class folders as training takes them."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from accel.cli.options import Parser
from accel.errors import ConfigError
from pipelines.annotations import VideoSet, read_list
from pipelines.config import DataConfig, LoaderConfig


def add_set_options(parser: Parser) -> None:
    """The sources of training, also under the names that they have there."""
    parser.add_argument(
        "--root", "--data.root", required=True, help="folder of the videos or frame folders"
    )
    parser.add_argument(
        "--list",
        nargs="+",
        dest="lists",
        help="list files, relative to the root; without: class folders, as in training",
    )
    parser.add_argument(
        "--kind",
        "--data.kind",
        choices=("auto", "videos", "frames"),
        default="auto",
        help="video files or folders of frames; default: as found",
    )
    parser.add_argument(
        "--frame-name",
        "--data.frame_name",
        default="",
        help='e.g. "img_{:05d}.jpg"; default: as found',
    )
    parser.add_argument(
        "--classes-file", "--data.classes_file", help="of class folders: their order"
    )
    parser.add_argument(
        "--val-fraction",
        "--data.val_fraction",
        type=float,
        help="of class folders without train/ and val/: share held out (default 0.2)",
    )
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")


class Split(NamedTuple):
    """Of a set."""

    title: str
    list_name: str
    """File name of the list, also where class folders have none yet."""
    videos: VideoSet


class Source(NamedTuple):
    """What the options name."""

    splits: list[Split]
    class_names: tuple[str, ...]
    """Of class folders; lists have numbers."""


def open_source(options: argparse.Namespace) -> Source:
    """The videos that the options name.

    Raises:
        ConfigError: an option that cannot be used.
        DataError: a list, or the folder, that cannot be used.
    """
    root = Path(options.root).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"--root: expected a folder, got '{root}'.")
    try:
        LoaderConfig(threads=options.threads)
        DataConfig(root=str(root), frame_name=options.frame_name)
    except ValueError as error:
        raise ConfigError(_in_our_names(error)) from error
    if options.lists is None:
        return _class_folders(root, options)
    for name in ("classes_file", "val_fraction"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: is for class folders; leave it out, or --list.")
    sets = [
        (root / name, read_list(root / name, root=root, kind=options.kind))
        for name in options.lists
    ]
    return Source([Split(str(path), path.name, videos) for path, videos in sets], ())


def _in_our_names(error: ValueError) -> str:
    """What is wrong with a key of a recipe, by the name of the option that gave it here."""
    return re.sub(
        r"^(?:data|loader)\.(\w+)", lambda key: "--" + key[1].replace("_", "-"), str(error)
    )


def _class_folders(root: Path, options: argparse.Namespace) -> Source:
    from pipelines.datasets import open_dataset

    held_out = {} if options.val_fraction is None else {"val_fraction": options.val_fraction}
    try:
        config = DataConfig(
            root=str(root),
            kind=options.kind,
            frame_name=options.frame_name,
            classes_file=options.classes_file or "",
            **held_out,
        )
    except ValueError as error:
        raise ConfigError(_in_our_names(error)) from error
    data = open_dataset(config)
    sets = (("training", "train.txt", data.train), ("validation", "val.txt", data.val))
    splits = [Split(f"{root} ({name})", file, videos) for name, file, videos in sets]
    return Source(splits, data.class_names)
