"""Time of whole training steps, per network and beside TSN: compute alone, loader alone, or both.

    python profile/step.py --models tanet,tdn --batch 2 --steps 20             # this CPU
    python profile/step.py --device cuda --precision bf16 --batch 64 --json    # every network
    python profile/step.py --mode loader --models tanet,tdn --size 64 --batch 16
    python profile/step.py --models tsn@torch,tsn@fused,tsn@torch+compile  # implementations

A step is what training does: normalize the stored pixels, forward, loss, backward, clip the
gradients, fused SGD. The networks take turns with TSN (A, B, A, B, ..), so that whatever else the
machine does hits all of them, and a copy of 256 MB is measured beside them. See profile/README.md.

On a CPU every network of "compute" has a process of its own, as in training, and takes its turns
with TSN alone, which is measured anew beside each. In one process, networks would allocate from one
heap: blocks that one frees do not fit the next, and its pages are mapped and cleared anew in every
step, which costs the networks with many maps most and no training run at all.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from accel.engine.config import Recipe, resolved_sampling
from accel.engine.distributed import World
from accel.engine.graphs import DeviceGraphs
from accel.engine.memory import keep_freed_memory
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.run import environment, resolve_device
from accel.engine.seeding import seed_everything, set_deterministic
from accel.engine.step import TrainStep
from accel.engine.timing import Ranges
from accel.errors import AccelError, ConfigError
from accel.models import ModelConfig, build_model, list_models
from pipelines.config import AugmentConfig, DataConfig, LoaderConfig, SamplingConfig
from pipelines.datasets import Dataset, open_dataset
from pipelines.errors import DataError
from pipelines.loader import Batch, Loader, build_loader

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can load this file as a module

from step_turns import Clock, NetworkProcess, Times

NUM_CLASSES = 174  # of the random labels in compute mode
COPY_BYTES = 256 * 2**20
GEMM_SIDE = 4096
SERVE = "--serve-network"  # what a process of `NetworkProcess` is started with
ROUNDS = 5  # turns of each network in the modes with a loader
SKIPPED = 4  # batches at the start of such a turn: the loader fills its queue meanwhile


def parsed(label: str, args: argparse.Namespace) -> tuple[ModelConfig, str]:
    """The network that a label of --models stands for, and how it runs: "", compile or graph."""
    wanted, _, mode = label.partition("+")
    wanted, _, batch_norm = wanted.partition("@")
    name, _, variant = wanted.partition(":")
    if name not in list_models():
        known = ", ".join(list_models())
        raise ConfigError(f"--models: unknown network {name!r}; known are {known}.")
    if mode not in ("", "compile", "graph"):
        raise ConfigError(f'--models: expected "+compile" or "+graph" at the end, got {label!r}.')
    if mode == "graph" and args.device.type != "cuda":
        raise ConfigError(f"--models: {label}: CUDA graphs need --device cuda.")
    reduced = {"depth": args.depth, "width": args.width, "stages": args.stages}
    chosen = {"variant": variant, "batch_norm": batch_norm}
    options = reduced | {k: v for k, v in chosen.items() if v} | {"stem": args.stem}
    return ModelConfig(name=name, **options), mode  # type: ignore[arg-type]


class SharedGraphs(DeviceGraphs):
    """CUDA graphs of networks that take turns: one memory pool holds the activations of all.

    Their replays keep the order of their captures, and no step reads what an earlier one left.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pool = super().new_pool()

    def new_pool(self) -> object:
        """The same for every network; the first one keeps it in use."""
        return self._pool


class Network:
    """One network with its optimizer, and what was measured of it.

    Args:
        label: of --models.
        args: of the command.
        num_classes: outputs.
        graphs: of all networks whose label asks for them.
    """

    def __init__(
        self,
        label: str,
        args: argparse.Namespace,
        num_classes: int,
        graphs: DeviceGraphs | None = None,
    ) -> None:
        config, mode = parsed(label, args)
        self.compiled = mode == "compile"
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
        self.graph = self.step.launch("graph", graphs) if mode == "graph" else None
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

    def described(self) -> dict[str, Any]:
        """What is known besides times, after the last step."""
        known: dict[str, Any] = {
            "loss": round(float(self.last[0]), 4),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        if self.graph is not None and self.graph.problem:
            known["graph_problem"] = self.graph.problem  # its steps ran eagerly
        return known | self.facts


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


def own_batches(network: Network, args: argparse.Namespace) -> Iterator[Batch]:
    """One random batch of the network's clip length, for ever."""
    shape = (args.batch, network.frames_per_clip, args.size, args.size, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=args.device)
    labels = torch.arange(args.batch, device=args.device) % NUM_CLASSES
    return itertools.repeat(Batch(clips, labels, labels))


def count_work(network: Network, batches: Iterator[Batch], args: argparse.Namespace) -> None:
    """Count operations and memory of a step, and compile the network if that is asked for."""
    with FlopCounterMode(display=False) as counter:
        network.train(batches)
    if network.compiled:  # not before: the counter sees no operations of compiled code
        network.model.compile()
    network.facts["gflop_per_clip"] = round(counter.get_total_flops() / args.batch / 1e9, 3)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
        others = _allocated(args.device) - network.own_bytes
        network.train(batches)
        peak = torch.cuda.max_memory_allocated(args.device) - others
        network.facts["peak_gib"] = round(peak / 2**30, 3)


def measure_compute(networks: list[Network], args: argparse.Namespace, clock: Clock) -> None:
    """Interleaved steps in this process, each network on its own random batch."""
    batches = [own_batches(network, args) for network in networks]
    for network, own in zip(networks, batches, strict=True):
        count_work(network, own, args)
    for index in range(args.warmups + args.steps):
        for network, own in zip(networks, batches, strict=True):
            times = network.times if index >= args.warmups else Times()
            clock(times, lambda network=network, own=own: network.train(own))


def serve(label: str, args: argparse.Namespace) -> None:
    """The other side of `NetworkProcess`: a process that does steps of one network."""
    prepare(args)
    network = Network(label, args, NUM_CLASSES)
    batches = own_batches(network, args)
    count_work(network, batches, args)
    clock = Clock(args.device)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        times = Times()
        clock(times, lambda: network.train(batches))
        print(json.dumps([times.wall[0], times.cpu[0], network.described()]), flush=True)


def measure_in_processes(labels: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of TSN and of the labels, each of which takes turns with TSN."""
    settings = json.dumps(vars(args) | {"device": args.device.type})

    def start(label: str) -> NetworkProcess:
        process = NetworkProcess(label, [sys.executable, __file__, SERVE, label, settings])
        stack.callback(process.close)
        return process

    base_times, rows = Times(), []
    with ExitStack() as stack:
        base = start("tsn")
        for label in labels or ["tsn"]:
            network = start(label) if labels else base
            beside, times = Times(), Times()
            for index in range(args.warmups + args.steps):
                measured = index >= args.warmups
                if measured or not base_times.wall:  # TSN is warm from the second network on
                    base.step(beside if measured else Times())
                if network is not base:
                    network.step(times if measured else Times())
            base_times.wall += beside.wall
            base_times.cpu += beside.cpu
            if network is not base:
                rows.append(row(label, times, beside, network.facts, args))
                network.close()
        return [row("tsn", base_times, base_times, base.facts, args), *rows]


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


def row(
    label: str, own: Times, base: Times, facts: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Results of one network; ratios are to `base`, the times of TSN."""
    times, base_times = own.summary(), base.summary()
    values: dict[str, Any] = {"model": label, **times}
    values["clips_per_s"] = round(args.batch * 1e3 / times["step_ms"], 3)
    for key in ("step_ms", "min_ms", "cpu_ms"):
        suffix = "" if key == "step_ms" else f"_{key.removesuffix('_ms')}"
        values[f"ratio_to_tsn{suffix}"] = round(times[key] / max(base_times[key], 1e-9), 4)
    values |= facts
    if flops := facts.get("gflop_per_clip"):
        values["tflops"] = round(flops * values["clips_per_s"] / 1e3, 4)
    return values


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
    add("--warmups", type=int, default=-1, help="default: 20 on CUDA, 3 on the CPU")
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
    args.warmups = args.warmups if args.warmups >= 0 else (20 if cuda else 3)
    args.steps = args.steps or (100 if cuda or args.mode != "compute" else 10)
    args.device = resolve_device(args.device)
    return args


def _batch_that_fits(precision: str) -> int:
    """Clips per step for the largest network at 8 x 224 x 224."""
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if precision in ("fp32", "tf32"):
        gib = gib if gib > 120 else gib / 2
    return 64 if gib > 70 else 16 if gib > 20 else 8 if gib > 8 else 4


def prepare(args: argparse.Namespace) -> None:
    """Settings of a process that trains."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cpu":
        keep_freed_memory()
    set_deterministic(False)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command reports."""
    prepare(args)
    labels = [label for label in args.models.split(",") if label] or list_models()
    labels = [label for label in dict.fromkeys(labels) if label != "tsn"]
    for label in labels:
        parsed(label, args)  # refuse what is wrong before anything runs
    clock = Clock(args.device)
    report: dict[str, Any] = {"environment": environment(args.device)}
    report["settings"] = {**vars(args), "device": args.device.type}
    report["machine"] = machine_rates(args, clock)
    report["load_before"] = os.getloadavg()
    if args.mode == "compute" and args.device.type == "cpu":
        rows = measure_in_processes(labels, args)
    else:
        networks = measure_here(["tsn", *labels], args, clock, report)
        rows = [
            row(
                network.label,
                network.times,
                networks[0].times,
                network.facts if args.mode == "loader" else network.described(),
                args,
            )
            for network in networks
        ]
    report["load_after"] = os.getloadavg()
    report["models"] = rows
    return report


def measure_here(
    labels: list[str], args: argparse.Namespace, clock: Clock, report: dict[str, Any]
) -> list[Network]:
    """The networks, measured in this process."""
    dataset = None
    if args.mode != "compute":
        generate = "none" if args.data else "motion8"
        dataset = open_dataset(DataConfig(root=args.data, generate=generate))  # type: ignore[arg-type]
    num_classes = dataset.num_classes if dataset else NUM_CLASSES
    graphed = any(parsed(label, args)[1] == "graph" for label in labels)
    graphs = SharedGraphs(args.device) if graphed else None
    networks = [Network(label, args, num_classes, graphs) for label in labels]
    if dataset is None:
        measure_compute(networks, args, clock)
    else:
        loaders = open_loaders(networks, dataset, args)
        report["loader"] = loaders[0].description
        measure_with_loader(networks, loaders, args, clock)
    return networks


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
    if sys.argv[1:2] == [SERVE]:
        label, settings = sys.argv[2:]
        args = argparse.Namespace(**json.loads(settings))
        args.device = torch.device(args.device)
        serve(label, args)
        return 0
    try:
        args = parse_args()
        report = measure(args)
    except (AccelError, DataError, ValueError, ChildProcessError) as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
