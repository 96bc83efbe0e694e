"""The policy in both of its bodies: the actor that learns and the engine that samples, on the same ranks in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.costs import CONTEXT_BYTES, plain_copies, update_working
from treepo_mcore.actor.parallel import build_grid
from treepo_mcore.checks import Context
from treepo_mcore.config import Config
from treepo_mcore.data.prompts import Prompt, PromptStream
from treepo_mcore.engine.costs import GRAPH_BYTES
from treepo_mcore.engine.vllm.engine import VllmEngine
from treepo_mcore.engine.vllm.layout import vllm_layout, vllm_padding
from treepo_mcore.model.shards import Stage
from treepo_mcore.records import Batch
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout.phase import Rollout
from treepo_mcore.system.heartbeat import listen_to_nodes
from treepo_mcore.system.machine import this_machine
from treepo_mcore.system.phases import Phase, Phases
from treepo_mcore.system.placement import colocated
from treepo_mcore.weights.fp8 import quantisers
from treepo_mcore.weights.hf import export_directory, gather_tensors
from treepo_mcore.weights.transfer import Push, PushReport, plan_push


class Policy:
    """Actor, engine, the push between them, and whose turn it is. Every rank makes one; all methods are collective."""

    def __init__(self, checked: Context) -> None:
        """Build both with the weights of the model's directory. Everything was checked, the processes have met."""
        config, arch, directory = checked.config, checked.arch, checked.directory
        rank, world = dist.get_rank(), dist.get_world_size()
        self.config, self.arch, self.directory = config, arch, directory
        self.placement = placement = colocated(rank, world, config.rollout.tp)
        self.heartbeat = listen_to_nodes(rank, world, dist.distributed_c10d._get_default_store())
        self.rewards = RewardPool(config.reward) if placement.leads_engine else None
        self.grid = build_grid(config.actor, config.run.seed)
        self.actor = Actor(
            config.actor,
            arch,
            directory,
            self.grid,
            temperature=config.rollout.temperature,
            total_steps=config.trainer.steps,
            learns=checked.learns,
        )
        # Between the two, so that the actor makes room before the engine takes its share.
        working = working_bytes(config, self.actor, this_machine().capability)
        self.phases = Phases(config.memory, self.actor.memory, working)
        self.engine = VllmEngine(config, arch, directory, checked.tokenizer.eos_ids)
        self.phases.attach(self.engine, self.engine.weight_bytes(), self.engine.reserved_bytes())
        with self.training():  # the push looks at the actor's parameters, which must be there for it
            self.weights = self._make_push()
        self.rollout = Rollout(config, placement, self.engine, checked.tokenizer, self.rewards)

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
        """Weights of a checkpoint, and the optimizer where there is one."""
        with self.phases.train():
            checkpoint.load(iteration, self.actor)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint of this step, beside those that are kept."""
        folder, keep = self.config.run.checkpoints, self.config.trainer.keep_checkpoints
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
        """End the reward workers, and tell the other nodes that this one is done."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        if self.rewards is not None:
            self.rewards.close()

    def _make_push(self) -> Push:
        """From the actor's shards into the engine's parameters; the plan is made once."""
        parameters = self.engine.parameters()
        where = (parameters, self.arch, self.config.rollout.tp, self.placement.engine_rank)
        plan = plan_push(self.actor.pieces, vllm_layout(*where))
        staging_bytes = self.config.rollout.push_staging_mb << 20
        return Push(plan, self.actor.tensors, parameters, padding=vllm_padding(*where), staging_bytes=staging_bytes)


def working_bytes(config: Config, actor: Actor, capability: tuple[int, int] | None) -> dict[Phase, dict[str, int]]:
    """What comes and goes on this rank's GPU in each phase, by the formulas of `actor/costs.py`.

    capability: the GPU's; None on a CPU, where no weight is quantised. Micro-batches are taken to be full. "context" is
    assumed: CUDA, NCCL and what is left of a sleeping engine. FP8 weights are given up with the gradients, or stay.
    """
    grid = actor.grid
    always = {"context": CONTEXT_BYTES, "staging": config.rollout.push_staging_mb << 20}
    stage = Stage(actor.layers, grid.pp_rank == 0, grid.pp_rank == grid.pp - 1)
    tokens = config.actor.micro_batch_tokens
    update = update_working(config.actor, actor.arch, stage, grid.pp_rank, tokens, capability or (0, 0))
    if update["FP8 weights"] and "gradients" not in config.memory.offloaded(capability is not None):
        always["FP8 weights"] = update["FP8 weights"]
    plain = plain_copies(config.actor, actor.arch, stage)
    return {
        Phase.PUSH: always | ({"plain copies": plain} if plain else {}),
        Phase.ROLLOUT: always | {"CUDA graphs": GRAPH_BYTES},
        Phase.TRAIN: always | {name: size for name, size in update.items() if size},
    }
