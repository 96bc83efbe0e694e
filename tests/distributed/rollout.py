"""On every rank: the collector on a real engine, with a small cache, and with a rank that goes another way."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from treepo_mcore.config import AdvantageConfig, parse_config
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.trainer import Trainer
from treepo_mcore.tree.files import write_trees


def trainer_of(config: dict[str, Any]) -> Trainer:
    """Awake, with the actor's weights."""
    trainer = Trainer(parse_config(config))
    trainer.policy.push()
    trainer.policy.engine.wake_cache()
    return trainer


def collect(config: dict[str, Any], out: str) -> dict[str, Any]:
    """One rollout phase; what the engine says about its blocks before, within and behind it."""
    trainer = trainer_of(config)
    engine = trainer.policy.engine
    free, seen = engine.free_blocks(), []
    step = engine.step

    def watched() -> list[Any]:
        chunks = step()
        seen.append(engine.free_blocks())
        return chunks

    engine.step = watched
    batch = trainer.policy.rollout.collect(trainer.checked.prompts, trainer.step)
    whole = batch.deliver([batch.trees], 0)
    if trainer.policy.placement.rank == 0:
        write_trees(Path(out), whole)
    trainer.close()
    return {
        "free": free,
        "lowest": min(seen, default=free),
        "free_after": engine.free_blocks(),
        "block_tokens": engine.block_tokens,
        "max_requests": engine.max_requests,
        "counts": vars(batch.counts),
    }


def diverge(config: dict[str, Any], kind: str) -> str:
    """One rank draws other tokens (`seed`) or believes that a request ended (`length`); the error it leads to."""
    trainer = trainer_of(config)
    submit = trainer.policy.engine.submit

    def other(request: Any) -> None:
        if trainer.policy.placement.rank == 1 and request.id.startswith("2:"):
            request = (
                replace(request, seed=request.seed ^ 1)
                if kind == "seed"
                else replace(request, max_tokens=max(1, request.max_tokens // 2))
            )
        submit(request)

    trainer.policy.engine.submit = other
    return error_of(trainer)


def stuck(config: dict[str, Any]) -> str:
    """What is said where the engine's scheduler starts no request."""
    trainer = trainer_of(config)
    trainer.policy.engine.scheduler.max_num_running_reqs = 0
    return error_of(trainer)


def error_of(trainer: Trainer) -> str:
    """What a rollout phase ends with."""
    try:
        trainer.policy.rollout.collect(trainer.checked.prompts, trainer.step)
    except RuntimeError as error:
        return str(error)
    finally:
        trainer.close()
    return "no error"


def restarts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole run, its metrics by step, and what its last checkpoint remembers."""
    trainer = Trainer(parse_config(config))
    trainer.run()
    rows = [json.loads(line) for line in (trainer.config.run.dir / "metrics.jsonl").read_text().splitlines()]
    remembered = trainer.policy.rollout.state_dict()["rare"]["paths"]
    return [row | {"remembered": len(remembered)} for row in rows if "actor/updates" in row]


def resumes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rollout phases with the same weights: their trees, and how far the actor's log-probs are from the tokens'."""
    trainer = Trainer(parse_config(config))
    trainer.policy.push()
    with trainer.policy.phases.rollout():
        batches = [trainer.policy.rollout.collect(trainer.checked.prompts, step) for step in (0, 1)]
    found = []
    with trainer.policy.training():
        for batch in batches:
            trees = batch.deliver([batch.trees], 0)
            sequences = pack_trees(trees, advantages(trees, AdvantageConfig()), 1024)
            outputs = trainer.policy.actor.log_probs(sequences)
            pairs = zip(outputs, sequences, strict=True)
            gap = max(float((out[0] - sequence.behaviour_logprob).abs().max()) for out, sequence in pairs)
            prompts = {
                tree.prompt_id: [len(tree.leaves), all(leaf.reward is not None for leaf in tree.leaves)]
                for tree in trees
            }
            found.append({"prompts": prompts, "gap": gap, "counts": vars(batch.counts)})
    trainer.close()
    return found


def killed(config: dict[str, Any]) -> None:
    """Every rank ends where it cannot clean up behind itself."""
    trainer_of(config)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
