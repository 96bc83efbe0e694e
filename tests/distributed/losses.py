"""On every rank: the update phase of a step on the same saved trees under many losses; gradients in HF coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import in_hf, look_before_stepping
from log_probs import make_actor
from torch import Tensor
from trees import step_of

from treepo_mcore.actor.actor import Actor
from treepo_mcore.config import Config, parse_config
from treepo_mcore.learn.step import learn
from treepo_mcore.observe.guard import MismatchGuard
from treepo_mcore.records import PackedSequence
from treepo_mcore.tree.files import read_trees

TEMPERATURE = 0.7
# Nothing moves: every mini-batch sees the weights that were loaded.
OPTIMIZER = {"lr": 1e-30, "weight_decay": 0.0, "distributed": False}


def configuration(directory: str, case: dict[str, Any], actor: dict[str, Any]) -> Config:
    """Mini-batches of two trees; `case` has sections `actor` and `advantage`."""
    return parse_config(
        {
            "model": {"path": directory},
            "data": {"train": "none", "max_prompt_tokens": 12},
            "rollout": {"temperature": TEMPERATURE, "tree": {"segment_tokens": 6, "max_depth": 6}},
            "trainer": {"prompts_per_step": 3, "prompts_per_update": 2},
            "advantage": case.get("advantage", {}),
            "actor": {"dtype": "float32", "optimizer": OPTIMIZER} | case.get("actor", {}) | actor,
        }
    )


def shift(behaviour: Tensor) -> Tensor:
    """What separates old from new log-probs: up to 0.6 nats, a function of the edge's behaviour log-prob."""
    return 0.6 * torch.sin(1000 * behaviour.double()).float()


def shifted(actor: Actor) -> None:
    """Make old and reference log-probs differ from the new ones, so that clipping and the KL act."""
    log_probs = actor.log_probs

    def both(sequences: list[PackedSequence]) -> list[Tensor]:
        return [out + shift(s.behaviour_logprob) for s, out in zip(sequences, log_probs(sequences), strict=True)]

    actor.log_probs = both


def one_case(directory: str, trees: str, case: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the step and the gradients of its updates."""
    config = configuration(directory, case, layout)
    actor = make_actor(Path(directory), config.actor.model_dump(), TEMPERATURE)
    shifted(actor)
    seen = look_before_stepping(actor)
    done = step_of(list(read_trees(trees)))
    learn(actor, done, config)
    return {"metrics": done.values, "gradients": [in_hf(actor, grads)[0] for grads in seen]}


def run(directory: str, trees: str, cases: dict[str, Any], layouts: dict[str, Any], out: str) -> None:
    """Rank 0 saves {(case, layout): result}."""
    results = {
        (case, layout): one_case(directory, trees, settings, how)
        for layout, how in layouts.items()  # outside: every change of layout leaves gloo threads behind
        for case, settings in cases.items()
    }
    if dist.get_rank() == 0:
        torch.save(results, out)


def swap(directory: str, trees: str) -> dict[str, Any]:
    """The reference policy stays what was loaded, and its pass leaves the moved policy as it was."""
    config = configuration(directory, {"actor": {"reference": "host"}}, {"optimizer": {"lr": 1e-2}})
    actor = make_actor(Path(directory), config.actor.model_dump(), TEMPERATURE)
    loaded = list(read_trees(trees))
    sequences: list[PackedSequence] = []
    update = actor.update

    def remember(batch: list[PackedSequence], *args: Any, **kwargs: Any) -> Any:
        sequences.extend(batch)
        return update(batch, *args, **kwargs)

    actor.update = remember
    actor.set_step(0)
    learn(actor, step_of(loaded[:2]), config)
    before = [out[0] for out in actor.log_probs(sequences)]
    weights = {name: tensor.clone() for name, tensor in actor.tensors.items()}
    reference = actor.reference_log_probs(sequences)
    fresh = make_actor(Path(directory), {"dtype": "float32"}, TEMPERATURE)
    expected = [out[0] for out in fresh.log_probs(sequences)]
    return {
        "moved": max(float((a - b).abs().max()) for a, b in zip(before, expected, strict=True)),
        "reference": max(float((a - b).abs().max()) for a, b in zip(reference, expected, strict=True)),
        "restored": all(torch.equal(weights[name], actor.tensors[name]) for name in weights),
    }


def mismatch(directory: str, trees: str) -> str:
    """What is raised beyond `actor.max_mismatch`."""
    config = configuration(directory, {"actor": {"max_mismatch": 0.01}}, {})
    actor = make_actor(Path(directory), config.actor.model_dump(), TEMPERATURE)
    try:
        done = step_of(list(read_trees(trees)), 7)
        learn(actor, done, config)
        MismatchGuard(config).trained(done)
    except RuntimeError as error:
        return str(error)
    return ""
