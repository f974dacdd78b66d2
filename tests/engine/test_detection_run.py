"""A detector trained for a few steps on a tiny generated set: run, resume, scores, streaming."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from accel.cli.main import main as accel
from accel.engine.checkpoint import load_verified
from accel.engine.config import load_recipe
from accel.engine.detect_video import OnlineDetector, load_detector
from accel.engine.detection_config import DetectionConfig
from accel.engine.trainer import Trainer
from accel.engine.tube_evaluation import FrameDetector, video_detections
from accel.errors import CheckpointError, ConfigError
from pipelines.errors import DataError, MediaError
from pipelines.moving_objects import CLASSES, generate_moving_objects
from pipelines.tube_data import open_tube_set

OVERRIDES = {
    "detection.width": "4",
    "train.global_batch": "4",
    "train.micro_batch": "4",
    "train.max_steps": "4",
    "schedule.epochs": "1",
    "checkpoint.every_steps": "2",
    "log.tensorboard": "false",
    "run.threads": "1",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate_moving_objects(tmp_path_factory.mktemp("cache"), num_train=3, num_test=3)


def _recipe(root, **overrides):
    return load_recipe("demo_tubes", OVERRIDES | {"data.root": str(root)} | overrides)


def _fit(recipe, out):
    trainer = Trainer(recipe, out)
    try:
        return trainer.fit()
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, _fit(_recipe(root), out)


def test_a_run_ends_with_a_video_map_and_a_checkpoint(finished) -> None:
    out, summary = finished
    assert summary["iterations"] == 4 and summary["val_num_videos"] == 3
    assert 0 <= summary["val_video_map_50"] <= summary["best_val_video_map_50"] <= 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "event" not in row] == [0, 1, 2, 3]
    assert (out / "curves.png").stat().st_size > 1000
    # The recipe asks for norms in the trunk: its network has them.
    assert any(name.endswith("running_mean") for name in load_verified(_last(summary))["model"])


def test_an_interrupted_run_has_the_same_bits(finished, root, tmp_path) -> None:
    recipe = _recipe(root)
    half = replace(recipe, train=replace(recipe.train, max_steps=2))
    _fit(half, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    resumed = _fit(recipe, tmp_path / "run")
    state, whole = (load_verified(p) for p in map(_last, (resumed, finished[1])))
    for name, value in whole["model"].items():
        assert torch.equal(state["model"][name], value), name


def _last(summary):
    from pathlib import Path

    return Path(summary["checkpoint"])


def test_a_stream_gives_the_boxes_of_the_stored_video(finished, root) -> None:
    model, config, names = load_detector(_last(finished[1]))
    assert names == CLASSES
    data = open_tube_set(root, "moving_objects")
    video = data.training.index(False)
    detector = FrameDetector(model, config, torch.device("cpu"))
    boxes, scores, size = video_detections(data, video, detector)
    threshold = float(np.quantile(scores[..., :3], 0.999))
    online = OnlineDetector([detector], threshold)
    stored = data.read("rgb", data.videos[video], range(1, 25))
    found = [frame for image in stored for frame in online.push(image[..., ::-1])]
    assert len(found) == 24 - 1 - 2 - 1  # a micro-tube and half a stack behind
    found += online.finish()
    assert len(found) == len(boxes) == 24
    assert size == (96, 96) and any(found)
    for frame, own in enumerate(found):
        assert all(box.frame == frame and box.score > threshold for box in own)
        best = max((box.score for box in own), default=0.0)
        largest = scores[frame, :, :3].max()
        assert best == pytest.approx(largest, abs=1e-5) or largest <= threshold


def test_the_command_writes_video_and_json(finished, root, tmp_path, capsys) -> None:
    folder = next((root / "rgb-images" / "fall").iterdir())
    checkpoint = str(_last(finished[1]))
    arguments = ["detect", str(folder), "--checkpoint", checkpoint, "--threshold", "0.01"]
    assert accel([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == 24 and summary["fps"] > 0
    content = json.loads((tmp_path / "out" / "tubes.json").read_text())
    assert content["class_names"] == list(CLASSES)
    # The drawn video is a video: it goes in again.
    video = tmp_path / "out" / "tubes.webm"
    again = ["detect", str(video), "--checkpoint", checkpoint, "--out", str(tmp_path / "2")]
    assert accel([*again, "--no-video"]) == 0
    assert "24 frames" in capsys.readouterr().out
    assert accel(["detect", str(tmp_path / "no.mp4"), "--checkpoint", checkpoint]) == 3
    assert "no such video file" in capsys.readouterr().err
    assert accel([*arguments, "--classes", str(tmp_path / "none.txt")]) == 2
    assert "--classes" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "one" / "1.jpg")
    assert accel(["detect", str(tmp_path / "one"), "--checkpoint", checkpoint]) == 2
    assert "needs at least 5 frames, got 1" in capsys.readouterr().err


def test_images_that_do_not_fit_the_annotation_end_the_run_first(root, tmp_path) -> None:
    import shutil

    copy = tmp_path / "set"
    shutil.copytree(root, copy)
    with pytest.raises(MediaError, match=r"brox-images.*no such folder"):
        open_tube_set(copy, "moving_objects", streams=("rgb", "brox"))
    video = copy / "rgb-images" / "fall" / "train_0000"
    (video / "00024.jpg").rename(video / "00099.jpg")
    with pytest.raises(MediaError, match=r"00024.jpg is missing: the annotation has 24 frames"):
        open_tube_set(copy, "moving_objects")
    (video / "00024.jpg").write_bytes(b"no image")
    data = open_tube_set(copy, "moving_objects")
    damaged = next(v for v in data.videos if v.name == "fall/train_0000")
    with pytest.raises(MediaError, match=r"00024.jpg: cannot be read as an image"):
        data.read("rgb", damaged, [23, 24])
    Image.new("RGB", (50, 40)).save(video / "00024.jpg")
    with pytest.raises(MediaError, match="is 50 x 40 pixels"):
        data.read("rgb", damaged, [23, 24])
    shutil.rmtree(copy / "splitfiles")
    with pytest.raises(DataError, match="found neither"):
        open_tube_set(copy, "moving_objects")


def test_a_denied_video_is_left_out_of_the_training(root, tmp_path, capsys) -> None:
    import shutil

    copy = tmp_path / "set"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "rgb-images" / "rise" / "train_0001")
    with pytest.raises(MediaError, match="rise/train_0001: no such folder"):
        Trainer(_recipe(copy), tmp_path / "a")
    (copy / "deny.txt").write_text("rise/train_0001\tno images\n")
    recipe = _recipe(copy, **{"data.deny_list": "deny.txt", "train.max_steps": "1"})
    assert _fit(recipe, tmp_path / "b")["iterations"] == 1


def test_settings_that_cannot_be_are_refused(root, tmp_path) -> None:
    for key, value in {
        "detection.levels": "7",
        "detection.pixel_scale": "0",
        "detection.prior_scale": "0",
        "detection.stack": "0",
        "detection.network": "ssd300",
    }.items():
        with pytest.raises(ConfigError, match=key):
            _recipe(root, **{key: value})
    with pytest.raises(ConfigError, match="too small for 6 maps"):
        Trainer(_recipe(root, **{"detection.levels": "6"}), tmp_path / "a")
    with pytest.raises(ConfigError, match="micro-tubes per step"):
        recipe = _recipe(root, **{"train.global_batch": "4000", "train.micro_batch": "4000"})
        Trainer(recipe, tmp_path / "b")
    with pytest.raises(ConfigError, match="ucf24 needs the folder"):
        Trainer(_recipe("", **{"detection.dataset": "ucf24", "data.root": ""}), tmp_path / "c")
    torch.save({"vgg.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "part.pth")
    start = {"detection.start_base": str(tmp_path / "part.pth")}
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of the trunk"):
        Trainer(_recipe(root, **start), tmp_path / "d")
    assert DetectionConfig().network == "none"
