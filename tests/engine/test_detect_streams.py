"""`accel detect` on URLs, cameras, and two streams at once."""

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from accel.cli.main import main as accel
from accel.detection.candidates import FilterRule
from accel.detection.fusion import fused_candidates
from accel.engine.detect_video import OnlineDetector
from accel.engine.detection_config import DetectionConfig
from accel.engine.tube_evaluation import FrameDetector, video_detections
from accel.errors import ConfigError
from accel.models.detectors import build_detector
from pipelines.flow import write_flow
from pipelines.moving_objects import generate_moving_objects
from pipelines.streaming import VideoWriter, is_live
from pipelines.tube_data import open_tube_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = generate_moving_objects(tmp_path_factory.mktemp("cache"), num_train=3, num_test=3)
    data = open_tube_set(root, "moving_objects")
    assert all(dict(write_flow(data, _difference, method="test")).values())
    return root


def _difference(frames):
    """Stands for a method: how the mean of all pixels changes, times 20 px."""
    change = np.diff(frames.astype(np.float32), axis=0).mean(axis=-1, keepdims=True)
    return np.repeat(change / 255 * 20, 2, axis=-1)


def _detector(stream, stack, seed, **changes):
    torch.manual_seed(seed)
    small = {"size": 96, "width": 4, "levels": 2, "prior_scale": 2.0}
    config = DetectionConfig(
        network="amtnet", stream=stream, stack=stack, pixel_scale=64.0, **(small | changes)
    )
    model = build_detector("amtnet", num_classes=4, **config.network_options).eval()
    return FrameDetector(model, config, CPU)


@pytest.mark.parametrize("fusion", ["boost", "union", "mean"])
@pytest.mark.parametrize("computed", [False, True], ids=["images", "computed"])
def test_two_live_streams_give_the_detections_of_the_stored_ones(root, fusion, computed) -> None:
    detectors = [_detector("rgb", 1, 0), _detector("flow", 3, 1)]
    data = open_tube_set(root, "moving_objects", streams=("rgb", "flow"))
    video = data.videos[0]
    rgb, flow = (data.read(stream, video, range(1, 25))[..., ::-1] for stream in ("rgb", "flow"))
    seen = [video_detections(data, 0, detector) for detector in detectors]
    rule = FilterRule(score_threshold=0.2)
    from accel.detection.candidates import pixel_boxes

    expected = fused_candidates(
        [(pixel_boxes(own.boxes, own.size), own.scores) for own in seen], fusion, rule, 3
    )
    online = OnlineDetector(
        detectors, 0.2, fusion=fusion, compute_flow=_difference if computed else None
    )
    found = []
    for frame, image in zip(rgb, flow, strict=True):
        found += online.push(frame, None if computed else image)
    assert len(found) < 24
    found += online.finish()
    assert len(found) == 24 and any(found)
    # Computed flow is that of the files but for the loss of JPEG.
    tolerance = 0.02 if computed else 1e-5
    for frame, own in enumerate(found):
        best = max((box.score for box in own), default=0.2)
        present = expected.scores[frame][expected.present()[frame]]
        assert best == pytest.approx(present.max(initial=0.2), abs=tolerance)
    assert all(value > 0 for value in online.seconds.values())


def test_networks_that_do_not_fit() -> None:
    rgb, flow = _detector("rgb", 1, 0), _detector("flow", 3, 1, levels=3)
    with pytest.raises(ConfigError, match="same prior boxes"):
        OnlineDetector([rgb, flow], 0.2, fusion="mean")
    with pytest.raises(ConfigError, match="got 2 networks"):
        OnlineDetector([rgb, flow], 0.2)
    torch.manual_seed(0)
    config = DetectionConfig(network="amtnet", size=96, width=4, levels=2)
    other = build_detector("amtnet", num_classes=9, **config.network_options)
    with pytest.raises(ConfigError, match="different numbers of classes"):
        OnlineDetector([rgb, FrameDetector(other, config, CPU)], 0.2, fusion="union")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights in the published layout, which say what they need but not the class names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    model = build_detector("ssd300", num_classes=4, width=4)
    torch.save({"state_dict": model.state_dict()}, path)
    (path.parent / "classes.txt").write_text("fall\nrise\nslide\n")
    return path


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_url_is_read_to_its_end(checkpoint, tmp_path, capsys) -> None:
    writer = VideoWriter(tmp_path / "clip.webm", 25)
    rng = np.random.default_rng(0)
    for _ in range(6):
        writer.write(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8))
    writer.close()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    common = ["--checkpoint", str(checkpoint), "--classes", str(checkpoint.parent / "classes.txt")]
    try:
        command = ["detect", f"{address}/clip.webm", *common, "--json", "--out"]
        assert accel([*command, str(tmp_path / "out")]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["frames"] == 6
        parts = ["decoding", "detection", "suppression", "linking", "drawing"]
        assert list(summary["ms_per_frame"]) == parts
        assert sum(summary["ms_per_frame"].values()) <= 1e3 / summary["fps"] * 1.01
        assert accel([*command, str(tmp_path / "short"), "--max-frames", "4"]) == 0
        assert json.loads(capsys.readouterr().out)["frames"] == 4
        command[1] = f"{address}/none.webm"
        assert accel([*command, str(tmp_path / "none")]) == 3
        assert "cannot be opened as a video" in capsys.readouterr().err
    finally:
        server.shutdown()


def test_second_streams_that_cannot_be_read(checkpoint, root, tmp_path, capsys) -> None:
    video = root / "rgb-images" / "fall" / "train_0000"
    common = ["--checkpoint", str(checkpoint), "--classes", str(checkpoint.parent / "classes.txt")]
    command = ["detect", str(video), *common, "--out", str(tmp_path / "out"), "--no-video"]
    short = tmp_path / "short"
    shutil.copytree(video, short)
    (short / "00024.jpg").unlink()
    second = ["--second", str(checkpoint), "--second-input"]
    assert accel([*command, *second, str(short)]) == 3
    assert "ends after 23 frames, the other stream goes on" in capsys.readouterr().err
    assert accel([*command, *second[2:], str(short)]) == 2
    assert "--second-input: needs --second" in capsys.readouterr().err
    assert accel(["detect", "/dev/video97", *common, "--out", str(tmp_path / "camera")]) == 3
    assert "/dev/video97: cannot be opened" in capsys.readouterr().err


def test_what_is_live() -> None:
    assert all(map(is_live, ("0", "/dev/video0", "rtsp://camera/stream")))
    assert not any(map(is_live, ("clip.mp4", "/data/frames", "a/0.mp4")))
