"""What a checkpoint holds, as Megatron-Core lays it out: the only place that knows its optimizer's saved form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.model import unwrap
from treepo_mcore.config import ActorConfig

# Of the distributed optimizer, by Megatron's names. The first is gathered on each first data-parallel rank and loads in
# any layout; of the second each rank writes what it has, and tensor and pipeline parallelism stay as they were.
Form = Literal["fully_reshardable", "dp_reshardable"]


SHARDS = ("tp", "pp", "ep", "etp")


def shards_of(config: ActorConfig) -> dict[str, int]:
    """What has to stay for `dp_reshardable`, by the configuration's keys."""
    return {key: getattr(config, key) for key in SHARDS}


def sharded_weights(chunks: list[nn.Module], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """The model's part; within `megatron_device`."""
    # The data-parallel wrapper would put its own "module." before every name.
    metadata = metadata or {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def sharded_state(actor: Actor, form: Form, loading: bool) -> dict[str, Any]:
    """Model and optimizer; within `megatron_device` and `any_adam`."""
    metadata = {
        "distrib_optim_sharding_type": form,
        # Gathered in host memory on the first data-parallel rank. Otherwise Megatron brings the whole optimizer state
        # of a stage onto every GPU, which has no room for it.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    models = sharded_weights(actor.chunks, metadata)
    optimizer = actor.optimizer.sharded_state_dict(
        models if len(models) > 1 else models["model0"], is_loading=loading, metadata=metadata
    )
    return {**models, "optimizer": optimizer}


class any_adam:
    """Lets Megatron 0.19.2's distributed optimizer save and load any Adam at any time.

    A fresh optimizer has no state, which Megatron reads all the same. And torch's AdamW, which stands in for the fused
    ones of apex and TransformerEngine, differs from them: the step is a tensor in every parameter's state, and loading
    gives all of them one and the same tensor, or, as `dp_reshardable`, the one that was there before.
    """

    def __init__(self, optimizer: Any) -> None:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self.parts = [part for part in parts if isinstance(part.optimizer, torch.optim.Adam)]
        self.fused = [part for part in parts if part not in self.parts and part.optimizer is not None]

    def __enter__(self) -> None:
        self.original = DistributedOptimizer._set_main_param_and_optimizer_states
        original = self.original

        def set_states(optimizer: Any, model_param: Any, tensors: dict[str, Any]) -> None:
            original(optimizer, model_param, {**tensors, "step": None})  # the parameter groups bring it

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


@contextmanager
def rates_while_loading(optimizer: Any, saved: dict[str, Any]) -> Iterator[None]:
    """Megatron finds a saved parameter group by its rates, and takes them over: then the actor's own are put back.

    saved: settings of the optimizer that was saved.
    """
    own = [{name: group[name] for name in ("max_lr", "min_lr")} for group in _groups(optimizer)]
    for group in _groups(optimizer):
        group.update(max_lr=saved["lr"], min_lr=saved["min_lr"])
    yield
    for group, rates in zip(_groups(optimizer), own, strict=True):
        group.update(rates)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [group for part in parts if part.optimizer is not None for group in part.optimizer.param_groups]


def _fill_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
