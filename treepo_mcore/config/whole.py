"""All sections, and the rules between them."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from treepo_mcore.config.actor import ActorConfig
from treepo_mcore.config.base import ConfigError, Section
from treepo_mcore.config.learn import AdvantageConfig, FilterConfig
from treepo_mcore.config.rewards import RewardConfig
from treepo_mcore.config.rollout import RolloutConfig
from treepo_mcore.config.run import (
    CommConfig,
    DataConfig,
    HeldOutConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
)


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    filter: FilterConfig = FilterConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    actor: ActorConfig = ActorConfig()
    memory: MemoryConfig = MemoryConfig()
    comm: CommConfig = CommConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.trainer.prompts_per_update > self.trainer.prompts_per_step:
            raise ValueError(
                f"trainer.prompts_per_update: {self.trainer.prompts_per_update} is more than "
                f"trainer.prompts_per_step = {self.trainer.prompts_per_step}"
            )
        longest = self.data.max_prompt_tokens + self.rollout.tree.response_tokens
        if self.actor.micro_batch_tokens < longest:
            raise ValueError(
                f"actor.micro_batch_tokens: {self.actor.micro_batch_tokens} is less than the longest path, "
                f"data.max_prompt_tokens + the longest response = {longest}"
            )
        if self.rollout.tree.branching.schedule == "auto" and self.reward.shuffle:
            raise ValueError("rollout.tree.branching.schedule: auto needs rewards to learn from, found reward.shuffle")
        estimator, sampled = self.advantage.estimator, self.rollout.sampler == "tree" and self.rollout.tree.width > 1
        if self.advantage.by_mass and sampled and self._first_paths < 2:
            raise ValueError(
                f"advantage.estimator: {estimator} gives no value to tokens that all leaves share; expected two first "
                f"paths or more, found {self._first_paths}"
            )
        for name, held_out in self.held_out.items():
            if held_out.temperature == 0 and held_out.samples != 1:
                raise ValueError(f"data.eval.{name}.temperature: 0 gives the same answer {held_out.samples} times")
        early = self.rollout.tree.early_stop.leaves
        if early is not None and self.rollout.sampler == "tree" and early > self._first_paths:
            raise ValueError(
                f"rollout.tree.early_stop.leaves: {early} is more than a prompt's first paths, {self._first_paths}"
            )
        return self

    @property
    def held_out(self) -> dict[str, HeldOutConfig]:
        """The sets of held-out prompts by name, with nothing left to a default; the name of a single file is empty."""
        given = self.data.eval
        sets = {"": HeldOutConfig(path=given)} if isinstance(given, Path) else given or {}
        return {name: self._filled(held_out) for name, held_out in sets.items()}

    def _filled(self, held_out: HeldOutConfig) -> HeldOutConfig:
        samples = held_out.samples or self.trainer.eval_samples
        temperature = held_out.temperature
        if temperature is None:
            temperature = self.rollout.temperature if samples > 1 else 0.0
        longest = held_out.max_response_tokens or self.rollout.tree.response_tokens
        given = {"samples": samples, "temperature": temperature, "max_response_tokens": longest}
        return held_out.model_copy(update=given)

    @property
    def longest_response(self) -> int:
        """In tokens, of training and evaluation."""
        lengths = [held_out.max_response_tokens or 0 for held_out in self.held_out.values()]
        return max([self.rollout.tree.response_tokens, *lengths])

    @property
    def _first_paths(self) -> int:
        """Of a tree, at least."""
        branching = self.rollout.tree.branching
        if branching.schedule == "auto":
            return (self.rollout.tree.width + 1) // 2
        return branching.schedule[0][1] if branching.schedule else (branching.first or branching.factor)[0]


def check_grid(config: Config, world: int) -> None:
    """Raise `ConfigError` when the processes do not fill the layout."""
    actor, rollout = config.actor, config.rollout
    model = actor.replica
    if world % model:
        raise ConfigError(
            f"actor.tp x actor.cp x actor.pp = {actor.tp} x {actor.cp} x {actor.pp}: {world} processes are not a "
            f"multiple of {model}; start torchrun with --nproc-per-node {model * max(1, world // model)} "
            "or change the layout"
        )
    if (world // actor.pp) % (actor.ep * actor.etp):
        raise ConfigError(
            f"actor.ep x actor.etp = {actor.ep} x {actor.etp}: the {world // actor.pp} ranks of a pipeline stage are "
            f"not a multiple of {actor.ep * actor.etp}"
        )
    if world % rollout.tp:
        raise ConfigError(f"rollout.tp: {world} processes are not a multiple of {rollout.tp}")
