"""The job's processes: how they meet, and which of them hold a shard of the actor, which a part of an engine.

Whoever asks "who leads?", "which engine is this?" or "who broadcasts?" asks a `Placement`; nothing else counts ranks.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Placement:
    """Who is where, as one rank sees it."""

    rank: int
    actor_ranks: tuple[int, ...]  # ranks that hold a shard of the actor
    engines: tuple[tuple[int, ...], ...]  # the ranks of each engine, in the order of its tensor-parallel shards

    @property
    def has_actor(self) -> bool:
        """Whether this rank holds a shard of the actor."""
        return self.rank in self.actor_ranks

    @property
    def engine(self) -> int | None:
        """Index of the engine that this rank belongs to, if it belongs to one."""
        return next((index for index, ranks in enumerate(self.engines) if self.rank in ranks), None)

    @property
    def engine_ranks(self) -> tuple[int, ...]:
        """The ranks of this rank's engine; none where it belongs to no engine."""
        return () if self.engine is None else self.engines[self.engine]

    @property
    def engine_rank(self) -> int:
        """This rank's shard of its engine. Raises ValueError where it belongs to none."""
        return self.engine_ranks.index(self.rank)

    @property
    def leads_engine(self) -> bool:
        """Whether this rank decides for its engine: it has the clock, the queue and the rewards."""
        return self.engine is not None and self.rank == self.leader

    @property
    def leader(self) -> int:
        """The rank that decides for this rank's engine, and broadcasts to it."""
        return self.engine_ranks[0]

    @property
    def leaders(self) -> tuple[int, ...]:
        """The rank of each engine that decides for it."""
        return tuple(ranks[0] for ranks in self.engines)

    @property
    def reports(self) -> bool:
        """Whether this rank speaks and writes for the job."""
        return self.rank == 0


def colocated(rank: int, world: int, rollout_tp: int) -> Placement:
    """Every rank holds a shard of the actor; each `rollout_tp` consecutive ranks also form an engine.

    Megatron numbers tensor-parallel neighbours consecutively too, so equal sizes keep intra-layer weights local.
    """
    engines = tuple(tuple(range(first, first + rollout_tp)) for first in range(0, world, rollout_tp))
    return Placement(rank, tuple(range(world)), engines)


def local_ranks() -> int:
    """Processes of this job on this node, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Of this process among those of its node, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def init_process_group(timeout_seconds: float | None = None) -> None:
    """Join the job that torchrun started (or a job of one), before Megatron or vLLM look for it.

    timeout_seconds: how long a collective waits for other ranks; default: torch's.
    """
    if dist.is_initialized():
        return
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:  # a job of one; others may run on this machine
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    backend, wait = "gloo", None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=wait)


def limit_waits(seconds: float) -> None:
    """Let the collectives of all groups of this process, Megatron's and vLLM's too, wait so long for other ranks.

    torch has no public list of groups.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        group.set_timeout(timedelta(seconds=seconds))
