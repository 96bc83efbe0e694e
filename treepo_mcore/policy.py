"""The policy in both of its bodies: the actor that learns and the engine that samples, on the same ranks in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.parallel import build_grid
from treepo_mcore.config import Config
from treepo_mcore.data.prompts import Prompt, PromptStream
from treepo_mcore.data.tokenizer import Tokenizer
from treepo_mcore.engine.vllm.engine import VllmEngine
from treepo_mcore.engine.vllm.layout import vllm_layout, vllm_padding
from treepo_mcore.model.architecture import Architecture
from treepo_mcore.records import Batch
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout.rollout import Rollout
from treepo_mcore.system.machine import this_machine
from treepo_mcore.system.phases import Phases, working_bytes
from treepo_mcore.system.placement import Placement
from treepo_mcore.weights.fp8 import quantisers
from treepo_mcore.weights.hf import export_directory, gather_tensors
from treepo_mcore.weights.transfer import Push, PushReport, plan_push


class Policy:
    """Actor, engine, the push between them, and whose turn it is. Every rank makes one; all methods are collective."""

    def __init__(
        self, config: Config, placement: Placement, arch: Architecture, directory: Path, tokenizer: Tokenizer
    ) -> None:
        """Build both with the weights in `directory`. The process group is there, and everything was checked."""
        self.config, self.placement, self.arch, self.directory = config, placement, arch, directory
        self.rewards = RewardPool(config.reward) if placement.leads_engine else None
        self.grid = build_grid(config.actor, config.run.seed)
        self.actor = Actor(
            config.actor,
            arch,
            directory,
            self.grid,
            temperature=config.rollout.temperature,
            total_steps=config.trainer.steps,
        )
        # Between the two, so that the actor makes room before the engine takes its share.
        self.phases = Phases(config.memory, self.actor, working_bytes(config, self.actor, this_machine().capability))
        self.engine = VllmEngine(config, arch, directory, tokenizer.eos_ids)
        self.phases.attach(self.engine, self.engine.weight_bytes(), self.engine.reserved_bytes())
        with self.training():  # the push looks at the actor's parameters, which must be there for it
            self.weights = self._make_push()
        self.rollout = Rollout(config, placement, self.engine, tokenizer, self.rewards)

    def push(self) -> PushReport:
        """The actor's weights into the engine, which is awake for a rollout afterwards."""
        with self.phases.push(), self.actor.readable():
            return self.weights.run()

    def collect(self, prompts: PromptStream, step: int) -> Batch:
        """Sample a step's trees; behind a push."""
        with self.phases.rollout():
            return self.rollout.collect(prompts, step)

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """How the actor's current weights answer: `rollout.evaluation.metrics`, the same on every rank."""
        self.push()
        with self.phases.rollout():
            return self.rollout.evaluate(prompts)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Scope in which the actor is whole, and its weights can be read."""
        with self.phases.train(), self.actor.readable():
            yield

    def load(self, iteration: Path) -> None:
        """Weights and optimizer of a checkpoint."""
        with self.phases.train():
            checkpoint.load(iteration, self.actor)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint of this step, beside those that are kept."""
        folder, keep = self.config.run.dir / "checkpoints", self.config.trainer.keep_checkpoints
        with self.phases.train():
            checkpoint.save(folder, step, self.actor, state, keep)

    def export(self, directory: Path) -> None:
        """The weights as a Hugging Face directory, with the files of the one they came from."""
        with self.training():
            named = gather_tensors(self.arch, self.actor.pieces, self.actor.tensors, self.actor.dtype, to=0)
            export_directory(self.directory, directory, named)

    @property
    def layout(self) -> str:
        """For people."""
        return f"tp{self.grid.tp} pp{self.grid.pp} dp{self.grid.dp} rollout-tp{self.config.rollout.tp}"

    def who_quantises(self) -> str | None:
        """A line about an FP8 engine's weights: by whom they are quantised; None without one."""
        where = quantisers(self.weights.plan)
        if not where:
            return None
        cut = [name for name, place in where.items() if place != "owner"]
        some = f", the first {cut[0]}" if cut else ""
        return f"FP8: {len(where)} weights, {len(cut)} quantised by receivers (shards cut blocks){some}"

    def close(self) -> None:
        """End the reward workers."""
        if self.rewards is not None:
            self.rewards.close()

    def _make_push(self) -> Push:
        """From the actor's shards into the engine's parameters; the plan is made once."""
        parameters = self.engine.parameters()
        where = (parameters, self.arch, self.config.rollout.tp, self.placement.engine_rank)
        plan = plan_push(self.actor.pieces, vllm_layout(*where))
        staging_bytes = self.config.rollout.push_staging_mb << 20
        return Push(plan, self.actor.tensors, parameters, padding=vllm_padding(*where), staging_bytes=staging_bytes)
