"""On every rank: the real process groups and the real plan of a push, to be held against the ones on paper."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from log_probs import engine_rank, make_actor
from models import EOS_IDS

from treepo_mcore.config import parse_config
from treepo_mcore.engine.vllm.engine import VllmEngine
from treepo_mcore.engine.vllm.layout import vllm_layout
from treepo_mcore.system.placement import init_process_group
from treepo_mcore.weights.transfer import Push, plan_push


def run(config: dict[str, Any], gpus_per_node: int, staging: int) -> dict[str, Any]:
    """Build both models and the push between them, as the trainer does."""
    init_process_group()
    os.environ["LOCAL_WORLD_SIZE"] = str(gpus_per_node)
    created = record_groups()
    settings = parse_config(config)
    source = Path(settings.model.path)
    actor = make_actor(source, config["actor"])
    engine = VllmEngine(settings, actor.arch, source, EOS_IDS)
    parameters = engine.parameters()
    plan = plan_push(
        actor.pieces, vllm_layout(parameters, actor.arch, settings.rollout.tp, engine_rank(settings.rollout.tp))
    )
    push = Push(plan, actor.tensors, parameters, staging_bytes=staging)
    return {
        "plan": [transfer._asdict() for transfer in push.plan],
        "groups": created,
        "grid": asdict(actor.grid),
        "sent": push.sent_bytes,
        "received": push.received_bytes,
        "local": push.local_bytes,
        "staging": push.staging_bytes,
        "rounds": len(push.rounds),
    }


def record_groups() -> list[list[int]]:
    """The ranks of every process group created from now on, in order."""
    created: list[list[int]] = []
    new_group = dist.new_group

    def record(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        created.append(list(range(dist.get_world_size())) if ranks is None else list(ranks))
        return new_group(ranks, *args, **kwargs)

    dist.new_group = record
    return created
