"""Color jitter: its distribution, and that one map per frame is the sequence of its parts."""

import numpy as np
import torch

from pipelines.color import apply_maps, draw_jitter, jitter_matrix


def test_maps_compose_in_order() -> None:
    pixel = np.array([200.0, 30.0, 90.0, 1.0])
    bright = np.append(jitter_matrix([("brightness", 10)]) @ pixel, 1)
    both = jitter_matrix([("brightness", 10), ("contrast", 0.5)]) @ pixel
    assert np.allclose(both, jitter_matrix([("contrast", 0.5)]) @ bright)
    assert np.allclose(both, [105, 20, 50])
    grey = jitter_matrix([("saturation", 0.0)]) @ pixel
    assert np.allclose(grey, pixel[:3] @ [0.299, 0.587, 0.114])
    assert np.allclose(jitter_matrix([]), np.eye(3, 4))


def test_amounts_belong_to_the_clip_and_coins_to_its_frames() -> None:
    rng = np.random.default_rng(0)
    clips = [draw_jitter(8, rng) for _ in range(400)]
    assert clips[0].shape == (8, 3, 4) and clips[0].dtype == np.float32
    for clip in clips:
        # Four coins: at most 16 different maps, all with one offset and one set of amounts.
        assert len(np.unique(clip.reshape(8, -1), axis=0)) <= 16
    identity = np.mean([np.allclose(m[:, :3], np.eye(3), atol=1e-6) for c in clips for m in c])
    assert 0.09 < identity < 0.16  # contrast, saturation, hue all tails: 1/8
    assert np.ptp([clip[0, 0, 3] for clip in clips]) > 40  # brightness and PCA offset


def test_nothing_is_clipped() -> None:
    frames = torch.full((2, 4, 6, 3), 250, dtype=torch.uint8)
    maps = torch.from_numpy(np.stack([jitter_matrix([("contrast", f)]) for f in (1.4, -1.0)]))
    colors = apply_maps(frames, maps.float())
    assert torch.allclose(colors[0], torch.tensor(350.0)) and colors[1].max() == -250
