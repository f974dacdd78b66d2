"""Bandwidth of each temporal operator at the sites of ResNet-50, against a copy and eager PyTorch.

    python profile/kernels_bench.py                        # CPU: the C++ twins
    python profile/kernels_bench.py --device cuda --batch 16 --json

See profile/README.md for the columns.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

# (channels, H = W) of the temporal modules in ResNet-50 at 224 x 224: after conv1 of each block.
SITES = [(64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)]
QUICK_SITES = [(64, 56), (256, 14), (512, 7)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Form of temporal_taps: (taps per sample, gate).
FORMS = {"tam": (True, True), "shift": (False, False)}
# Passes over one activation tensor that no implementation can avoid.
FLOOR_PASSES = {"forward": 2, "backward": 3}
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


def original_chain(x: Tensor, w: Tensor, a: Tensor | None, num_segments: int) -> Tensor:
    """The computation as published models run it: NCHW copies around a grouped convolution.

    To [N, C, T, H, W], gate, one convolution with N*C groups over a [1, N*C, T, H*W] view, back.
    """
    batch, channels, size = x.shape[0] // num_segments, x.shape[1], x.shape[2:]
    clips = x.view(batch, num_segments, channels, *size).transpose(1, 2).contiguous()
    if a is not None:
        clips = clips * a.transpose(1, 2)[..., None, None]
    taps = w.expand(batch, channels, 3).reshape(batch * channels, 1, 3, 1).to(x.dtype)
    rows = clips.to(x.dtype).view(1, batch * channels, num_segments, -1)
    rows = F.conv2d(rows, taps, padding=(1, 0), groups=batch * channels)
    clips = rows.view(batch, channels, num_segments, *size)
    return clips.transpose(1, 2).reshape(x.shape)


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


def temporal_taps_rows(
    timer: Timer, sites: list[tuple[int, int]], batch: int, num_segments: int, dtype: torch.dtype
) -> Iterator[Row]:
    """Measurements of temporal_taps: operator, eager reference, published chain."""
    for (channels, size), (form, (per_sample, gated)) in itertools.product(sites, FORMS.items()):
        shape = (batch * num_segments, channels, size, size)
        nchw = torch.randn(shape, device=timer.device).to(dtype)
        w = torch.randn((batch, channels, 3) if per_sample else (channels, 3), device=timer.device)
        a = torch.rand(batch, num_segments, channels, device=timer.device) if gated else None
        leaves = [v.requires_grad_() for v in (w, a) if v is not None]
        nhwc = nchw.to(memory_format=torch.channels_last)
        target, bytes_per_pass = torch.empty_like(nhwc), nchw.numel() * nchw.element_size()
        copy_s, _ = timer(lambda t=target, s=nhwc: t.copy_(s))
        copy_gb_s = 2 * bytes_per_pass / copy_s / 1e9

        def taps(x: Tensor, backend: str, w: Tensor = w, a: Tensor | None = a) -> Tensor:
            return kernels.temporal_taps(x, w, a, num_segments=num_segments, backend=backend)

        compiled = "cuda" if timer.device == "cuda" else "cpp"
        implementations = {
            compiled: (nhwc, lambda x, f=taps, backend=compiled: f(x, backend)),
            "reference": (nhwc, lambda x, f=taps: f(x, "reference")),
            "original": (nchw, lambda x, w=w, a=a: original_chain(x, w, a, num_segments)),
        }
        for implementation, (source, function) in implementations.items():
            x = source.detach().requires_grad_()
            y = function(x)
            grad = torch.randn_like(y)
            calls = {
                "forward": lambda f=function, x=x: f(x),
                "backward": lambda y=y, x=x, grad=grad, leaves=leaves: torch.autograd.grad(
                    y, [x, *leaves], grad, retain_graph=True
                ),
            }
            for direction, call in calls.items():
                median, best = timer(call)
                gb_s = FLOOR_PASSES[direction] * bytes_per_pass / median / 1e9
                site = ("temporal_taps", form, channels, size, direction, implementation)
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
    parser.add_argument("--quick", action="store_true", help="three of the seven sites")
    parser.add_argument("--json", action="store_true", help="JSON as the last line of stdout")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: this process sees no CUDA device.")
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
    sites = QUICK_SITES if args.quick else SITES
    facts = environment(args)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("form      C   HxW direction code      median us    best us     GB/s of copy")
    rows = []
    for row in temporal_taps_rows(timer, sites, args.batch, args.num_segments, DTYPES[args.dtype]):
        rows.append(row)
        print(
            f"{row.form:5} {row.channels:5} {row.size:2}x{row.size:2} {row.direction:9} "
            f"{row.implementation:9} {row.median_us:9.1f} {row.best_us:10.1f} {row.gb_s:8.1f} "
            f"{row.of_copy:7.0%}",
            flush=True,
        )
    if args.json:
        print(json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
