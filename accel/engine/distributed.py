"""Rank facts and reductions; the only user of torch.distributed."""

import contextlib
import hashlib
import inspect
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from accel.engine.timing import Ranges
from accel.errors import AccelError

Compression = Literal["none", "fp16", "bf16"]
_EXCHANGES: dict[Compression, Any] = {
    "none": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
}
_LETTING_GO_S = 0.3
_PATIENCE_S = 2.0  # for the word of ranks that live


@dataclass(frozen=True)
class World:
    """This process among all of a run. One process without torchrun is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = field(default=None, compare=False)
    """Of the launcher; outlives the ranks."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def minimum(self, number: int) -> int:
        """The smallest of all ranks' numbers, on every rank."""
        if self.size == 1:
            return number
        gathered = [number] * self.size
        dist.all_gather_object(gathered, number)
        return min(gathered)

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

    def differences(self, facts: Mapping[str, object]) -> str | None:
        """Which ranks have other facts than rank 0, and in what; the same on all. None: nobody.

        Args:
            facts: plain data.
        """
        if self.size == 1:
            return None
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, dict(facts))
        lines = []
        for rank, theirs in enumerate(gathered):
            keys = gathered[0] | theirs
            changed = [key for key in keys if theirs.get(key) != gathered[0].get(key)]
            if changed:
                lines.append(f"rank {rank} differs from rank 0 in {', '.join(changed)}")
        return "; ".join(lines) or None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def wrap(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        accumulation: int = 1,
        compression: Compression = "none",
        ranges: Ranges | None = None,
    ) -> nn.Module:
        """DistributedDataParallel over all ranks, or the model itself for a single process.

        Gradients live in the buckets that are exchanged, and the graph is taken to be the same in
        every step; not with accumulation, where torch fails an assertion (expect_autograd_hooks_).
        Batch-norm statistics stay per rank, as published; buffers of rank 0 are the saved ones.

        Args:
            accumulation: micro-batches per step; all but the last run under `no_sync`.
            compression: 16-bit type that gradients are exchanged in; fp32 is halved in volume.
            ranges: marks the launch of each exchange ("all-reduce").
        """
        if self.size == 1:
            return model
        ddp: Any = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # newer torch
        wrapped: nn.Module = ddp(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=accumulation == 1,
            **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
        )
        if compression != "none" or (ranges is not None and ranges.enabled):
            exchange = _EXCHANGES[compression]

            # Without annotations: torch compares them with its own types.
            def marked(ranges, bucket):  # type: ignore[no-untyped-def]
                with ranges("all-reduce"):
                    return exchange(dist.group.WORLD, bucket)

            wrapped.register_comm_hook(ranges or Ranges("off"), marked)  # type: ignore[operator]
        return wrapped

    def explain(self, error: BaseException) -> "PeerLostError | None":
        """What to say of an error of torch that other ranks may have caused by going away.

        Every rank that still lives says so in the store of the launcher; who is not there after a
        moment is lost. None: all live, so the error is this rank's own.
        """
        if self.size == 1 or self.store is None or not isinstance(error, RuntimeError):
            return None
        lost = set(range(self.size))
        try:
            self.store.set(f"accel/alive/{self.rank}", "yes")
            deadline = time.monotonic() + _PATIENCE_S
            while lost and time.monotonic() < deadline:
                lost -= {rank for rank in lost if self.store.check([f"accel/alive/{rank}"])}
                time.sleep(0.05)
        except RuntimeError:  # the launcher has gone too
            return PeerLostError("the launcher or the node of rank 0 is gone; the job ends.", True)
        if not lost:
            return None
        names = ", ".join(str(rank) for rank in sorted(lost))
        ranks = "rank" if len(lost) == 1 else "ranks"
        first = min(set(range(self.size)) - lost)
        return PeerLostError(
            f"{ranks} {names} ended or cannot be reached, so the job ends ({_one_line(error)}). "
            "The same command continues from the last checkpoint.",
            speaks=self.rank == first,
        )


class PeerLostError(AccelError):
    """Another rank of the job is gone.

    Args:
        text: the message.
        speaks: whether this rank is the one that shows it.
    """

    def __init__(self, text: str, speaks: bool) -> None:
        super().__init__(text if speaks else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def start_world(device_type: str, timeout_s: float = 600.0) -> World:
    """Join the process group that torchrun describes in the environment, if any.

    Args:
        device_type: "cuda" (NCCL) or "cpu" (gloo).
        timeout_s: how long a rank waits for the others before the job ends.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)  # NCCL's own collectives use the current device
    timeout = timedelta(seconds=timeout_s)
    untyped: Any = dist
    store, rank, size = next(untyped.rendezvous("env://", timeout=timeout))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # its keys are not ours
    store = untyped.PrefixStore(f"attempt-{restart}", store)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    return World(rank=rank, size=size, local_rank=local_rank, store=store)


def first_to_say(text: str) -> bool:
    """Whether no other rank of the job has said this: what several have to say is shown once.

    The store of torchrun's agent answers, also before a process group is joined and after it was
    left. Without torchrun every process speaks.
    """
    facts = os.environ
    if facts.get("WORLD_SIZE", "1") == "1" or facts.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    digest = hashlib.sha256(text.encode()).hexdigest()
    untyped: Any = dist
    try:
        store = untyped.TCPStore(
            facts["MASTER_ADDR"],
            int(facts["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        restart = facts.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"accel/said/{restart}/{digest}", 1) == 1)
    except (RuntimeError, KeyError, ValueError):  # the launcher is gone: twice is better than never
        return True


def tell_launcher(text: str) -> None:
    """Leave what ends this process to torchrun, which shows it last, as the cause; else nothing."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    # What torch.distributed.elastic's ErrorHandler writes, less the stack that it would show.
    content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def stop_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        # gloo's thread needs the interpreter to let go of the tensors of its last exchange, and the
        # end of the group waits for that thread without giving up the interpreter (torch 2.13).
        time.sleep(_LETTING_GO_S)
        dist.destroy_process_group()
