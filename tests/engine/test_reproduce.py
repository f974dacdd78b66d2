"""From official annotations to the report of a published row, at a small scale; the table."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from accel.cli.main import main
from accel.engine.published import published_rows
from accel.engine.results import BEGIN, END, insert_table, load_reports, results_table
from accel.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
    --model.depth 18 --model.width 8 --model.stages 4 --augment.size 32 --augment.resize 36
    --train.global_batch 4 --train.micro_batch 2 --loader.threads 1 --run.threads 1
    --run.device cpu --log.tensorboard false --optim.lr 0.001
""".split()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Something-Something V1 in its layout: frame folders by number, official CSV files."""
    from PIL import Image

    root, lists = tmp_path_factory.mktemp("frames"), tmp_path_factory.mktemp("lists")
    labels = ROOT / "tests" / "data" / "label_maps" / "something_v1.txt"
    names = labels.read_text(encoding="utf-8").splitlines()
    rng = np.random.default_rng(0)
    rows = {"train": [], "validation": []}
    for video in range(1, 25):
        (root / str(video)).mkdir()
        base = rng.integers(0, 255, (12, 15, 3), dtype=np.uint8)
        for number in range(1, 15):
            moved = Image.fromarray(np.roll(base, number, axis=1)).resize((60, 48))
            moved.save(root / str(video) / f"{number:05d}.jpg")
        rows["train" if video <= 16 else "validation"].append(f"{video};{names[video % 5]}")
    prefix = lists / "something-something-v1-"
    Path(f"{prefix}labels.csv").write_text("\n".join(names))
    for key, lines in rows.items():
        Path(f"{prefix}{key}.csv").write_text("\n".join(lines))
    return root, lists


def _import(frames, numbering):
    root, lists = frames
    command = ["data", "import", "sthv1", "--annotations", str(lists), "--media", str(root)]
    assert main([*command, "--numbering", numbering]) == 0
    return ["--data.root", str(root)]


@pytest.mark.parametrize(
    ("name", "numbering", "rows", "recipes"),
    [
        ("tanet_r50_8f_sthv1", "official", 2, 1),
        ("msn_sthv1_8f", "alphabetical", 1, 1),
        ("mas_sthv1_ensemble_2x3", "alphabetical", 1, 2),
        ("ams_sthv1_8f_star_1crop", "alphabetical", 1, 1),
    ],
)
def test_the_whole_chain_of_each_system(frames, tmp_path, capsys, name, numbering, rows, recipes):
    data = _import(frames, numbering)
    out = tmp_path / "out"
    command = ["reproduce", name, *data, "--out", str(out), "--scale", "0.01", *SMALL]
    assert main(command) == 3
    assert "16 videos, the published list has 86017" in capsys.readouterr().err
    assert main([*command, "--accept-data", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert len(report["rows"]) == rows and len(report["runs"]) == recipes
    assert len(report["data_problems"]) == 2
    for row in report["rows"]:
        assert len(row["recipes"]) == recipes
        for key, difference in row["difference"].items():
            assert difference == pytest.approx(
                row["measured"][key] - row["published"][key], abs=0.01
            )
    for run in report["runs"].values():
        assert run["videos"] == {"train": 4, "val": 1} and run["iterations"] == 1
        assert run["deviations"]["model.depth"] == [50, 18]
        assert run["deviations"]["published.init"] == ["imagenet", "random"]
        assert "data.root" not in run["deviations"]
    with pytest.raises(ConfigError, match="such a run measures no row"):
        load_reports([out / "report.json"])
    # The same command finds everything done.
    assert main([*command, "--accept-data"]) == 0
    assert "published" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_reproduce_what_one_does(frames, tmp_path, capsys):
    data = _import(frames, "alphabetical")
    outs = [tmp_path / name for name in ("one", "two")]
    command = ["mas_sthv1_8f_2x3", *data, "--scale", "0.05", *SMALL]
    command.append("--accept-data")
    assert main(["reproduce", *command, "--out", str(outs[0])]) == 0
    capsys.readouterr()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start = [sys.executable, *launcher, "-m", "accel.cli.main", "reproduce", *command]
    start += ["--out", str(outs[1]), "--json"]
    answer = subprocess.run(start, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)  # one rank speaks
    assert report == json.loads((outs[1] / "report.json").read_text())
    assert report["processes"] == 2 and report["rows"][0]["row"] == "mas_sthv1_8f_2x3"
    losses = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (out / "masnet_r50_8f_sthv1/metrics.jsonl" for out in outs)
    ]
    one, two = ([row["loss"] for row in rows if "loss" in row] for rows in losses)
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)  # dropout among it
    # What is wrong is said by one of the two.
    answer = subprocess.run([*start, "--scale", "2"], capture_output=True, text=True, cwd=ROOT)
    ours, _, _ = answer.stderr.partition("Traceback")  # of torchrun, which repeats it
    assert answer.returncode != 0 and ours.count("--scale: must be in (0, 1]") == 1


def test_a_dry_run_measures_and_writes_nothing(frames, tmp_path, capsys):
    data = _import(frames, "alphabetical")
    out = tmp_path / "out"
    capsys.readouterr()
    command = ["reproduce", "mas_sthv1_8f_2x3", *data, "--out", str(out), *SMALL]
    assert main([*command, "--accept-data", "--dry-run", "--json"]) == 0
    (preview,) = json.loads(capsys.readouterr().out)
    assert preview["total_steps"] == 70 * (16 // 4)
    assert preview["test_views"] == 8 * 6 and preview["protocols"] == ["2x3"]
    assert preview["train"].startswith("accel train --recipe masnet_r50_8f_sthv1 --data.root ")
    assert preview["disk_gib"] > 0 and preview["train_hours"] > 0
    assert not out.exists()


def test_a_dry_run_without_data_says_what_is_needed(frames, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["reproduce", "mas_sthv1_ensemble_2x3", "--out", str(out), "--dry-run"]
    assert main(command) == 2
    text, error = capsys.readouterr()
    assert "Something-Something V1: 174 classes, 86017 training videos and 11522 val" in text
    assert "https://www.qualcomm.com/" in text and "resnet50-19c8e357.pth" in text
    assert "accel data import sthv1 --annotations FOLDER --media ROOT (" in text
    assert f"accel evaluate {out}/masnet_r50_8f_sthv1 --protocol 2x3\n" in text
    assert text.count("accel ensemble ") == 2 and "--numbering" not in text
    assert error.startswith(
        "error: data.root: expected the folder of Something-Something V1, got ''; pass --data.root "
        "ROOT (its lists are made by: accel data import sthv1 --annotations FOLDER --media ROOT)."
    )
    weights = ["--model.pretrained", str(tmp_path / "no.pth")]
    data = ["--data.root", str(tmp_path), *weights]
    assert main(["reproduce", "tanet_r50_8f_sthv1", *data, "--dry-run", "--json"]) == 3
    text, error = capsys.readouterr()
    (step,) = json.loads(text)
    assert step["lists"].startswith("accel data import sthv1 ") and "g official (" in step["lists"]
    assert step["weights"].endswith("no.pth, which is missing")
    assert f"--recipe tanet_r50_8f_sthv1 {' '.join(data)} --out runs/reprod" in step["train"]
    assert f"{tmp_path}: lacks train.txt, val.txt, classes.txt; the lists of Some" in error
    assert f"FOLDER --media {tmp_path} --numbering official." in error
    assert main(["reproduce", "tanet_r50_8f_sthv2", "--dry-run"]) == 2
    assert capsys.readouterr().out == "" and not out.exists()


def test_wrong_data_is_named_before_the_first_step(frames, tmp_path, capsys):
    data = _import(frames, "official")
    command = ["--out", str(tmp_path / "out"), *SMALL]
    assert main(["reproduce", "masnet_r50_8f_sthv1", *data, *command]) == 3
    assert "numbered in the official order, the recipe's in the alphabetical" in (
        capsys.readouterr().err
    )
    assert main(["reproduce", "masnet_r50_8f_sthv2", *data, *command]) == 3
    assert "the lists are those of sthv1, the recipe's are sthv2" in capsys.readouterr().err
    assert main(["reproduce", "masnet_r50_16f_k400", *data, *command]) == 3
    assert "expected 400 class names" in capsys.readouterr().err
    assert main(["reproduce", "mas_sthv1_8f_1x1", "--data.root", "/nowhere", *command]) == 3
    assert "expected a folder" in capsys.readouterr().err
    assert main(["reproduce", "demo_motion8", *command]) == 2
    assert main(["reproduce", "mas_sthv1_8f_1x1", *data, "--scale", "0", *command]) == 2
    assert not (tmp_path / "out").exists()


def _report(name, scale=1.0):
    return {
        "rows": [{"row": name, "measured": {"top1": 49.3, "top5": 77.8, "mean_class": 41.0}}],
        "scale": scale,
        "processes": 4,
        "data_problems": [],
        "environment": {"device": "Some GPU"},
        "runs": {"r": {"deviations": {"precision.mode": ["fp32", "bf16"]}}},
    }


def test_the_table_has_every_row_and_what_was_measured(tmp_path):
    table = results_table([_report("mas_sthv1_8f_1x1")])
    assert len(table.splitlines()) == 2 + len(published_rows())
    line = next(line for line in table.splitlines() if line.startswith("| mas_sthv1_8f_1x1 "))
    assert "| 49.2 | 49.3 | 4 x Some GPU (1 deviations) |" in line
    other = next(line for line in table.splitlines() if line.startswith("| ams_gym99_16f "))
    assert other.endswith("| 94.3 (91.9) |  |  |")
    path = tmp_path / "r.md"
    path.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    insert_table(path, table)
    insert_table(path, table)
    assert path.read_text() == f"a\n{BEGIN}\n\n{table}\n{END}\nb\n"
    path.write_text("no markers")
    with pytest.raises(ConfigError, match="one pair of the lines"):
        insert_table(path, table)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory."),
        ("{", "is no JSON text: Expecting property name"),
        ('{"scale": 1}', "is not a report of accel reproduce, which has scale, rows and"),
        ("[]", "is not a report of accel reproduce"),
        (json.dumps(_report("mas_sthv1_8f_1x1", 0.1)), "is of --scale 0.1; such a run measures"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, capsys, content, problem):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert main(["results", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: {problem}")


def test_the_readme_holds_the_generated_table(tmp_path):
    reports = load_reports(sorted((ROOT / "profile" / "results").glob("reproduce-*.json")))
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    insert_table(copy, results_table(reports))
    assert copy.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
