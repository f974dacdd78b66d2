"""Annotated tubes: what is read, and one sentence for everything that cannot be used."""

import json
import os
import pickle

import numpy as np
import pytest

from pipelines.errors import AnnotationError
from pipelines.microtubes import image_numbers, list_microtubes
from pipelines.ssd_augment import SeededDraws, augment, plain_view
from pipelines.tubes import (
    JHMDB21_CLASSES,
    UCF24_CLASSES,
    TubeAnnotation,
    VideoAnnotation,
    read_tubes,
    read_video_list,
)


def _content(**changes):
    tube = {"label": 3, "sf": 2, "ef": 5, "boxes": np.full((3, 4), 200, np.uint8)} | changes
    return {"A/v1": {"label": 3, "numf": np.uint8(9), "annotations": [tube]}}


def _write(tmp_path, content):
    path = tmp_path / "pyannot.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def test_bytes_do_not_wrap_and_names_are_sorted(tmp_path) -> None:
    content = _content() | {"A/v0": {"label": 3, "numf": 4, "annotations": []}}
    videos = read_tubes(_write(tmp_path, content), num_classes=24)
    assert list(videos) == ["A/v0", "A/v1"]
    (tube,) = videos["A/v1"].tubes
    assert (tube.start, tube.end, videos["A/v1"].num_frames) == (2, 5, 9)
    assert (tube.boxes_xywh[:, 0] + tube.boxes_xywh[:, 2]).tolist() == [400.0] * 3
    as_json = tmp_path / "tubes.json"
    tube_json = {"label": 3, "sf": 2, "ef": 5, "boxes_xywh": [[200] * 4] * 3}
    as_json.write_text(json.dumps({"A/v1": {"numf": 9, "annotations": [tube_json]}}))
    np.testing.assert_array_equal(read_tubes(as_json)["A/v1"].tubes[0].boxes_xywh, tube.boxes_xywh)
    assert len(UCF24_CLASSES) == 24 and len(JHMDB21_CLASSES) == 21


BAD = [
    ({"boxes": np.full((2, 4), 5)}, "got 2 boxes for the frames 2 to 5"),
    ({"boxes": [[1, 1, 5, 5], [1, 1, -5, 5], [1, 1, 5, 5]]}, "frame 3: the box .* is empty or inv"),
    ({"boxes": [[1, 1, 5, 5], [1, 1, 5, 5], [1, 1, 5, 0]]}, "frame 4: the box .* is empty or inv"),
    ({"boxes": [[np.nan, 1, 5, 5]] * 3}, "frame 2: the box .* is not finite"),
    ({"ef": 12, "boxes": np.full((10, 4), 5)}, "frames 2 to 12 do not lie in a video of 9"),
    ({"boxes": "none"}, "expected label, sf, ef and boxes"),
    ({"label": 24}, "expected a label of 0 to 23, got 24"),
    ({"ef": 2, "boxes": np.zeros((0, 4))}, "got 0 boxes"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_boxes_are_named(tmp_path, change, message) -> None:
    path = _write(tmp_path, _content(**change))
    with pytest.raises(AnnotationError, match=rf'pyannot\.pkl: video "A/v1", tube 0.*{message}'):
        read_tubes(path, num_classes=24)


def test_files_that_are_no_annotation_are_refused(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("false",)

    with pytest.raises(AnnotationError, match=r"refused, because it holds \w+\.system"):
        read_tubes(_write(tmp_path, {"A/v1": Evil()}))
    path = _write(tmp_path, _content())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AnnotationError, match=r"pyannot\.pkl: is damaged|pyannot\.pkl: refused"):
        read_tubes(path)
    with pytest.raises(AnnotationError, match="cannot be read: No such file"):
        read_tubes(tmp_path / "none.pkl")
    with pytest.raises(AnnotationError, match="expected a dict"):
        read_tubes(_write(tmp_path, [1]))
    for name, message in (("/A/v", "below the image folder"), ("../v", "below the image folder")):
        with pytest.raises(AnnotationError, match=message):
            read_tubes(_write(tmp_path, {name: _content()["A/v1"]}))
    broken = tmp_path / "x.json"
    broken.write_text('{\n"a": }')
    with pytest.raises(AnnotationError, match=r"x.json:2: is no JSON"):
        read_tubes(broken)


def test_lists_name_the_line_of_an_unknown_video(tmp_path) -> None:
    videos = read_tubes(_write(tmp_path, _content()))
    path = tmp_path / "trainlist01.txt"
    path.write_text("A/v1.avi\n\nA/v2\n")
    with pytest.raises(AnnotationError, match=r"trainlist01.txt:3: 'A/v2' has no annotation"):
        read_video_list(path, videos)
    path.write_text("A/v1\n")
    assert read_video_list(path, videos) == {"A/v1"}
    path.write_text("\n")
    with pytest.raises(AnnotationError, match="the list is empty"):
        read_video_list(path, videos)


def _video(num_frames=8, start=0, end=8, label=0):
    boxes = np.tile(np.float32([10, 20, 30, 40]), (end - start, 1))
    return VideoAnnotation("A/v", num_frames, (TubeAnnotation(label, start, boxes),))


def test_plain_items_cover_the_frames_with_boxes() -> None:
    train, test = list_microtubes([_video(start=2)], dataset="plain", training=[True], gaps=(1,))
    assert not test
    assert [item.frames for item in train] == [(2, 4), (3, 5), (4, 6)]
    assert train[0].boxes[0].tolist() == [[10, 20, 40, 60]] * 2
    with pytest.raises(ValueError, match="published for"):
        list_microtubes([_video()], dataset="ucf24", training=[True], num_frames=3)


def test_stacks_stay_inside_the_video() -> None:
    assert list(image_numbers(0, 20, 5)) == [1, 2, 3, 4, 5]
    assert list(image_numbers(19, 20, 5)) == [16, 17, 18, 19, 20]
    assert list(image_numbers(9, 20, 1)) == [10]
    with pytest.raises(ValueError, match="at least 5 images in the video, got 4"):
        image_numbers(0, 4, 5)


@pytest.mark.parametrize("seed", range(20))
def test_augmented_boxes_follow_their_pixels(seed: int) -> None:
    images = np.full((2, 60, 80, 3), 40, np.uint8)
    boxes = np.float32([[[10, 8, 40, 30], [14, 10, 44, 32]]])
    for image, (x0, y0, x1, y1) in zip(images, boxes[0].astype(int), strict=True):
        image[y0:y1, x0:x1] = 250
    fractions = boxes / np.float32([80, 60, 80, 60])
    out, found, labels = augment(images, fractions, np.array([5]), SeededDraws(seed), size=120)
    assert out.shape == (2, 120, 120, 3) and labels.tolist() == [5]
    again = augment(images, fractions, np.array([5]), SeededDraws(seed), size=120)
    np.testing.assert_array_equal(again[0], out)
    for image, box in zip(out, found[0], strict=True):
        x0, y0, x1, y1 = (box * 120).round().astype(int)
        dx, dy = 2 + (x1 - x0) // 6, 2 + (y1 - y0) // 6  # blurred where it is enlarged
        inside = image[y0 + dy : y1 - dy, x0 + dx : x1 - dx].reshape(-1, 3)
        assert len(inside)
        assert np.ptp(inside, axis=0).max() < 1e-2  # one color
        if min(x0 - dx, y0 - dy, 120 - x1 - dx, 120 - y1 - dy) > 0:  # and none of it outside
            ring = np.concatenate([image[y0 - dy, x0:x1], image[y0:y1, x1 + dx - 1]])
            assert np.abs(ring - inside[0]).max(axis=1).min() > 5


def test_the_plain_view_is_bytes_minus_means() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), dtype=np.uint8)
    view = plain_view(images, size=24)
    assert view.shape == (1, 24, 24, 3) and view.dtype == np.float32
    assert np.array_equal(view, np.rint(view))
    np.testing.assert_array_equal(
        plain_view(images[:, :20, :20], size=20)[0], images[0, :, :20] - [104.0, 117.0, 123.0]
    )
