"""The published detectors: recipes against facts, and a few steps on a set laid out as UCF24."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from accel.cli.main import main as accel
from accel.engine.config import load_recipe, to_dict
from accel.engine.detection import start_network
from accel.engine.detection_config import DetectionConfig
from accel.engine.published import facts
from accel.engine.published_detection import (
    METRICS,
    detection_disagreements,
    detection_rows,
    expected_detection_values,
)
from accel.engine.recipe_check import recipes_of_detection_runs
from accel.engine.schedule import ScheduleConfig, lr_factor
from accel.errors import CheckpointError
from accel.models.detectors import build_detector
from pipelines.tubes import UCF24_CLASSES

RUNS = sorted(facts()["detection_runs"])
FRAMES = 12


def test_a_difference_in_any_key_is_found() -> None:
    for run in ("amtnet_cat_rgb_brox_ucf24", "ssd300_fastof_ucf24"):
        values = to_dict(load_recipe(recipes_of_detection_runs()[run]))
        assert not list(detection_disagreements(values, run))
        for key in expected_detection_values(run):
            section, name = key.split(".")
            changed = {**values, section: {**values[section], name: "other"}}
            try:
                found = list(detection_disagreements(changed, run))
            except (TypeError, ValueError):  # a value that no recipe can have
                found = [f"{key} is"]
            assert any(problem.startswith(f"{key} is") for problem in found), key


def test_rows_have_recipes_and_all_numbers(capsys) -> None:
    assert recipes_of_detection_runs() == {run: run for run in RUNS}
    rows = detection_rows()
    assert len(rows) == 9 and all(set(row.published) == set(METRICS) for row in rows)
    assert all((len(row.runs) == 2) == (row.fusion != "none") for row in rows)
    assert accel(["recipes"]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{row.name}" in table for row in rows)


def test_rates_by_iteration() -> None:
    schedule = load_recipe("ssd300_rgb_ucf24").schedule
    steps = (0, 69_999, 70_000, 90_000, 119_999)
    factors = [lr_factor(schedule, step, 37) for step in steps]
    assert factors == pytest.approx([1, 1, 0.2, 0.04, 0.04])
    with pytest.raises(ValueError, match=r"schedule\.iterations: needs schedule\.kind"):
        ScheduleConfig(kind="cosine", iterations=5)
    with pytest.raises(ValueError, match=r"before schedule\.iterations = 5"):
        ScheduleConfig(milestones=(5,), iterations=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four videos, two for training, in three streams, boxes as bytes."""
    folder = tmp_path_factory.mktemp("ucf24")
    rng = np.random.default_rng(0)
    annotations, names = {}, []
    for k in range(4):
        label = 2 + k % 2
        name = f"{UCF24_CLASSES[label]}/v_{k}"
        names.append(name)
        boxes = np.array([[200, 60, 90, 150]] * 10, np.uint8)  # x + w is no byte
        tube = {"label": label, "sf": 1, "ef": 11, "boxes": boxes}
        annotations[name] = {"label": label, "numf": FRAMES, "annotations": [tube]}
        for stream in ("rgb", "brox", "fastOF"):
            images = folder / f"{stream}-images" / name
            images.mkdir(parents=True)
            for number in range(1, FRAMES + 1):
                pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((320, 240))
                image.save(images / f"{number:05d}.jpg")
    (folder / "splitfiles").mkdir()
    (folder / "splitfiles" / "pyannot.pkl").write_bytes(pickle.dumps(annotations, protocol=2))
    (folder / "splitfiles" / "trainlist01.txt").write_text("\n".join(names[:2]))
    return folder


SMALL = ("--detection.width", "4", "--train.global_batch", "2", "--train.micro_batch", "1")


def _train(recipe, root, *more):
    from accel.cli.train import main as train

    return train(
        ["--recipe", recipe, "--data.root", str(root), *SMALL, "--run.threads", "1", *more]
    )


@pytest.mark.parametrize("recipe", ["amtnet_cat_rgb_fastof_ucf24", "ssd300_brox_ucf24"])
def test_a_dry_run_shows_the_shapes(root, recipe, capsys) -> None:
    assert _train(recipe, root, "--dry-run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    fact = facts()["detection_runs"][recipe]
    frames, streams = fact["num_frames"], fact["streams"]
    for k, (_, stack) in enumerate(streams):
        assert report[f"stream {k}"] == [frames, 3 * stack, 300, 300]
    assert report["conf"] == [1, 8732, 25] and report["loc"] == [1, 8732, 4 * frames]
    assert report["total_steps"] == fact["iterations"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["amtnet_brox_ucf24", "amtnet_cat_rgb_fastof_ucf24", "ssd300_fastof_ucf24"]
)
def test_recipes_train_and_evaluate(root, recipe, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert _train(recipe, root, "--train.max_steps", "2", "--out", str(out), "--json") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["iterations"] == 2 and summary["val_num_videos"] == 2


@pytest.mark.slow
def test_two_streams_are_evaluated_together(root, tmp_path, capsys) -> None:
    checkpoints = []
    for stream in ("rgb", "brox"):
        out = tmp_path / stream
        recipe = f"ssd300_{stream}_ucf24"
        assert _train(recipe, root, "--train.max_steps", "1", "--out", str(out), "--json") == 0
        checkpoints.append(json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"])
    command = ["tubes", *checkpoints, "--root", str(root), "--json"]
    for fusion in ("boost", "union", "mean"):
        assert accel([*command, "--fusion", fusion]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["num_videos"] == 2 and 0 <= scores["video_map_50"] <= 1
    assert accel(command) == 2
    assert "expected one checkpoint, or two and --fusion" in capsys.readouterr().err


def test_what_networks_start_from(tmp_path) -> None:
    """VGG16's layers, the whole of ROAD's SSD for an SSD, its trunk for AMTNet."""
    road = build_detector("ssd300", num_classes=25, width=4)
    vgg = {name.removeprefix("base.vgg."): v for name, v in road.state_dict().items()}
    vgg = {name: v for name, v in vgg.items() if name[0].isdigit()}
    torch.save(vgg, tmp_path / "vgg.pth")
    torch.save(
        {
            name.removeprefix("base.").replace("norm.", "L2Norm."): v
            for name, v in road.state_dict().items()
        },
        tmp_path / "road.pth",
    )
    for file in ("vgg.pth", "road.pth"):
        config = DetectionConfig(
            network="ssd300", num_frames=1, width=4, start_base=str(tmp_path / file)
        )
        model = build_detector("ssd300", num_classes=25, width=4)
        start_network(model, config)
        for name, value in model.state_dict().items():
            same = torch.equal(value, road.state_dict()[name])
            assert same or (file == "vgg.pth" and name.startswith(("loc", "conf", "base.extras")))
    flow = build_detector("amtnet", num_classes=25, width=4, input_frames=5)
    start = DetectionConfig(network="amtnet", width=4, start_base=str(tmp_path / "road.pth"))
    start_network(flow, start)
    first = flow.base.vgg[0].weight
    torch.testing.assert_close(first[:, :3], road.base.vgg[0].weight / 5)
    vgg.popitem()
    torch.save(vgg, tmp_path / "part.pth")
    config = DetectionConfig(network="amtnet", width=4, start_base=str(tmp_path / "part.pth"))
    with pytest.raises(CheckpointError, match="lacks 1 tensors of the trunk"):
        start_network(flow, config)
