"""Flow images of sets without the published archives: what bytes mean, which files there are."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accel.cli.main import main as accel
from pipelines import dali_flow, decoders
from pipelines.errors import DataError
from pipelines.flow import flow_function, flow_images, write_flow
from pipelines.moving_objects import generate_moving_objects
from pipelines.tube_data import open_tube_set


@pytest.fixture
def root(tmp_path):
    return generate_moving_objects(tmp_path, num_train=3, num_test=3)


def test_bytes_of_a_motion() -> None:
    flow = np.float32([[[[0, 0], [10, -5], [-40, 3]]]])
    (image,) = flow_images(flow, 20.0)
    assert image.tolist() == [[[128, 128, 0], [192, 96, 143], [1, 147, 255]]]


def _shifts(frames):
    """Stands for a method: the mean brightness of a frame, so that images can be told apart."""
    value = frames[:-1].mean(axis=(1, 2, 3)) / 255 * 20
    return np.broadcast_to(value[:, None, None, None], (*frames[:-1].shape[:3], 2))


def test_the_stream_can_be_trained_on(root) -> None:
    data = open_tube_set(root, "moving_objects")
    written = dict(write_flow(data, _shifts, method="test", threads=2))
    assert len(written) == 6 and all(written.values())
    both = open_tube_set(root, "moving_objects", streams=("rgb", "flow"))
    video = both.videos[0]
    numbers = range(1, video.num_frames + 1)
    red = both.read("flow", video, numbers)[..., 2].astype(float).mean(axis=(1, 2))
    mean = both.read("rgb", video, numbers).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(red[:-1], 128 + 127 * mean[:-1] / 255, atol=2)  # JPEG's colors
    assert red[-1] == red[-2]
    assert not any(dict(write_flow(data, _shifts, method="test")).values())  # nothing twice
    stored = json.loads((root / "flow-images" / "flow.json").read_text())
    assert stored == {"method": "test", "bound_px": 20.0, "published": False}
    with pytest.raises(DataError, match="flow of other settings"):
        list(write_flow(data, _shifts, method="test", bound_px=5.0))


def test_an_interrupted_video_is_written_again(root) -> None:
    data = open_tube_set(root, "moving_objects")

    def fails(frames):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot be written: .*No space left"):
        list(write_flow(data, fails, method="test"))
    assert not (root / "flow-images" / data.videos[0].name).exists()
    assert all(dict(write_flow(data, _shifts, method="test")).values())


def test_what_is_missing_is_said(root, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    command = ["data", "flow", "--root", str(root), "--dataset", "moving_objects"]
    assert accel([*command, "--method", "opencv"]) == 3
    assert "pip install opencv-python-headless" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU, but no DALI
    monkeypatch.setattr(decoders, "dali_installed", lambda: False)
    assert accel(command) == 3
    assert "pip install opencv-python-headless" in capsys.readouterr().err
    assert accel([*command, "--bound", "0"]) == 2
    assert "--bound" in capsys.readouterr().err


class _OnePipeline:
    """As a pipeline of DALI: what was fed last comes out, in memory that the next run reuses."""

    def __init__(self) -> None:
        self.memory = np.zeros((1, 1, 2, 2, 2), np.float32)

    def feed_input(self, name, batch):
        self.value = batch[0].mean()

    def run(self):
        time.sleep(0.002)
        self.memory[:] = self.value
        array = SimpleNamespace(as_array=lambda: self.memory)
        return [SimpleNamespace(as_cpu=lambda: array)]


def test_threads_do_not_get_the_flow_of_one_another(monkeypatch) -> None:
    pipeline = _OnePipeline()
    monkeypatch.setattr(dali_flow, "_pipeline", lambda device_id: pipeline)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    videos = [np.full((2, 8, 8, 3), value, np.uint8) for value in range(40)]
    with ThreadPoolExecutor(4) as pool:
        flows = list(pool.map(dali_flow.dali_flow, videos))
    assert [float(flow.max()) for flow in flows] == list(range(40))


@pytest.mark.parametrize(
    "method",
    ["opencv", pytest.param("dali", marks=[pytest.mark.needs_cuda, pytest.mark.needs_dali])],
)
def test_a_shift_is_found(method) -> None:
    if method == "opencv":
        pytest.importorskip("cv2", reason="OpenCV is optional")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([texture[32 : 32 + 240, 32 + 4 * k : 32 + 4 * k + 320] for k in range(3)])
    flow = flow_function(method)(frames)
    assert flow.shape == (2, 240, 320, 2)
    np.testing.assert_allclose(np.median(flow, axis=(1, 2)), [[-4, 0]] * 2, atol=0.5)


def test_the_command_writes_the_stream(root, capsys) -> None:
    pytest.importorskip("cv2", reason="OpenCV is optional")
    command = ["data", "flow", "--root", str(root), "--dataset", "moving_objects"]
    assert accel([*command, "--method", "opencv"]) == 0
    assert "not the published flow" in capsys.readouterr().out
    assert open_tube_set(root, "moving_objects", streams=("flow",)).videos
