"""Speed of linking, temporal labelling and video-mAP on synthetic detections, in one process.

`python profile/tubes.py --videos 50` makes videos of moving boxes in noise, with candidates as a
network's filter leaves them, and prints milliseconds per frame of each part: processor time, which
other work on the machine disturbs least. The timed parts are NumPy code without threads: one core.
"""

import argparse
import json
import time

import numpy as np
import torch

from accel.detection.candidates import FRAME_SIZE, Candidates
from accel.detection.labelling import LabelRule, Tube, is_kept, trim
from accel.detection.linking import link
from accel.detection.video_ap import TruthTube, video_map
from accel.engine.run import environment

CANDIDATES = 10  # of a frame and class, as the published filter leaves


def synthetic_video(
    rng: np.random.Generator, num_frames: int, num_classes: int
) -> tuple[Candidates, list[TruthTube]]:
    """One to three objects of one class, found with noise, among wandering false detections."""
    label, objects = int(rng.integers(num_classes)), int(rng.integers(1, 4))
    counts = rng.integers(2, CANDIDATES + 1, (num_frames, num_classes))
    counts[:, label] = np.maximum(counts[:, label], objects)
    size = rng.uniform(30, 120, (num_classes, CANDIDATES, 2))
    start = rng.uniform(0, 1, (num_classes, CANDIDATES, 2)) * (np.array(FRAME_SIZE) - size)
    drift = rng.normal(0, 2, (num_frames, num_classes, CANDIDATES, 2)).cumsum(0)
    corner = np.clip(start + drift, 0, np.array(FRAME_SIZE) - 30)
    boxes = np.concatenate([corner, corner + size], axis=-1)
    boxes += rng.normal(0, 2, boxes.shape)
    logits = rng.normal(-4, 1, (num_frames, num_classes, CANDIDATES, num_classes + 1))
    logits[..., -1] += 4
    logits[:, label, :objects, label] += rng.uniform(4, 7)
    all_scores = np.exp(logits)
    all_scores /= all_scores.sum(-1, keepdims=True)
    own = np.arange(num_classes)
    scores = all_scores[:, own, :, own].transpose(1, 0, 2)
    order = np.argsort(-scores, axis=2)
    truth = []
    for i in range(objects):
        first = int(rng.integers(0, num_frames // 4))
        last = int(rng.integers(3 * num_frames // 4, num_frames))
        box = np.concatenate(
            [corner[:, label, i], np.broadcast_to(size[label, i], (num_frames, 2))], 1
        )
        truth.append(TruthTube(label, first, box[first : last + 1]))
    candidates = Candidates(
        np.take_along_axis(boxes, order[..., None], 2),
        np.take_along_axis(scores, order, 2),
        np.take_along_axis(all_scores, order[..., None], 2),
        counts,
    )
    return candidates, truth


def measure(num_videos: int, num_frames: int, num_classes: int, seed: int = 0) -> dict[str, float]:
    """Milliseconds of processor time per frame of each part, and the video-mAP at 0.5.

    Making the detections is not counted.
    """
    rng = np.random.default_rng(seed)
    rule = LabelRule()
    linking_s = labelling_s = 0.0
    found: list[list[Tube]] = []
    truth = []
    for _ in range(num_videos):
        candidates, annotated = synthetic_video(rng, num_frames, num_classes)
        begin = time.process_time()
        paths = link(candidates)
        linked = time.process_time()
        tubes = trim([path for own in paths for path in own], rule, num_classes)
        found.append([tube for tube in tubes if is_kept(tube, rule)])
        labelling_s += time.process_time() - linked
        linking_s += linked - begin
        truth.append(annotated)
    begin = time.process_time()
    scores = video_map(found, truth, num_classes=num_classes)
    video_map_s = time.process_time() - begin
    total = linking_s + labelling_s + video_map_s
    frames = num_videos * num_frames
    return {
        "frames": frames,
        "linking_ms": 1e3 * linking_s / frames,
        "labelling_ms": 1e3 * labelling_s / frames,
        "video_map_ms": 1e3 * video_map_s / frames,
        "total_ms": 1e3 * total / frames,
        "frames_per_s_per_core": frames / total,
        "tubes": sum(map(len, found)),
        "video_map_50": scores.at(0.5),
    }


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=50)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.videos, options.frames, options.classes)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        report = {
            "environment": environment(torch.device("cpu")),
            "settings": settings,
            "result": result,
        }
        print(json.dumps(report, indent=1))
        return
    for name, value in result.items():
        print(f"{name:22}{value:.4g}")


if __name__ == "__main__":
    main()
