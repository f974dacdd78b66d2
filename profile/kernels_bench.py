"""Bandwidth of each operator at the sites of ResNet-50, against a copy, eager and compiled PyTorch.

    python profile/kernels_bench.py                        # CPU: the C++ twins
    python profile/kernels_bench.py --ops mas_fuse,bn_act --quick
    python profile/kernels_bench.py --device cuda --batch 16 --compile --json

Each operator has a file in profile/kernel_cases; see profile/README.md for the columns.
"""

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can load this file as a module

from kernel_cases.case import Case, Code, Setting

# (channels, H = W) of the temporal modules in ResNet-50 at 224 x 224: after conv1 of each block.
SITES = [(64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)]
QUICK_SITES = [(64, 56), (256, 14), (512, 7)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPS = sorted(
    path.stem for path in Path(__file__).parent.glob("kernel_cases/*.py") if path.stem != "case"
)
CACHE_BYTES = 256 * 2**20  # written before each CUDA launch, so that it starts with a cold L2


@dataclass(frozen=True)
class Row:
    """One measurement. Bandwidths are floor bytes by median time, in 10^9 bytes per second."""

    op: str
    form: str
    channels: int
    size: int
    direction: str
    implementation: str
    median_us: float
    best_us: float
    gb_s: float
    copy_gb_s: float
    of_copy: float


class Timer:
    """Times calls on one device, each from a cold L2 cache on CUDA."""

    def __init__(self, device: str, warmups: int, repeats: int) -> None:
        self.device, self.warmups, self.repeats = device, warmups, repeats
        self.cache = torch.empty(CACHE_BYTES if device == "cuda" else 0, dtype=torch.int8).to(
            device
        )

    def __call__(self, function: Callable[[], object]) -> tuple[float, float]:
        """Median and shortest time in seconds."""
        measure = self._cuda if self.device == "cuda" else self._cpu
        times = [measure(function) for _ in range(self.warmups + self.repeats)][self.warmups :]
        return statistics.median(times), min(times)

    def _cpu(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def _cuda(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()  # also keeps the GPU busy while the host queues the calls below
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_rate(timer: Timer, case: Case) -> float:
    """GB/s of a device copy of the case's largest input, read and write counted."""
    tensors = [x for code in case.codes.values() for x in code.inputs if x is not None]
    source = max(tensors, key=lambda x: x.numel() * x.element_size()).detach()
    target = torch.empty_like(source)
    seconds, _ = timer(lambda: target.copy_(source))
    return 2 * source.numel() * source.element_size() / seconds / 1e9


def calls_of(case: Case, code: Code) -> dict[str, Callable[[], object]]:
    """What is timed: the forward pass, and the backward pass of one forward pass."""
    inputs = [
        x.detach().requires_grad_("backward" in case.floor_bytes and x.is_floating_point())
        if x is not None
        else None
        for x in code.inputs
    ]
    calls: dict[str, Callable[[], object]] = {"forward": lambda: code.function(*inputs)}
    if "backward" in case.floor_bytes:
        outputs = code.function(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        grads = [torch.randn_like(y) for y in outputs]
        calls["backward"] = lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    return calls


def measure(timer: Timer, case: Case, compiled: bool) -> Iterator[Row]:
    """All implementations of one case, and the compiled reference if wanted."""
    copy_gb_s = copy_rate(timer, case)
    codes = dict(case.codes)
    if compiled:
        reference = codes["reference"]
        codes["compile"] = Code(torch.compile(reference.function), reference.inputs)
    for name, code in codes.items():
        for direction, call in calls_of(case, code).items():
            median, best = timer(call)
            gb_s = case.floor_bytes[direction] / median / 1e9
            site = (case.op, case.form, case.channels, case.size, direction, name)
            yield Row(*site, median * 1e6, best * 1e6, gb_s, copy_gb_s, gb_s / copy_gb_s)


def environment(args: argparse.Namespace) -> dict[str, object]:
    """What the numbers depend on."""
    cuda = args.device == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("dtype", "batch", "num_segments")},
        **{name: getattr(args, name) for name in ("warmups", "repeats")},
        "cold_l2": cuda,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on CUDA, fp32 on CPU")
    parser.add_argument("--batch", type=int, help="clips; default: 8 on CUDA, 1 on CPU")
    parser.add_argument("--num-segments", type=int, default=8, help="frames of a clip")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--warmups", type=int, help="default: 20 on CUDA, 1 on CPU")
    parser.add_argument("--repeats", type=int, help="default: 100 on CUDA, 5 on CPU")
    parser.add_argument("--ops", default=",".join(OPS), help="default: all; %(default)s")
    parser.add_argument("--compile", action="store_true", help="also the compiled reference")
    parser.add_argument("--quick", action="store_true", help="three of the seven sites")
    parser.add_argument("--json", action="store_true", help="JSON as the last line of stdout")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: this process sees no CUDA device.")
    args.ops = args.ops.split(",")
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"--ops: unknown {', '.join(sorted(unknown))}; one of {', '.join(OPS)}")
    args.dtype = args.dtype or ("fp16" if cuda else "fp32")
    args.batch = args.batch or (8 if cuda else 1)
    args.warmups = args.warmups or (20 if cuda else 1)
    args.repeats = args.repeats or (100 if cuda else 5)
    return args


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    timer = Timer(args.device, args.warmups, args.repeats)
    setting = Setting(
        device=args.device,
        backend="cuda" if args.device == "cuda" else "cpp",
        dtype=DTYPES[args.dtype],
        batch=args.batch,
        num_segments=args.num_segments,
        sites=QUICK_SITES if args.quick else SITES,
    )
    facts = environment(args)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(
        "operator         form          C   HxW direction code      median us    best us     GB/s "
        "of copy"
    )
    rows = []
    for op in args.ops:
        for case in importlib.import_module(f"kernel_cases.{op}").cases(setting):
            for row in measure(timer, case, args.compile):
                rows.append(row)
                print(
                    f"{row.op:16} {row.form:9} {row.channels:5} {row.size:2}x{row.size:2} "
                    f"{row.direction:9} {row.implementation:9} {row.median_us:9.1f} "
                    f"{row.best_us:10.1f} {row.gb_s:8.1f} {row.of_copy:7.0%}",
                    flush=True,
                )
    if args.json:
        print(json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
