"""From logits to detections."""

import torch

from accel.detection.boxes import decode
from accel.detection.detect import detect


def _outputs():
    generator = torch.Generator().manual_seed(0)
    priors = torch.rand(60, 4, generator=generator) * 0.3 + 0.2
    conf = torch.randn(2, 60, 4, generator=generator) * 2
    loc = torch.randn(2, 60, 8, generator=generator)
    return conf, loc, priors


def test_detections_are_decoded_boxes_above_the_threshold() -> None:
    conf, loc, priors = _outputs()
    found = detect(conf, loc, priors, score_threshold=0.3, top_k=10)
    probs, boxes = conf.softmax(-1), decode(loc, priors)
    assert found.boxes.shape == (2, 3, 10, 2, 4)
    for b, a in ((b, a) for b in range(2) for a in range(3)):
        n = int(found.counts[b, a])
        assert n and (found.priors[b, a, n:] == -1).all() and not found.boxes[b, a, n:].any()
        priors_found = found.priors[b, a, :n]
        torch.testing.assert_close(found.scores[b, a, :n], probs[b, priors_found, a + 1])
        assert (found.scores[b, a, :n] > 0.3).all()
        assert (found.scores[b, a, :n].diff() <= 0).all()
        expected = boxes[b, priors_found]
        expected = torch.cat([expected[..., :2].clamp(min=0), expected[..., 2:].clamp(max=1)], -1)
        torch.testing.assert_close(found.boxes[b, a, :n], expected)


def test_a_single_box_is_dropped_only_where_asked() -> None:
    conf, loc, priors = _outputs()
    conf[:] = 0
    conf[0, 7, 2] = 9
    assert detect(conf, loc, priors, score_threshold=0.5).counts.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert not detect(conf, loc, priors, score_threshold=0.5, drop_single=True).counts.any()
