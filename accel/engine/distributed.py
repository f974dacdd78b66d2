"""Rank facts and reductions; the only user of torch.distributed."""

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from accel.engine.timing import Ranges


@dataclass(frozen=True)
class World:
    """This process among all of a run. One process without torchrun is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Give every rank rank 0's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def share(self, message: str | None) -> str | None:
        """Rank 0's message on every rank (None = all is well), so that nobody waits for it."""
        if self.size == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def wrap(
        self, model: nn.Module, device: torch.device, ranges: Ranges | None = None
    ) -> nn.Module:
        """DistributedDataParallel over all ranks, or the model itself for a single process.

        Batch-norm statistics stay per rank, as published; buffers of rank 0 are the saved ones.
        """
        if self.size == 1:
            return model
        ddp: Any = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # newer torch
        wrapped: nn.Module = ddp(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
        )
        if ranges is not None and ranges.enabled:
            wrapped.register_comm_hook(ranges, _marked_all_reduce)  # type: ignore[operator]
        return wrapped


def _marked_all_reduce(ranges: Ranges, bucket: Any) -> Any:
    """DDP's own exchange of a bucket of gradients, under a name that profiles show."""
    with ranges("all-reduce"):
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


def start_world(device_type: str) -> World:
    """Join the process group that torchrun describes in the environment, if any."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)  # NCCL's own collectives use the current device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return World(rank=dist.get_rank(), size=size, local_rank=local_rank)


def stop_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
