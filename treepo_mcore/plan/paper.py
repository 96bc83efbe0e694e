"""A job on paper: the process groups and shards of every rank of a cluster, from the real classes, in one process.

Ranks are taken on one after another in a fake `torch.distributed` job. Models are built on the meta device, once for
each place in Megatron's grid and in an engine: data-parallel replicas and further engines hold the same.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from treepo_mcore.actor.layout import megatron_layout
from treepo_mcore.actor.model import build_meta_model, megatron_configs
from treepo_mcore.actor.parallel import Grid, Place, build_grid, leave_grid
from treepo_mcore.config import Config, ConfigError, check_grid
from treepo_mcore.engine.vllm.engine import engine_arguments
from treepo_mcore.engine.vllm.layout import MetaEngine, vllm_layout, vllm_padding
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.system.machine import Machine, this_machine
from treepo_mcore.system.placement import Placement, colocated
from treepo_mcore.weights.fp8 import SCALE, block_plan, fp8_parameters
from treepo_mcore.weights.layout import Piece
from treepo_mcore.weights.plan import Layouts, PlanError, Transfer, make_plan

Group = tuple[int, ...]  # ranks
# The cluster's GPUs, where this machine has none to go by: an H100 with what requirements/gpu.lock installs.
PLANNED = Machine(capability=(9, 0), cuda=(13, 0), te=(2, 16, 1))


@dataclass(frozen=True)
class PaperJob:
    """What every rank of a job would hold."""

    grids: list[Grid]  # by rank
    places: list[Placement]  # by rank
    groups: list[Group]  # process groups, in the order in which every rank creates them
    sources: Layouts
    targets: Layouts
    parameters: list[dict[str, Tensor]]  # of vLLM's model, on the meta device, by rank of the engine
    padding: list[dict[str, int]]  # elements of those parameters that no HF element fills
    nodes: list[int]  # by rank

    def plan(self) -> list[Transfer]:
        """What `Push` runs, FP8 blocks and all, as every rank makes it. Raises `ConfigError` naming a tensor."""
        try:
            plan = make_plan(self.sources, self.targets, self.nodes)
        except PlanError as error:
            raise ConfigError(f"push: {error}") from error
        return block_plan(plan, fp8_parameters(self.parameters[0]))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the rollout's dtype; norms are never quantised."""
        return self.parameters[0]["model.norm.weight"].element_size()

    def to_fill(self, rank: int) -> dict[str, int]:
        """Engine parameter -> elements that a push has to write on a rank; without those that are all padding.

        Scales are not counted: they come with their blocks.
        """
        place = self.places[rank].engine_rank
        counts = {name: tensor.numel() - self.padding[place][name] for name, tensor in self.parameters[place].items()}
        return {name: count for name, count in counts.items() if count and not name.endswith(SCALE)}


@contextlib.contextmanager
def fake_rank(rank: int, world: int) -> Iterator[list[Group]]:
    """Scope in which `torch.distributed` is `rank` of a job of `world`; nothing is ever sent.

    Gives a list that grows with every process group created, the ones of other ranks included. Not within a real job.
    """
    created: list[Group] = []
    new_group, hook = dist.new_group, sys.excepthook

    def record(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        created.append(tuple(ranks))
        return new_group(ranks, backend="fake")

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    dist.new_group = record
    try:
        yield created
    finally:
        dist.new_group = new_group
        dist.destroy_process_group()
        sys.excepthook = hook  # torch's puts the rank in front of every line


def planned_machine() -> Machine:
    """What a job on paper runs on: this machine if it has a GPU, else `PLANNED`."""
    return this_machine() if this_machine().has_gpu else PLANNED


def put_on_paper(config: Config, arch: Architecture, directory: Path, nodes: int, gpus_per_node: int) -> PaperJob:
    """Be every rank in turn.

    Raises `ConfigError` for a layout that does not fit the ranks or the model, and where ranks would create different
    process groups (a live job would hang).
    """
    world, tp = nodes * gpus_per_node, config.rollout.tp
    configs = megatron_configs(config.actor, arch, planned_machine())
    arguments = engine_arguments(config, arch, directory)
    check_grid(config, world)
    engine = MetaEngine(arguments)
    grids: list[Grid] = []
    groups: list[Group] = []
    held: dict[tuple[int, Place], list[Piece]] = {}
    parameters: list[dict[str, Tensor]] = []
    for rank in range(world):
        with fake_rank(rank, world) as created, _grid(config) as grid:
            if (place := (grid.pp_rank, grid.place)) not in held:
                held[place] = megatron_layout(build_meta_model(configs, arch), arch, grid.place)
            with engine.groups():
                if rank < tp:
                    parameters.append(engine.parameters(arch))
        grids.append(grid)
        groups = groups or created
        _check_same_groups(rank, created, groups)
    wanted = [vllm_layout(parameters[r], arch, tp, r, config.rollout.expert_parallel) for r in range(tp)]
    places = [colocated(rank, world, tp) for rank in range(world)]
    return PaperJob(
        grids,
        places,
        groups,
        [held[grid.pp_rank, grid.place] for grid in grids],
        [wanted[place.engine_rank] for place in places],
        parameters,
        [_padding(parameters[r], arch, tp, r) for r in range(tp)],
        [rank // gpus_per_node for rank in range(world)],
    )


@contextlib.contextmanager
def _grid(config: Config) -> Iterator[Grid]:
    try:
        yield build_grid(config.actor, config.run.seed)
    finally:
        leave_grid()


def _check_same_groups(rank: int, created: list[Group], first: list[Group]) -> None:
    """Creating a group is collective: a rank that creates another one, or in another order, waits for ever."""
    if created != first:
        number = next((i for i, (a, b) in enumerate(zip(created, first, strict=False)) if a != b), len(created))
        raise ConfigError(
            f"process groups: rank {rank} creates {len(created)}, rank 0 creates {len(first)}; number {number} differs"
        )


def _padding(parameters: dict[str, Tensor], arch: Architecture, tp: int, tp_rank: int) -> dict[str, int]:
    views = {name: vllm_padding({name: tensor}, arch, tp, tp_rank) for name, tensor in parameters.items()}
    return {name: sum(view.numel() for view in found) for name, found in views.items()}
