"""Speed of AMTNet: its heads as convolutions against the published gathered form, and whole steps.

`python profile/detector.py` measures both forms of the heads on one device, forward and backward,
taking turns, and training steps of the whole network on one random batch (no input pipeline, no
clipping). `--json` prints one JSON object as the last line.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.detection.boxes import ltrb_from_cxcywh
from accel.detection.losses import multibox_loss
from accel.detection.matching import match
from accel.engine.run import environment, resolve_device
from accel.engine.tube_evaluation import priors_for
from accel.models.amtnet import AMTNet
from accel.models.amtnet_heads import WINDOW, MicrotubeHead
from accel.models.convert.amtnet_heads import linear_from_convolution
from accel.models.vgg_ssd import map_sizes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUM_CLASSES = 25


class GatheredHead(nn.Module):
    """The published form of a head: every window stored, then two linear layers.

    Args:
        head: whose weights it starts from.
    """

    def __init__(self, head: MicrotubeHead) -> None:
        super().__init__()
        self.num_frames, self.sizes = head.num_frames, (head.loc_size, head.num_classes)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer in (head.loc, head.conf):
            assert layer.bias is not None
            linear = linear_from_convolution(layer.weight.detach(), head.num_frames)
            self.weights.append(nn.Parameter(linear.contiguous()))
            self.biases.append(nn.Parameter(layer.bias.detach().clone()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """loc and conf of maps [N*T, C, H, W], as `MicrotubeHead.forward` has them."""
        padded = F.pad(x / WINDOW**2, (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1)
        height, width = x.shape[2:]
        windows = [
            padded[:, i : i + height, j : j + width] for i in range(WINDOW) for j in range(WINDOW)
        ]
        stored = torch.cat(windows, dim=-1).unflatten(0, (-1, self.num_frames))
        rows = torch.cat(stored.unbind(1), dim=-1)  # [N, H, W, T*9*C]
        loc, conf = (
            F.linear(rows, weight, bias).reshape(len(rows), -1, size)
            for weight, bias, size in zip(self.weights, self.biases, self.sizes, strict=True)
        )
        return loc, conf


def _timed(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure_heads(model: AMTNet, size: int, options: argparse.Namespace) -> dict[str, float]:
    """Micro-tubes per second of all heads, forward and backward, and the ratio of both forms."""
    device = torch.device(options.device)
    frames = options.batch * model.num_frames
    maps = [
        torch.randn(frames, channels, side, side, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for channels, side in zip(model.base.channels, map_sizes(size, model.levels), strict=True)
    ]

    forms = {
        "convolution": list(model.heads),
        "gathered": [GatheredHead(head).to(device) for head in model.heads],  # type: ignore[arg-type]
    }

    def step(heads: list[nn.Module]) -> None:
        with _autocast(options):
            outputs = [part for head, x in zip(heads, maps, strict=True) for part in head(x)]
            loss = torch.stack([part.float().square().mean() for part in outputs]).sum()
        torch.autograd.backward(loss)

    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(options.warmups + options.steps):
        for name, heads in forms.items():
            seconds = _timed(partial(step, heads), device)
            if turn >= options.warmups:
                times[name].append(seconds)
    rates = {f"{name}_per_s": options.batch / median(own) for name, own in times.items()}
    return rates | {"ratio": rates["convolution_per_s"] / rates["gathered_per_s"]}


def measure_step(model: AMTNet, size: int, options: argparse.Namespace) -> dict[str, float]:
    """Micro-tubes per second of whole training steps on one random batch."""
    device = torch.device(options.device)
    frames = options.batch * model.num_frames
    x = torch.randint(-110, 140, (frames, 3, size, size), device=device).float()
    x = x.to(memory_format=torch.channels_last)
    priors = priors_for(size, model.levels).to(device)
    boxes = ltrb_from_cxcywh(priors[:: len(priors) // options.batch][: options.batch])
    boxes = boxes[:, None, None].expand(-1, 1, model.num_frames, 4)
    labels = torch.zeros(options.batch, 1, dtype=torch.int64, device=device)
    fused = {"fused": True} if device.type == "cuda" else {}
    sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, **fused)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    losses: list[float] = []

    def step() -> None:
        with _autocast(options):
            conf, loc = model(x)
        near, classes = multibox_loss(conf, loc, *match(boxes, labels, priors))
        torch.autograd.backward(scaler.scale(near + classes))
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad(set_to_none=True)
        losses.append(float((near + classes).detach()))

    times = [_timed(step, device) for _ in range(options.warmups + options.steps)]
    result = {"step_ms": 1e3 * median(times[options.warmups :]), "loss": losses[-1]}
    result["microtubes_per_s"] = 1e3 * options.batch / result["step_ms"]
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def _autocast(options: argparse.Namespace) -> torch.autocast:
    dtype = DTYPES[options.precision]
    enabled = dtype != torch.float32
    return torch.autocast(options.device, dtype=dtype if enabled else None, enabled=enabled)


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=2, help="micro-tubes")
    parser.add_argument("--size", type=int, default=300, help="px")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    torch.manual_seed(0)
    model: Any = AMTNet(NUM_CLASSES, width=options.width).to(device)
    model = model.to(memory_format=torch.channels_last)
    report = {
        "environment": environment(device),
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "heads": measure_heads(model, options.size, options),
        "training": measure_step(model, options.size, options),
    }
    for part in ("heads", "training"):
        for name, value in report[part].items():
            print(f"{part:10}{name:24}{value:.4g}")
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
