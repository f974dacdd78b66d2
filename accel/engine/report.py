"""What a finished run says of itself: summary text, comparison with its twin, curves."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import yaml

from accel.engine.checkpoint import write_atomically
from accel.engine.journal import read_journal

logger = logging.getLogger(__name__)


def summary_text(summary: dict[str, Any], run_folder: Path) -> str:
    """The lines shown at the end of a run."""
    if "val_video_map_50" in summary:
        return _detection_text(summary, run_folder)
    lines = [
        f"{summary['recipe']}: {summary['iterations']} steps in {summary['wall_s']:.0f} s",
        f"  val top-1 {summary['val_top1']:.3f}  top-5 {summary['val_top5']:.3f}  "
        f"mean class {summary['val_mean_class']:.3f}  loss {summary['val_loss']:.3f}  "
        f"({summary['val_num_clips']} clips, {summary['num_classes']} classes, "
        f"chance {1 / summary['num_classes']:.3f})",
        f"  {summary['clips_per_s']:.1f} clips/s, data wait {100 * summary['data_wait']:.1f} %",
    ]
    if unusable := summary.get("unusable"):
        named = "; ".join(f"{video['path']}: {video['reason']}" for video in unusable[:3])
        more = "; ..." if len(unusable) > 3 else ""
        lines.append(f"  unusable videos: {len(unusable)} (see quarantine.csv): {named}{more}")
    if missing := summary.get("val_num_missing"):
        lines.append(f"  validation videos that cannot be read, counted as wrong: {missing}")
    if gpu := summary.get("gpu"):
        lines.append(
            "  " + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in gpu.items())
        )
    if (summary["best_val_top1"] or 0.0) > summary["val_top1"]:
        lines.append(
            f"  best val top-1 {summary['best_val_top1']:.3f} ({summary['best_checkpoint']}); "
            "chosen on the validation set itself"
        )
    lines += [f"  {line}" for line in network_comparison(run_folder)]
    lines += [f"  checkpoint {summary['checkpoint']}", f"  curves {run_folder / 'curves.png'}"]
    return "\n".join(lines)


def _detection_text(summary: dict[str, Any], run_folder: Path) -> str:
    return "\n".join(
        [
            f"{summary['recipe']}: {summary['iterations']} steps in {summary['wall_s']:.0f} s",
            f"  video-mAP@0.2 {summary['val_video_map_20']:.3f}  "
            f"@0.5 {summary['val_video_map_50']:.3f}  @0.75 {summary['val_video_map_75']:.3f}  "
            f"@0.5:0.95 {summary['val_video_map_50_95']:.3f}",
            f"  frame-mAP@0.5 {summary['val_frame_map_50']:.3f}  accuracy "
            f"{summary['val_accuracy']:.3f}  ({summary['val_num_videos']} videos, "
            f"{summary['num_classes']} classes)",
            f"  {summary['clips_per_s']:.1f} micro-tubes/s, data wait "
            f"{100 * summary['data_wait']:.1f} %",
            f"  checkpoint {summary['checkpoint']}",
            f"  curves {run_folder / 'curves.png'}",
        ]
    )


def network_comparison(run_folder: Path) -> list[str]:
    """One line on finished runs beside this one that differ from it in the network only."""
    own = _finished(run_folder)
    if own is None:
        return []
    results = {own[1]: own[2]}
    try:
        folders = sorted(run_folder.resolve().parent.iterdir())
    except OSError:  # the parent may be closed to us
        return []
    for folder in folders:
        other = _finished(folder) if folder != run_folder.resolve() else None
        if other is not None and other[0] == own[0]:
            results.setdefault(other[1], other[2])
    if len(results) < 2:
        return []
    listed = ", ".join(f"{name} {top1:.3f}" for name, top1 in sorted(results.items()))
    return [f"val top-1 by network, same recipe otherwise: {listed}"]


def _finished(folder: Path) -> tuple[str, str, float] | None:
    """(recipe without the network's name, network, val top-1) of a finished run, or None."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        network, temporal = (str(recipe["model"].pop(key)) for key in ("name", "temporal"))
        if temporal == "none":
            network += " without temporal module"
        for section in ("loader", "checkpoint", "log"):
            recipe.pop(section)
        return json.dumps(recipe, sort_keys=True), network, float(summary["val_top1"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def draw_curves(journal: Path, picture: Path) -> None:
    """Loss, learning rate and validation accuracy over the iterations, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_journal(journal)
    steps = [row for row in rows if "event" not in row]
    evaluations = [row for row in rows if row.get("event") == "eval"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    iterations = [row["iteration"] for row in steps]
    left.plot(iterations, [row["loss"] for row in steps], linewidth=0.8, label="train loss")
    done = [row["iteration"] for row in evaluations]
    detection = any("val_video_map_50" in row for row in evaluations)
    rating, name = ("val_video_map_50", "video-mAP@0.5") if detection else ("val_top1", "top-1")
    if not detection:
        left.plot(done, [row["val_loss"] for row in evaluations], marker="o", label="val loss")
    left.set(xlabel="iteration", ylabel="MultiBox loss" if detection else "cross-entropy, nats")
    left.legend()
    right.plot(done, [row[rating] for row in evaluations], marker="o", label=f"val {name}")
    right.set(xlabel="iteration", ylabel=name, ylim=(0, 1.02))
    rates = right.twinx()
    rates.plot(iterations, [row["lr"] for row in steps], color="gray", linewidth=0.8)
    rates.set_ylabel("learning rate (gray)")
    right.legend(loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    plt.close(figure)
    write_atomically(picture, content.getvalue())
