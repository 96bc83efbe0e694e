"""Megatron distributed checkpoints, loadable in any layout: of a run (model, optimizer, state), or of weights alone."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import nn

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.model import unwrap
from treepo_mcore.actor.saved import ADVICE
from treepo_mcore.actor.saver import SHARED, STATE
from treepo_mcore.actor.sharded import (
    SHARDS,
    any_adam,
    rates_while_loading,
    sharded_state,
    sharded_weights,
    shards_of,
)
from treepo_mcore.actor.sums import differences, read_sums
from treepo_mcore.config import NEWEST_CHECKPOINT, ActorConfig, ConfigError

# What the trainer goes on from, and how the tensors lie.
STATE_PARTS = {"step": int, "prompts": dict, "rollout": dict, "optimizer": dict, "layout": dict}


def newest(directory: Path) -> Path | None:
    """The checkpoint that `directory`'s tracker names, None when there is none. Raises `ConfigError` when it is bad."""
    tracker = directory / NEWEST_CHECKPOINT
    if not tracker.is_file():
        return None
    content = tracker.read_text().strip()
    if not content.isdecimal():
        raise ConfigError(f"{tracker}: expected the step of a checkpoint, found {content!r}")
    return directory / f"iter_{int(content):07d}"


def forget(directory: Path) -> None:
    """No checkpoint is the newest any more."""
    (directory / NEWEST_CHECKPOINT).unlink(missing_ok=True)


def check_same(run_dir: Path, found: Path | None) -> None:
    """Raise `ConfigError` on all ranks where they would not begin with the same checkpoint. Collective."""
    mine = found.name if found else "none"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, name in enumerate(everyone):
        if name != everyone[0]:
            raise ConfigError(
                f"run.dir: {run_dir}: rank 0 finds checkpoint {everyone[0]}, rank {rank} {name}; {SHARED}"
            )


def check_sums(checkpoint: Path) -> None:
    """Raise `ConfigError` on all ranks where a file is not as it was written; each reads a share. Collective."""
    sums = read_sums(checkpoint)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, differences(checkpoint, sums, sorted(sums)[dist.get_rank() :: len(everyone)]))
    if found := [line for lines in everyone for line in lines]:
        more = f" ({len(found) - 1} more, see treepo-mcore checkpoint verify)" if len(found) > 1 else ""
        raise ConfigError(f"{found[0]}{more}; {ADVICE}")


def check_layout(checkpoint: Path, layout: dict[str, Any], actor: ActorConfig) -> None:
    """Raise `ConfigError` where the optimizer's state lies as it did in another layout. layout: of `read_state`."""
    found, saved = shards_of(actor), {key: layout.get(key) for key in SHARDS}
    if layout["form"] == "dp_reshardable" and found != saved:
        names = ", ".join(f"actor.{key}" for key in SHARDS)
        now, then = (", ".join(map(str, each.values())) for each in (found, saved))
        raise ConfigError(
            f"{names}: found {now}; {checkpoint} was written while the run went on, and loads with "
            f"{then} alone; `treepo-mcore checkpoint reshard` with these makes it load with any"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state as it was given to `save`. Raises `ConfigError` when it cannot be read or lacks a part."""
    file = checkpoint / STATE
    again = "run.resume: false begins anew"
    try:
        state: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not the state of a run ({error}); {again}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{file}: not the state of a run: expected an object, found {type(state).__name__}; {again}")
    for name, kind in STATE_PARTS.items():
        if name not in state:
            raise ConfigError(f"{file}: has no {name}, as one of an earlier version of this package; {again}")
        if not isinstance(state[name], kind):
            raise ConfigError(f"{file}: {name}: expected {kind.__name__}, found {str(state[name])[:80]}; {again}")
    return state


@on_megatron_device
def load(checkpoint: Path, actor: Actor) -> None:
    """Fill the model, and the optimizer where the actor has one, which keeps the learning rates it was made with.

    The layout may be another, see `check_layout`. Raises `ConfigError` on all ranks where a file was changed.
    """
    check_sums(checkpoint)
    if actor.optimizer is None:
        load_weights(checkpoint, actor.chunks)
        return
    state = json.loads((checkpoint / STATE).read_text())
    form, rates = state["layout"]["form"], rates_while_loading(actor.optimizer, state["optimizer"])
    with any_adam(actor.optimizer), rates, torch.no_grad():  # which Megatron forgets for dp_reshardable
        # Every replica wants all of its shard: each reads a part, and they exchange them. Otherwise the file system
        # would be read as often as there are replicas.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
        loaded = dist_checkpointing.load(sharded_state(actor, form, loading=True), str(checkpoint), strategy)
        for index, chunk in enumerate(actor.chunks):
            unwrap(chunk).load_state_dict(loaded[f"model{index}"])
        actor.optimizer.load_state_dict(loaded["optimizer"])


def save_weights(directory: Path, chunks: list[nn.Module]) -> None:
    """The model alone, in a new directory. Collective; within `megatron_device`."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    # Megatron would start a server process for a queue that, saving synchronously, only this thread uses.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(sharded_weights(chunks), str(directory))


def load_weights(checkpoint: Path, chunks: list[nn.Module]) -> None:
    """Fill the model; what else is in the checkpoint is left alone. Collective; within `megatron_device`."""
    loaded = dist_checkpointing.load(sharded_weights(chunks), str(checkpoint))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])
