"""`accel convert`: every layout there and back; one sentence for every file that does not fit."""

import hashlib
import json

import pytest
import torch

from accel.cli.main import main as accel
from accel.models import build_model, list_models
from accel.models.convert import TABLES
from accel.models.convert.names import IMAGENET, OURS
from accel.models.weights import export_weights, read_state_dict

MAPS = [
    pytest.param(name, layout, id=f"{name}-{layout}")
    for name in list_models()
    for layout in TABLES[name].all_layouts
    if layout not in (OURS, IMAGENET)
]


def _network(name, **options):
    torch.manual_seed(0)
    options = {"width": 8, "stages": 2, "num_classes": 5, "num_segments": 2} | options
    return build_model(name, **options)


@pytest.fixture
def source(tmp_path):
    """A TANet file as its authors write them, and the network in it."""
    model = _network("tanet")
    path = tmp_path / "source.pth.tar"
    torch.save({"epoch": 3, "state_dict": export_weights(model, "original")}, path)
    return path, model


@pytest.mark.parametrize(("name", "layout"), MAPS)
def test_ours_to_a_published_layout_and_back(name, layout, tmp_path, capsys):
    model = _network(name)
    ours, published, back = (tmp_path / n for n in ("ours.pt", "published.pth", "back.pt"))
    torch.save({"model": model.state_dict(), "optimizer": {"lr": 0.1}}, ours)
    options = ["--system", name]
    assert accel(["convert", str(ours), *options, "--to", layout, "--out", str(published)]) == 0
    names = torch.load(published, weights_only=True)["state_dict"].keys()
    assert names == export_weights(model, layout).keys()
    assert names.isdisjoint(model.state_dict())
    assert all(n.startswith("module.") == (layout in TABLES[name].data_parallel) for n in names)

    assert accel(["convert", str(published), *options, "--out", str(back)]) == 0
    assert f'layout "{layout}"' in capsys.readouterr().out
    state = read_state_dict(back)
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    _network(name, pretrained=str(back))


def test_the_file_says_where_it_is_from(source, tmp_path, capsys):
    path, model = source
    out = tmp_path / "out.pt"
    assert accel(["convert", str(path), "--system", "tanet", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    content = torch.load(out, weights_only=True)
    assert report["tensors"] == len(content["model"]) == len(model.state_dict())
    assert content["format"] == "accel-weights-1"
    assert content["source"] == {
        "file": "source.pth.tar",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "layout": "original",
        "ignored": [],
    }
    assert content["network"] == {
        "name": "tanet",
        "variant": "2d",
        "depth": 50,
        "width": 8,
        "stages": 2,
        "stem": "imagenet",
        "num_classes": 5,
        "num_segments": 2,
    }
    assert content["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(("depth", "stages"), [(18, 4), (34, 2), (50, 3), (101, 3)])
def test_the_network_is_recognized_by_its_shapes(depth, stages, tmp_path, capsys):
    model = _network("masnet", depth=depth, stages=stages, stem="small", width=4)
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(model.state_dict(), path)
    assert accel(["convert", str(path), "--system", "masnet", "--out", str(out), "--json"]) == 0
    network = json.loads(capsys.readouterr().out)["network"]
    assert (network["depth"], network["stages"]) == (depth, stages)
    assert (network["stem"], network["width"]) == ("small", 4)


def test_every_unmapped_name_is_reported(source, tmp_path, capsys):
    path, _ = source
    content = torch.load(path, weights_only=True)
    content["state_dict"]["module.extra.weight"] = torch.zeros(1)
    content["state_dict"]["module.more"] = torch.zeros(1)
    del content["state_dict"]["module.new_fc.bias"]
    torch.save(content, path)
    out = tmp_path / "out.pt"
    assert accel(["convert", str(path), "--system", "tanet", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    for line in ("unexpected: extra.weight", "unexpected: more", "missing: head.fc.bias"):
        assert line in error
    assert not out.exists()


def test_a_file_of_another_system_is_named_in_a_few_lines(source, tmp_path, capsys):
    path, _ = source
    out = tmp_path / "out.pt"
    assert accel(["convert", str(path), "--system", "masnet", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert 'Most of its names are those of tanet in layout "original".' in error
    assert len(error.splitlines()) < 15
    assert not out.exists()


def _imagenet(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    table = TABLES["tanet"]
    names = [
        (table.rename(n.removeprefix("module."), "original", IMAGENET), v) for n, v in state.items()
    ]
    torch.save({name: value for name, value in names if name}, path)


def _one_tensor(path):
    torch.save({"new_fc.weight": torch.zeros(5, 64)}, path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ["--system", "other"], "invalid choice: 'other'"),
        (None, [], "the following arguments are required: --system"),
        (None, ["--system", "tanet", "--to", "torchvision"], "--to: got 'torchvision', expected"),
        (None, ["--system", "tanet", "--layout", "x"], "--layout: got 'x', expected one of"),
        (
            None,
            ["--system", "tanet", "--layout", "mmaction2"],
            'not a network of tanet in layout "mmaction2": no stem',
        ),
        (None, ["--system", "tanet", "--extra"], "unrecognized arguments: --extra"),
        (None, ["--system", "tsm"], 'Most of its names are those of tanet in layout "original".'),
        (_imagenet, ["--system", "tanet"], "is an ImageNet network without temporal modules"),
        (_one_tensor, ["--system", "tanet"], "no stem, no classifier, or [0, 0, 0, 0] blocks"),
        (lambda path: path.unlink(), ["--system", "tanet"], "no such file"),
        (lambda path: path.write_bytes(b""), ["--system", "tanet"], "is empty (0 bytes)"),
    ],
)
def test_wrong_input_is_one_message(source, change, options, message, tmp_path, capsys):
    path, _ = source
    if change:
        change(path)
    out = tmp_path / "out.pt"
    assert accel(["convert", str(path), *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1 and "Traceback" not in error
    assert not out.exists()


def test_nothing_is_overwritten_and_folders_are_not_made(source, tmp_path, capsys):
    path, _ = source
    before = path.read_bytes()
    assert accel(["convert", str(path), "--system", "tanet", "--out", str(path)]) == 2
    assert "exists; choose another file" in capsys.readouterr().err
    assert path.read_bytes() == before
    out = tmp_path / "none" / "out.pt"
    assert accel(["convert", str(path), "--system", "tanet", "--out", str(out)]) == 2
    assert "cannot be written" in capsys.readouterr().err
