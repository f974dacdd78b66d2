"""`accel models`: parameters and multiply-adds are the published ones."""

import json

import pytest

from accel.cli.main import main as accel
from accel.cli.models import describe_network
from accel.models import list_models
from accel.models.detectors import list_detectors

# Network, variant, classes: parameters, GMAC at 8 and 16 frames of 224 x 224; ResNet-50.
PUBLISHED = {
    ("amsnet", "2d", 174): (85_914_268, 44.73, 88.47),
    ("amsnet", "snippet", 174): (85_933_084, 46.62, 92.25),
    ("amsnet", "slowonly", 400): (94_370_400, 50.69, 100.39),
    ("masnet", "2d", 174): (26_065_732, 33.37, 66.19),
    # Published: 58.08 and 116.17. The stem here applies its first two convolutions to differences
    # of frames, of which there are fewer; as both are linear, that is the same function.
    ("msn", "2d", 174): (31_017_762, 55.28, 110.56),
    ("tanet", "2d", 174): (25_127_246, 32.76, 65.51),
    ("tdn", "2d", 174): (24_420_046, 35.64, 71.28),
    ("tsn", "2d", 174): (23_864_558, 32.70, 65.40),
}


@pytest.mark.parametrize(("network", "figures"), PUBLISHED.items())
def test_figures_are_the_published_ones(network, figures):
    row = describe_network(*network, 224, 50)
    # 0.01: MAS-Net here forms the temporal mean of its motion by a product of its own.
    found = (row["parameters"], row["gmac"]["8"], row["gmac"]["16"])
    assert found == pytest.approx(figures, abs=0.01)


def test_the_table_and_the_json_list_every_network(capsys, monkeypatch):
    def described(name, variant, num_classes, size, depth):
        assert (num_classes, size, depth) == (5, 32, 101)
        gmac = {"8": len(name) / 7, "16": len(variant) / 7}
        return {"name": name, "variant": variant, "parameters": 12345 * len(name), "gmac": gmac}

    monkeypatch.setattr("accel.cli.models.describe_network", described)
    small = ["--size", "32", "--classes", "5", "--depth", "101"]
    assert accel(["models", *small]) == 0
    table = capsys.readouterr().out
    assert accel(["models", *small, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    listed, detectors = listed[:-5], listed[-5:]
    assert {row["name"] for row in detectors} == set(list_detectors())
    assert {row["name"] for row in listed} == set(list_models())
    for row in listed:
        assert f"{row['parameters']:,}" in table
        assert f"{row['gmac']['16']:.2f}" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "0"], "num_classes: got 0"),
        (["--classes", "x"], "invalid int value: 'x'"),
        (["--size", "16"], "--size: got 16, expected at least 32"),
        (["--depth", "20"], "argument --depth: invalid choice: 20"),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_input_is_one_sentence(options, message, capsys):
    assert accel(["models", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
