"""Time of whole training steps, per network and beside TSN: compute alone, loader alone, or both.

    python profile/step.py --models tanet,tdn --batch 2 --steps 20             # this CPU
    python profile/step.py --device cuda --precision bf16 --batch 64 --json    # every network
    python profile/step.py --mode loader --models tanet,tdn --size 64 --batch 16
    python profile/step.py --models tsn@torch,tsn@fused,tsn@torch+compile  # implementations

A step is what training does: normalize the stored pixels, forward, loss, backward, clip the
gradients, fused SGD. TSN and a copy of 256 MB run in the same process, and the networks take turns
(A, B, A, B, ..), so that whatever else the machine does hits all of them. See profile/README.md.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from accel.engine.config import Recipe, resolved_sampling
from accel.engine.distributed import World
from accel.engine.graphs import DeviceGraphs
from accel.engine.memory import keep_freed_memory
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.run import environment
from accel.engine.seeding import seed_everything, set_deterministic
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.errors import ConfigError
from accel.models import ModelConfig, build_model, list_models
from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import DataError
from pipelines.loader import Batch, Loader, build_loader

NUM_CLASSES = 174  # of the random labels in compute mode
COPY_BYTES = 256 * 2**20
GEMM_SIDE = 4096
ROUNDS = 5  # turns of each network in the modes with a loader
SKIPPED = 4  # batches at the start of such a turn: the loader fills its queue meanwhile


@dataclass
class Times:
    """Times of one thing that was repeated, milliseconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of all threads of this process."""

    def summary(self) -> dict[str, float]:
        """Median, 10 % and 90 % quantiles and minimum of the wall times; the CPU times alike."""
        ordered = sorted(self.wall)
        last = len(ordered) - 1
        values = {
            "step_ms": statistics.median(ordered),
            "p10_ms": ordered[round(0.1 * last)],
            "p90_ms": ordered[round(0.9 * last)],
            "min_ms": ordered[0],
            "cpu_ms": statistics.median(self.cpu),
            "cpu_min_ms": min(self.cpu),
        }
        return {key: round(value, 4) for key, value in values.items()}


class Clock:
    """Measures calls: CUDA events on a GPU, the wall clock elsewhere; process time beside it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, times: Times, function: Callable[[], object], count: int = 1) -> None:
        """Add the time of one of `count` units of work that `function` does."""
        cpu = time.process_time()
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            wall = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            function()
            wall = (time.perf_counter() - begin) * 1e3
        times.wall.append(wall / count)
        times.cpu.append((time.process_time() - cpu) * 1e3 / count)


class Network:
    """One network with its optimizer, and what was measured of it."""

    def __init__(self, label: str, args: argparse.Namespace, num_classes: int) -> None:
        wanted, _, mode = label.partition("+")
        wanted, _, batch_norm = wanted.partition("@")
        name, _, variant = wanted.partition(":")
        if name not in list_models():
            known = ", ".join(list_models())
            raise ConfigError(f"--models: unknown network {name!r}; known are {known}.")
        if mode not in ("", "compile", "graph"):
            raise ConfigError(
                f'--models: expected "+compile" or "+graph" at the end, got {label!r}.'
            )
        if mode == "graph" and args.device.type != "cuda":
            raise ConfigError(f"--models: {label}: CUDA graphs need --device cuda.")
        self.compiled = mode == "compile"
        reduced = {"depth": args.depth, "width": args.width, "stages": args.stages}
        chosen = {"variant": variant, "batch_norm": batch_norm}
        options = reduced | {k: v for k, v in chosen.items() if v} | {"stem": args.stem}
        config = ModelConfig(name=name, **options)  # type: ignore[arg-type]
        self.label = label
        self.recipe = Recipe(model=config, sampling=SamplingConfig(num_segments=args.frames))
        data = self.recipe.data
        self.precision = Precision(
            PrecisionConfig(mode=args.precision),
            args.device,
            mean=data.mean,
            std=data.std,
            frames_per_segment=config.frames_per_segment,
        )
        ranges = Ranges("nvtx" if args.nvtx else "off")
        before = _allocated(args.device)
        seed_everything(0, "model")
        self.model = build_model(
            **asdict(config), num_classes=num_classes, num_segments=args.frames
        ).to(args.device)
        self.step = TrainStep(
            self.model,
            Optimizer(self.model, OptimConfig(lr=1e-4)),
            self.precision,
            accumulation=1,
            clip_norm=20.0,
            seed=0,
            world=World(),
            ranges=ranges,
        )
        ranges.mark(self.model.named_parts())
        self.graph = (
            self.step.launch("graph", DeviceGraphs(args.device)) if mode == "graph" else None
        )
        if args.layout == "nchw":
            use_nchw(self.model)
        self.own_bytes = _allocated(args.device) - before
        self.times = Times()
        self.facts: dict[str, Any] = {}
        self.iteration = 0

    @property
    def frames_per_clip(self) -> int:
        """T * L."""
        sampling = resolved_sampling(self.recipe)
        return sampling.num_segments * sampling.frames_per_segment

    def train(self, batches: Iterator[Batch], count: int = 1) -> None:
        """`count` training steps."""
        for _ in range(count):
            self.last = self.step(batches, self.iteration)  # [loss, gradient norm, skipped]
            self.iteration += 1


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def use_nchw(model: torch.nn.Module) -> None:
    """Run all 2-D convolutions in NCHW, as published code does.

    A temporal module still works in channels_last: that costs two layout copies per module, and the
    published ones make two to six.
    """
    for parameter in model.parameters():
        layout = torch.empty(parameter.shape, device=parameter.device, dtype=parameter.dtype)
        parameter.data = layout.copy_(parameter.data)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def machine_rates(args: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """What the ratios of other machines can be compared by: copy bandwidth, matrix product rate."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    half = torch.zeros(GEMM_SIDE, GEMM_SIDE, dtype=torch.float16, device=args.device)
    probes = {"copy_gb_s": (lambda: target.copy_(source), 2 * COPY_BYTES / 1e9)}
    if args.device.type == "cuda":
        probes["gemm_fp16_tflops"] = (lambda: half @ half, 2 * GEMM_SIDE**3 / 1e12)
    rates = {}
    for name, (function, work) in probes.items():
        times = Times()
        for index in range(15):
            clock(times if index >= 5 else Times(), function)
        rates[name] = round(work * 1e3 / statistics.median(times.wall), 2)
    return rates


def measure_compute(networks: list[Network], args: argparse.Namespace, clock: Clock) -> None:
    """Interleaved steps on one random batch per clip length."""
    device = args.device
    clips = {
        length: torch.randint(
            0, 256, (args.batch, length, args.size, args.size, 3), dtype=torch.uint8, device=device
        )
        for length in sorted({network.frames_per_clip for network in networks})
    }
    labels = torch.arange(args.batch, device=device) % NUM_CLASSES
    batches = {
        length: itertools.repeat(Batch(values, labels, labels)) for length, values in clips.items()
    }
    for network in networks:
        own = batches[network.frames_per_clip]
        with FlopCounterMode(display=False) as counter:
            network.train(own)
        if network.compiled:  # not before: the counter sees no operations of compiled code
            network.model.compile()
        network.facts["gflop_per_clip"] = round(counter.get_total_flops() / args.batch / 1e9, 3)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            others = _allocated(device) - network.own_bytes
            network.train(own)
            peak = torch.cuda.max_memory_allocated(device) - others
            network.facts["peak_gib"] = round(peak / 2**30, 3)
    for index in range(args.warmups + args.steps):
        for network in networks:
            step = network.times if index >= args.warmups else Times()
            own = batches[network.frames_per_clip]
            clock(step, lambda network=network, own=own: network.train(own))


def open_loaders(
    networks: list[Network], dataset: Dataset, args: argparse.Namespace
) -> list[Loader]:
    """The training loader of each network."""
    return [
        build_loader(
            dataset,
            split="train",
            sampling=resolved_sampling(network.recipe),
            augment=AugmentConfig(size=args.size, resize=0, flip=False),
            loader=LoaderConfig(threads=args.threads),
            seed=0,
            micro_batch=args.batch,
            global_batch=args.batch,
            device=args.device,
        )
        for network in networks
    ]


def measure_with_loader(
    networks: list[Network], loaders: list[Loader], args: argparse.Namespace, clock: Clock
) -> None:
    """Turns of several batches each, with or without the training step on them."""
    for network in networks:
        if network.compiled:
            network.model.compile()
    count = max(1, args.steps // ROUNDS)
    for turn in range(ROUNDS):
        for network, loader in zip(networks, loaders, strict=True):
            epochs = (loader.epoch(epoch) for epoch in itertools.count(1000 * turn))
            batches = itertools.chain.from_iterable(epochs)

            def run(count: int, network: Network = network, batches: Any = batches) -> None:
                if args.mode == "train":
                    network.train(batches, count)
                else:
                    for _ in range(count):
                        next(batches)

            run(SKIPPED)
            waited = network.step.data_wait.total_s
            clock(network.times, lambda run=run: run(count), count)
            if args.mode == "train":
                waited = network.step.data_wait.total_s - waited
                network.facts["data_wait"] = round(waited * 1e3 / count / network.times.wall[-1], 4)
            loader.close()


def results(networks: list[Network], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per network; ratios are to TSN of the same run."""
    base = networks[0].times.summary()
    rows = []
    for network in networks:
        times = network.times.summary()
        row = {"model": network.label, **times}
        row["clips_per_s"] = round(args.batch * 1e3 / times["step_ms"], 3)
        for key in ("step_ms", "min_ms", "cpu_ms"):
            suffix = "" if key == "step_ms" else f"_{key.removesuffix('_ms')}"
            row[f"ratio_to_tsn{suffix}"] = round(times[key] / max(base[key], 1e-9), 4)
        if args.mode != "loader":
            row["loss"] = round(float(network.last[0]), 4)
            row["parameters"] = sum(p.numel() for p in network.model.parameters())
        if flops := network.facts.get("gflop_per_clip"):
            network.facts["tflops"] = round(flops * row["clips_per_s"] / 1e3, 4)
        if network.graph is not None and network.graph.problem:
            network.facts["graph_problem"] = network.graph.problem  # its steps ran eagerly
        rows.append({**row, **network.facts})
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mode", choices=["compute", "loader", "train"], default="compute")
    add(
        "--models",
        default="",
        help="comma-separated, name[:variant][@batch_norm][+compile|+graph]; default: all",
    )
    add("--frames", type=int, default=8, help="segments per clip (T)")
    add("--size", type=int, default=224, help="height and width, px")
    add("--batch", type=int, help="clips per step; default: CPU 2, CUDA 8 to 64 by its memory")
    add("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--layout", choices=["channels_last", "nchw"], default="channels_last")
    add("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    add("--warmups", type=int, default=-1, help="default: 20 on CUDA, 1 on the CPU")
    add("--steps", type=int, default=0, help="per network; default: 100, compute on the CPU: 10")
    add("--data", default="", help="folder of class folders for loader, train; default: motion8")
    add("--depth", type=int, default=50, help="layers of the ResNet")
    add("--width", type=int, default=64, help="channels of the stem")
    add("--stages", type=int, default=4, help="ResNet stages")
    add("--stem", default="imagenet", help="imagenet or small")
    add("--nvtx", action="store_true", help="mark the parts of a step for nsys")
    add("--json", action="store_true", help="JSON as the last line of stdout")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ConfigError(f"--device: torch {torch.__version__} sees no CUDA device; use cpu.")
    if args.batch is None:
        args.batch = _batch_that_fits(args.precision) if cuda else 2
    positive = {name: getattr(args, name) for name in ("frames", "size", "batch")}
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"--{name}: expected a number >= 1, got {value}.")
    args.warmups = args.warmups if args.warmups >= 0 else (20 if cuda else 1)
    args.steps = args.steps or (100 if cuda or args.mode != "compute" else 10)
    args.device = torch.device(args.device)
    return args


def _batch_that_fits(precision: str) -> int:
    """Clips per step for the largest network at 8 x 224 x 224."""
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if precision in ("fp32", "tf32"):
        gib = gib if gib > 120 else gib / 2
    return 64 if gib > 70 else 16 if gib > 20 else 8 if gib > 8 else 4


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command reports."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    set_deterministic(False)
    labels = [label for label in args.models.split(",") if label] or list_models()
    dataset = None
    if args.mode != "compute":
        generate = "none" if args.data else "motion8"
        dataset = open_dataset(DataConfig(root=args.data, generate=generate))  # type: ignore[arg-type]
    num_classes = dataset.num_classes if dataset else NUM_CLASSES
    networks = [
        Network(label, args, num_classes) for label in dict.fromkeys(["tsn", *labels])
    ]  # TSN first
    clock = Clock(args.device)
    report: dict[str, Any] = {"environment": environment(args.device)}
    report["settings"] = {**vars(args), "device": args.device.type}
    report["machine"] = machine_rates(args, clock)
    report["load_before"] = os.getloadavg()
    if dataset is None:
        measure_compute(networks, args, clock)
    else:
        loaders = open_loaders(networks, dataset, args)
        report["loader"] = loaders[0].description
        measure_with_loader(networks, loaders, args, clock)
    report["load_after"] = os.getloadavg()
    report["models"] = results(networks, args)
    return report


def table(report: dict[str, Any]) -> str:
    """The rows as text."""
    columns = (
        "step_ms p10_ms p90_ms min_ms cpu_ms clips_per_s ratio_to_tsn ratio_to_tsn_min".split()
    )
    lines = ["model                " + " ".join(f"{name:>12}" for name in columns)]
    for row in report["models"]:
        lines.append(f"{row['model']:20} " + " ".join(f"{row[name]:12.3f}" for name in columns))
    lines.append(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    return "\n".join(lines)


def main() -> int:
    try:
        args = parse_args()
        report = measure(args)
    except (ConfigError, DataError, ValueError) as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
