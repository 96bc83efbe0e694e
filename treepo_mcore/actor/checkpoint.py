"""Megatron distributed checkpoints, loadable in any layout: of a run (model, optimizer, state), or of weights alone."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.model import unwrap
from treepo_mcore.config import NEWEST_CHECKPOINT, ConfigError

STATE = "trainer_state.json"
STATE_PARTS = {"step": int, "prompts": dict, "rollout": dict, "optimizer": dict}  # that the trainer goes on from
SHARED = "it has to be one directory, on a file system that all nodes share"


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


@on_megatron_device
def save(directory: Path, step: int, actor: Actor, state: dict[str, Any], keep: int) -> None:
    """Write ``iter_<step>`` and then move the tracker to it; a job killed in between finds the previous one.

    state must be JSON; it comes back from `read_state`. Collective.
    """
    target = directory / f"iter_{step:07d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # left behind by a job that died while it wrote
    with _any_adam(actor.optimizer):  # without state, if no step so far had an informative prompt
        sharded = _sharded_state(actor, loading=False)
    _write(target, sharded)
    if dist.get_rank() == 0:
        (target / STATE).write_text(json.dumps(state, indent=1))
        tracker = directory / NEWEST_CHECKPOINT
        temporary = tracker.with_suffix(".tmp")
        temporary.write_text(str(step))
        temporary.replace(tracker)
        # Later ones belong to a run that was not continued; they say nothing about what to keep of this one.
        upto = sorted(old for old in directory.glob("iter_*") if old.name <= target.name)
        for old in upto[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    if NEWEST_CHECKPOINT not in os.listdir(directory):
        raise RuntimeError(f"{directory}: what rank 0 has saved is not here on {socket.gethostname()}; {SHARED}")


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
    """Fill the model, and the optimizer where the actor has one. The layout may differ from the one that saved."""
    if actor.optimizer is None:
        load_weights(checkpoint, actor.chunks)
        return
    with _any_adam(actor.optimizer):
        # Every replica wants all of its shard: each reads a part, and they exchange them. Otherwise the file system
        # would be read as often as there are replicas.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
        loaded = dist_checkpointing.load(_sharded_state(actor, loading=True), str(checkpoint), strategy)
        for index, chunk in enumerate(actor.chunks):
            unwrap(chunk).load_state_dict(loaded[f"model{index}"])
        actor.optimizer.load_state_dict(loaded["optimizer"])


def save_weights(directory: Path, chunks: list[nn.Module]) -> None:
    """The model alone, in a new directory. Collective; within `megatron_device`."""
    _write(directory, _sharded_weights(chunks))


def load_weights(checkpoint: Path, chunks: list[nn.Module]) -> None:
    """Fill the model; what else is in the checkpoint is left alone. Collective; within `megatron_device`."""
    loaded = dist_checkpointing.load(_sharded_weights(chunks), str(checkpoint))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])


def _write(directory: Path, state: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    # Megatron would start a server process for a queue that, saving synchronously, only this thread uses.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(directory))


def _sharded_weights(chunks: list[nn.Module], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    # The data-parallel wrapper would put its own "module." before every name.
    metadata = metadata or {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def _sharded_state(actor: Actor, loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered in host memory on the first data-parallel rank. Otherwise Megatron brings the whole optimizer state
        # of a stage onto every GPU, which has no room for it.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    models = _sharded_weights(actor.chunks, metadata)
    optimizer = actor.optimizer.sharded_state_dict(
        models if len(models) > 1 else models["model0"], is_loading=loading, metadata=metadata
    )
    return {**models, "optimizer": optimizer}


class _any_adam:
    """Lets Megatron 0.19.2's distributed optimizer save and load any Adam at any time.

    A fresh optimizer has no state, which Megatron reads all the same. And torch's AdamW, which stands in for the fused
    ones of apex and TransformerEngine, differs from them: the step is a tensor in every parameter's state, and loading
    gives all of them one and the same tensor.
    """

    def __init__(self, optimizer: Any) -> None:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self.parts = [part for part in parts if isinstance(part.optimizer, torch.optim.Adam)]
        self.fused = [part for part in parts if part not in self.parts and part.optimizer is not None]

    def __enter__(self) -> None:
        self.original = DistributedOptimizer._set_main_param_and_optimizer_states
        original = self.original

        def set_states(optimizer: Any, model_param: Any, tensors: dict[str, Any]) -> None:
            original(optimizer, model_param, {"step": None, **tensors})

        DistributedOptimizer._set_main_param_and_optimizer_states = set_states
        for part in self.parts:
            _fill_state(part.optimizer)
        for part in self.fused:
            part.init_state_fn(part.optimizer, part.config)  # fills what is empty

    def __exit__(self, *exc: object) -> None:
        DistributedOptimizer._set_main_param_and_optimizer_states = self.original
        for part in self.parts:
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()


def _fill_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
