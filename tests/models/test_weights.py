"""Importing published checkpoints: every layout, every damage, every difference counted."""

import argparse
import os
import zipfile

import numpy as np
import pytest
import torch

from accel.errors import CheckpointError
from accel.models import build_model
from accel.models.convert import TABLES
from accel.models.weights import import_weights, load_foreign, read_state_dict

TANET = TABLES["tanet"]
FULL = [layout for layout in TANET.all_layouts if layout != "torchvision"]


def _model(*, seed=0, depth=50, num_segments=2, num_classes=5, **options):
    torch.manual_seed(seed)
    options = {"width": 8, "stages": 2} | options
    model = build_model(
        "tanet", depth=depth, num_classes=num_classes, num_segments=num_segments, **options
    )
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape))  # norms away from 0 and 1
    return model.eval()


def _published(model, layout):
    state = {TANET.rename(k, "accel", layout): v for k, v in model.state_dict().items()}
    state.pop(None, None)
    return state


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", FULL)
def test_every_layout_gives_the_same_outputs(layout, legacy, path):
    source, model = _model(seed=0), _model(seed=1)
    state = _published(source, layout)
    if layout.startswith(("original", "prerelease")):
        state = {f"module.{name}": value for name, value in state.items()}
    content = {
        "epoch": 50,
        "arch": "resnet50",
        "state_dict": state,
        "best_prec1": np.float64(46.5),
        "args": argparse.Namespace(lr=0.01, root="/data"),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    report = import_weights(model, path)
    assert report.layout == layout
    assert report.loaded == tuple(model.state_dict())
    assert report.kept == ()
    frames = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(frames), source(frames))
    assert model.trunk.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_imagenet_fills_the_trunk_alone(path):
    source, model = _model(seed=0), _model(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = _published(source, "torchvision")
    state["fc.weight"], state["fc.bias"] = torch.randn(1000, 64), torch.randn(1000)
    torch.save(state, path)
    report = import_weights(model, path)
    assert report.layout == "torchvision"
    for name, value in model.state_dict().items():
        kept = ".temporal." in name or name.startswith("head.")
        assert (name in report.kept) == kept
        assert torch.equal(value, before[name] if kept else source.state_dict()[name])


def test_build_model_starts_from_a_file(path):
    source = _model(num_classes=7)
    torch.save(source.state_dict(), path)
    model = build_model(
        "tanet", width=8, stages=2, num_classes=5, num_segments=2, pretrained=str(path)
    )
    assert model.num_classes == 5
    assert torch.equal(model.trunk.conv1.weight, source.trunk.conv1.weight)


def test_missing_batch_counters_are_accepted(path):
    state = _published(_model(), "original")
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    torch.save({name: state[name] for name in state if name not in counters}, path)
    report = import_weights(_model(seed=1), path)
    assert len(report.kept) == len(counters) > 0


def test_another_class_count_is_an_error_unless_allowed(path):
    torch.save(_published(_model(num_classes=174), "mmaction2"), path)
    model = _model(seed=1)
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight: got \[174, 64\]") as error:
        import_weights(model, path)
    assert "allow_classifier_mismatch" in str(error.value)
    report = import_weights(model, path, allow_classifier_mismatch=True)
    assert report.kept == ("head.fc.weight", "head.fc.bias")


def test_another_number_of_segments_is_explained(path):
    torch.save(_published(_model(num_segments=4), "original"), path)
    with pytest.raises(CheckpointError, match="depend on the number of segments"):
        import_weights(_model(), path)


def test_all_differences_are_listed_and_nothing_is_changed(path):
    model = _model(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = _published(_model(seed=0), "original")
    del state["base_model.conv1.weight"], state["base_model.layer2.3.tam.L.0.weight"]
    state["base_model.layer9.0.net.conv1.weight"] = torch.zeros(1)
    state["something"] = torch.zeros(1)
    state["base_model.bn1.weight"] = torch.zeros(9)
    state["base_model.bn1.bias"] = state["base_model.bn1.bias"].long()
    torch.save(state, path)
    with pytest.raises(CheckpointError) as error:
        import_weights(model, path)
    for line in (
        "2 missing, 2 unexpected, 2 of another shape or type",
        "missing: trunk.conv1.weight",
        "missing: trunk.layer2.3.temporal.L.0.weight",
        "unexpected: base_model.layer9.0.net.conv1.weight",
        "unexpected: something",
        "trunk.bn1.weight: got [9] torch.float32, expected [8] torch.float32",
        "trunk.bn1.bias: got [8] torch.int64, expected [8] torch.float32",
    ):
        assert line in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "damaged or truncated"),
        (b"hello", "is not a PyTorch checkpoint"),
    ],
)
def test_what_is_not_a_checkpoint(path, content, problem):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        load_foreign(path)


def test_missing_file_and_folder(path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_foreign(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        load_foreign(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_truncated(path, fraction, legacy):
    content = {"x": torch.arange(1000)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match="truncated"):
        load_foreign(path)


def test_any_flipped_payload_bit_is_found(path):
    tensor = torch.arange(4096, dtype=torch.float32)
    torch.save({"x": tensor}, path)
    data = path.read_bytes()
    start = data.index(tensor.numpy().tobytes())
    generator = np.random.default_rng(0)
    for _ in range(100):
        position = start + int(generator.integers(4 * len(tensor)))
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="checksum"):
            load_foreign(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bits_anywhere_never_raise_anything_else(path, legacy):
    torch.save({"x": torch.arange(8)}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(len(data), size=300):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        try:
            load_foreign(path)
        except CheckpointError:
            pass


class _Malicious:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [(os.system, "touch {}", "posix.system"), (eval, "open('{}', 'w')", "eval")],
)
def test_code_in_a_pickle_is_refused_and_not_run(path, tmp_path, function, argument, name, legacy):
    canary = tmp_path / "canary"
    argument = argument.format(canary)
    content = {"state_dict": {"x": torch.zeros(1)}, "extra": _Malicious(function, argument)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=f"refused.*{name}") as error:
        import_weights(_model(), path)
    assert "weights_only" not in str(error.value)  # no advice to read it unprotected
    assert not canary.exists()


def test_whole_modules_are_refused(path):
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="refused"):
        load_foreign(path)


def test_numpy_objects_are_read_as_nothing(path):
    torch.save({"state_dict": {"x": torch.ones(1)}, "seed": np.random.get_state()}, path)
    assert read_state_dict(path).keys() == {"x"}


def test_compressed_members_are_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    with pytest.raises(CheckpointError, match="compressed"):
        load_foreign(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "holds no state dict but a list"),
        ({}, "holds no state dict"),
        ({"epoch": 3}, "not plain tensors: epoch"),
        ({"x": torch.zeros(1).expand(1 << 40)}, "not plain tensors: x"),
        ({"x": torch.eye(2).to_sparse()}, "not plain tensors: x"),
        ({"x": torch.tensor([1.0, float("nan")])}, "not finite in x"),
        ({"x": torch.zeros(1)}, "no known layout"),
    ],
)
def test_files_without_a_usable_state_dict(path, content, problem):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=problem):
        import_weights(_model(), path)
