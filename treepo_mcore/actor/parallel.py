"""The actor's process grid: Megatron's groups, with ranks numbered as it does by default (tensor, context, data,
pipeline).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.config import ActorConfig


class Place(NamedTuple):
    """Which part of a pipeline stage's weights a rank holds."""

    tp_rank: int
    ep: int = 1
    ep_rank: int = 0
    etp_rank: int = 0


@dataclass(frozen=True)
class Grid:
    """Where this rank stands among those that hold the actor."""

    rank: int
    world: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    cp: int
    cp_rank: int
    dp: int
    dp_rank: int
    place: Place

    @property
    def leads_model(self) -> bool:
        """Whether this rank reports for its tokens: first of its tensor group on the last stage."""
        return self.tp_rank == 0 and self.pp_rank == self.pp - 1


@on_megatron_device
def build_grid(actor: ActorConfig, seed: int) -> Grid:
    """Create Megatron's process groups. Collective: every rank calls it once, before the engine is built."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=actor.tp,
        pipeline_model_parallel_size=actor.pp,
        virtual_pipeline_model_parallel_size=actor.vpp,
        context_parallel_size=actor.cp,
        expert_model_parallel_size=actor.ep,
        expert_tensor_parallel_size=actor.etp,
    )
    model_parallel_cuda_manual_seed(seed)
    return Grid(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=actor.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=actor.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp=actor.cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        place=Place(
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            ep=actor.ep,
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        ),
    )


def leave_grid() -> None:
    """Forget Megatron's process groups; `build_grid` may then be called again."""
    parallel_state.destroy_model_parallel()
