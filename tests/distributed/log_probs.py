"""On every rank: log-probs of packed trees under many layouts and models, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.parallel import Grid, build_grid
from treepo_mcore.config import ActorConfig
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.packing import pack_flat, pack_trees
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.system.placement import colocated, init_process_group
from treepo_mcore.tree.files import read_trees
from treepo_mcore.tree.tree import Tree

GRIDS: dict[tuple[int | None, ...], Grid] = {}  # the one there is


def make_actor(directory: Path, settings: dict[str, Any], temperature: float = 1.0) -> Actor:
    """An actor in the groups of its layout, which replace those of another layout before it.

    Groups are kept where they can be: each has a gloo thread that wakes every 10 ms, and none of them ever goes.
    """
    init_process_group()
    config = ActorConfig.model_validate({"dtype": "float32"} | settings)
    layout = (config.tp, config.pp, config.vpp, config.ep, config.etp)
    if layout not in GRIDS:
        parallel_state.destroy_model_parallel()
        GRIDS.clear()
        GRIDS[layout] = build_grid(config, seed=0)
    grid = GRIDS[layout]
    return Actor(config, read_architecture(directory), directory, grid, temperature=temperature, total_steps=1)


def engine_rank(rollout_tp: int) -> int:
    """Of this rank in its engine, in today's placement."""
    return colocated(dist.get_rank(), dist.get_world_size(), rollout_tp).engine_rank


def no_advantages(trees: list[Tree]) -> list[LeafAdvantage]:
    """For packing where the loss does not matter."""
    return [LeafAdvantage(torch.zeros(len(t.leaves)).numpy(), torch.ones(len(t.leaves)).numpy()) for t in trees]


def by_edge(sequences: list[Any], values: list[torch.Tensor]) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """(tree, node, offset) -> the edge's column of `values` [rows, E]."""
    table = {}
    for sequence, value in zip(sequences, values, strict=True):
        for key, column in zip(sequence.edge_key.tolist(), value.T.tolist(), strict=True):
            table[tuple(key)] = tuple(column)
    return table


def run(models: dict[str, str], layouts: dict[str, dict[str, Any]], trees: str, temperature: float, out: str) -> None:
    """Every model under every layout; each rank saves {(layout, model): edge table}."""
    loaded = list(read_trees(trees))
    tables = {}
    for layout, settings in layouts.items():
        pack = pack_flat if settings.get("packing") == "flat" else pack_trees
        sequences = pack(loaded, no_advantages(loaded), 512)
        for name, directory in models.items():
            actor = make_actor(Path(directory), settings, temperature)
            tables[layout, name] = by_edge(sequences, actor.log_probs(sequences))
    torch.save(tables, Path(out) / f"rank_{torch.distributed.get_rank()}.pt")
