"""A run's newest checkpoint, written once more for any layout."""

from __future__ import annotations

from pathlib import Path

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.parallel import build_grid
from treepo_mcore.actor.saver import save
from treepo_mcore.checks import Context, check_and_meet
from treepo_mcore.config import Config, ConfigError


def reshard_newest(config: Config) -> Path:
    """Load the newest checkpoint of run.dir in the layout it was saved in and save it as `fully_reshardable`.

    On every rank of a job. Returns its directory. Raises `ConfigError` before any model is built.
    """
    checked = Context(config)
    check_and_meet(checked)
    if checked.checkpoint is None or checked.state is None:
        raise ConfigError(f"run.dir: {config.run.checkpoints}: found no checkpoint to reshard")
    actor = Actor(
        config.actor,
        checked.arch,
        checked.directory,
        build_grid(config.actor, config.run.seed),
        temperature=config.rollout.temperature,
        total_steps=config.trainer.steps,
    )
    checkpoint.load(checked.checkpoint, actor)
    save(config.run.checkpoints, checked.state["step"], actor, checked.state, config.trainer.keep_checkpoints)
    checked.release()
    return checked.checkpoint
