"""What a run would do: one batch through the network, without writing anything."""

import time
from typing import Any

import torch

from accel.engine.trainer import Trainer


def dry_run(trainer: Trainer) -> dict[str, Any]:
    """Shapes, sizes, memory and the expected duration, from one forward and backward.

    Args:
        trainer: freshly built; its network is left with gradients and must not be trained after.

    Returns:
        Plain data; durations in seconds, measured on this machine with a cold start excluded.
    """
    device = trainer.device
    batches = trainer.train_loader.epoch(0)
    batch = next(batches)

    shapes = trainer.task.rehearse(batch)  # allocations and autotuning happen here
    start = time.perf_counter()
    trainer.task.rehearse(batch)
    step_s = (time.perf_counter() - start) * trainer.accumulation
    start = time.perf_counter()
    next(batches, None)
    wait_s = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        **shapes,
        "num_classes": trainer.dataset.num_classes,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loader": trainer.train_loader.description,
        "steps_per_epoch": trainer.train_loader.steps_per_epoch,
        "total_steps": trainer.total_steps,
        "micro_batches_per_step": trainer.accumulation,
        "step_s": round(step_s, 4),
        "next_batch_wait_s": round(wait_s, 4),
        "expected_train_s": round(step_s * trainer.total_steps, 1),
        "peak_gpu_memory_gib": peak,
    }
