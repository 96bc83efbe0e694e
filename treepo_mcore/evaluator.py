"""Held-out prompts answered with a run's newest checkpoint: an actor that only holds weights, and the engine."""

from __future__ import annotations

import json
from typing import Any

from treepo_mcore.checks import Context, check_and_meet
from treepo_mcore.config import Config
from treepo_mcore.policy import Policy


def evaluate_newest(config: Config) -> dict[str, Any]:
    """Evaluate the newest checkpoint of run.dir, or the model where there is none, on every rank of a job.

    The result is also in run.dir's ``eval.json``. Raises `ConfigError` before any model is built.
    """
    checked = Context(config, learns=False)
    check_and_meet(checked)
    policy = Policy(checked)
    if checked.checkpoint is not None:
        policy.load(checked.checkpoint)
    result = {
        "step": checked.state["step"] if checked.state else 0,
        "checkpoint": checked.checkpoint is not None,
        "prompts": sum(len(held_out.prompts) for held_out in checked.held_out),
        "answers": sum(len(held_out.prompts) * held_out.samples for held_out in checked.held_out),
        **policy.evaluate(checked.held_out),
        "seed": config.run.seed,
        "layout": policy.layout,
    }
    if policy.placement.reports:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        (config.run.dir / "eval.json").write_text(json.dumps(result) + "\n")
    policy.close()
    return result
