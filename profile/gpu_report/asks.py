"""What is asked of a GPU, beside what this report measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Operator: least share of a copy's bandwidth, forward and backward, at sites of a million elements.
BANDWIDTH = {
    "temporal_taps": 0.85,
    "branch_fuse": 0.85,
    "ingest": 0.85,
    "mas_fuse": 0.75,
    "diff_gate_shift": 0.75,
}
LARGE_SITE = 1_000_000  # elements of the activation
# Network: most time of a step, in those of TSN.
STEP = {"tsm": 1.04, "tanet": 1.06, "masnet": 1.10, "tdn": 1.20, "amsnet": 1.45, "msn": 1.85}
# Network: most memory of a step of 8 clips, 10^9 bytes.
MEMORY_GB = {"tsn": 3.8, "tsm": 3.8, "tanet": 3.8, "masnet": 3.8, "tdn": 3.8, "msn": 6.0}
SPEEDUP = 4.0  # of TANet, fp16 and fused, over plain fp32 in NCHW
DATA_WAIT = 0.02  # of a step's time, TANet-R50 on prepared H.264
HEADS = 1.4  # times the micro-tubes/s of the gathered form
NORM_GAIN = 0.05  # of a whole step, by which the fused batch norm pays for itself


@dataclass(frozen=True)
class Ask:
    """One line of the table."""

    what: str
    asked: str
    measured: str
    met: bool | None
    """None: not measured."""


def asks(report: dict[str, Any]) -> list[Ask]:
    """All of them, in the order of importance."""
    return [
        *_steps(report),
        *_speedup(report),
        *_memory(report),
        *_bandwidth(report),
        *_input(report),
        *_norm(report),
        *_heads(report),
    ]


def _models(report: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in report.get(section, {}).get("models", [])}


def _ask(what: str, asked: str, value: float | None, text: str, met: bool) -> Ask:
    return Ask(
        what, asked, "not measured" if value is None else text, None if value is None else met
    )


def _steps(report: dict[str, Any]) -> Iterator[Ask]:
    precision = "fp16" if _models(report, "step_fp16") else "bf16"
    rows = _models(report, f"step_{precision}")
    for name, most in STEP.items():
        ratio = rows.get(name, {}).get("ratio_to_tsn")
        what = f"step of {name} in steps of TSN, {precision}"
        yield _ask(what, f"<= {most:.2f}", ratio, f"{ratio}", ratio is not None and ratio <= most)


def _speedup(report: dict[str, Any]) -> Iterator[Ask]:
    fast = _models(report, "step_fp16").get("tanet", {}).get("clips_per_s")
    slow = _models(report, "step_fp32_nchw").get("tanet", {}).get("clips_per_s")
    ratio = fast / slow if fast and slow else None
    what = "clips/s of tanet, fp16 and fused, in those of plain fp32 NCHW"
    text = f"{ratio:.2f} ({fast:.0f} / {slow:.0f})" if ratio else ""
    yield _ask(what, f">= {SPEEDUP:.1f}", ratio, text, bool(ratio and ratio >= SPEEDUP))


def _memory(report: dict[str, Any]) -> Iterator[Ask]:
    rows = _models(report, "memory")
    for name, most in MEMORY_GB.items():
        peak = rows.get(name, {}).get("peak_gib")
        size = None if peak is None else peak * 2**30 / 1e9
        what = f"memory of {name} at 8 clips, fp16"
        text = "" if size is None else f"{size:.2f} GB"
        yield _ask(what, f"<= {most:.1f} GB", size, text, size is not None and size <= most)


def _bandwidth(report: dict[str, Any]) -> Iterator[Ask]:
    section = report.get("kernels", {})
    facts = section.get("environment", {})
    images = facts.get("batch", 0) * facts.get("num_segments", 0)
    for op, least in BANDWIDTH.items():
        rows = [
            row
            for row in section.get("rows", [])
            if (row["op"], row["implementation"]) == (op, "cuda")
            and images * row["channels"] * row["size"] ** 2 >= LARGE_SITE
        ]
        worst = min(rows, key=lambda row: float(row["of_copy"]), default=None)
        share = worst["of_copy"] if worst else None
        text = f"{share:.0%} ({_site(worst)}; least of {len(rows)})" if worst else ""
        what = f"bandwidth of {op} in that of a copy"
        yield _ask(what, f">= {least:.0%}", share, text, share is not None and share >= least)


def _site(row: dict[str, Any]) -> str:
    return f"{row['form']} {row['channels']} x {row['size']}^2 {row['direction']}"


def _input(report: dict[str, Any]) -> Iterator[Ask]:
    rows = [row for row in report.get("data_wait", {}).get("data_wait", []) if "data_wait" in row]
    best = min(rows, key=lambda row: float(row["data_wait"]), default=None)
    share = best["data_wait"] if best else None
    text = f"{share:.1%} ({best['loader']})" if best else ""
    what = "data wait of tanet on prepared H.264, fp16"
    yield _ask(what, f"< {DATA_WAIT:.0%}", share, text, share is not None and share < DATA_WAIT)
    section = report.get("decoder_frames", {})
    frames = section.get("frames", [])
    wrong = sum(row["wrong_frames"] for row in frames) if frames else None
    far = max((row["mean_difference"] for row in frames), default=0.0)
    good = sum(row["same"] for row in frames)
    failed = section.get("failures", 0) - (len(frames) - good)
    text = f"{wrong} of {sum(row['frames'] for row in frames)}, {far:.1f} levels away at most"
    text += f"; files that could not be decoded: {failed}" if failed else ""
    what = "wrong frames of NVDEC, compared with PyAV"
    yield _ask(what, "0", wrong, text, good == len(frames) and not failed)


def _norm(report: dict[str, Any]) -> Iterator[Ask]:
    rows = _models(report, "step_batch_norm")
    for name in ("tsn", "tanet"):
        codes = {key: row["step_ms"] for key, row in rows.items() if key.startswith(f"{name}@")}
        others = [ms for key, ms in codes.items() if key.startswith(f"{name}@torch")]
        ours = [ms for key, ms in codes.items() if key.startswith(f"{name}@fused")]
        gain = 1 - min(ours) / min(others) if ours and others else None
        text = f"{gain:.1%}" if gain is not None else ""
        what = f"time that the fused batch norm saves in a step of {name}"
        met = gain is not None and gain >= NORM_GAIN
        yield _ask(what, f">= {NORM_GAIN:.0%}, else it stays off", gain, text, met)


def table(rows: Sequence[Ask]) -> list[str]:
    """Markdown lines."""
    met = {True: "yes", False: "no", None: ""}
    lines = ["| asked for | ask | measured | met |", "|---|---|---|---|"]
    return lines + [f"| {a.what} | {a.asked} | {a.measured} | {met[a.met]} |" for a in rows]


def _heads(report: dict[str, Any]) -> Iterator[Ask]:
    ratio = report.get("amtnet", {}).get("heads", {}).get("ratio")
    yield _ask(
        "AMTNet's heads as convolutions over the gathered form, micro-tubes/s",
        f">= {HEADS}",
        ratio,
        f"{ratio or 0:.2f}",
        (ratio or 0) >= HEADS,
    )
