"""The process grid: torch.distributed, Megatron's groups, and the engines' blocks of ranks.

Ranks are numbered as Megatron does by default (tensor parallel fastest, then data, then pipeline), so a block of
`rollout.tp` consecutive ranks, which forms one engine, shares tensor-parallel neighbours with the actor.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.config import ActorConfig


@dataclass(frozen=True)
class Grid:
    """Where this rank stands."""

    rank: int
    world: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    dp: int
    dp_rank: int
    engines: int
    engine: int  # index of the engine this rank belongs to
    engine_rank: int  # rank inside that engine

    @property
    def leads_engine(self) -> bool:
        """Whether this rank decides for its engine."""
        return self.engine_rank == 0

    @property
    def leads_model(self) -> bool:
        """Whether this rank reports for its model replica: first of its tensor group on the last stage."""
        return self.tp_rank == 0 and self.pp_rank == self.pp - 1


def init_process_group() -> None:
    """Join the job that torchrun started (or a job of one), before Megatron or vLLM look for it."""
    if dist.is_initialized():
        return
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:  # a job of one; others may run on this machine
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


@on_megatron_device
def build_grid(actor: ActorConfig, rollout_tp: int, seed: int) -> Grid:
    """Create Megatron's process groups. Collective: every rank calls it once, before the engine is built."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=actor.tp,
        pipeline_model_parallel_size=actor.pp,
        virtual_pipeline_model_parallel_size=actor.vpp,
    )
    model_parallel_cuda_manual_seed(seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    return Grid(
        rank=rank,
        world=world,
        tp=actor.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=actor.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        engines=world // rollout_tp,
        engine=rank // rollout_tp,
        engine_rank=rank % rollout_tp,
    )


def leave_grid() -> None:
    """Forget Megatron's process groups; `build_grid` may then be called again."""
    parallel_state.destroy_model_parallel()
