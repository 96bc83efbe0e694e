"""The policy in both of its bodies: the actor that learns and the engine that samples, on the same ranks in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.costs import CONTEXT_BYTES, plain_copies, update_working
from treepo_mcore.actor.parallel import build_grid
from treepo_mcore.actor.saver import Keep, Saver
from treepo_mcore.checks import Context
from treepo_mcore.config import Config
from treepo_mcore.data.prompts import PromptStream
from treepo_mcore.engine.costs import GRAPH_BYTES
from treepo_mcore.engine.vllm.engine import VllmEngine
from treepo_mcore.engine.vllm.layout import vllm_layout, vllm_padding
from treepo_mcore.model.shards import stages
from treepo_mcore.observe.guard import BadNumbersError
from treepo_mcore.records import Batch
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout.evaluation import HeldOut
from treepo_mcore.rollout.phase import Rollout
from treepo_mcore.system.heartbeat import listen_to_nodes
from treepo_mcore.system.machine import this_machine
from treepo_mcore.system.phases import Phase, Phases
from treepo_mcore.system.placement import colocated, limit_waits
from treepo_mcore.weights.export import export_directory
from treepo_mcore.weights.transfer import Push, PushReport, plan_push


class Policy:
    """Actor, engine, the push between them, and whose turn it is. Every rank makes one; all methods are collective."""

    def __init__(self, checked: Context) -> None:
        """Build both with the weights of the model's directory. Everything was checked, the processes have met."""
        config, arch, directory = checked.config, checked.arch, checked.directory
        rank, world = dist.get_rank(), dist.get_world_size()
        self.config, self.arch, self.directory = config, arch, directory
        self.placement = placement = colocated(rank, world, config.rollout.tp)
        self.heartbeat = listen_to_nodes(rank, world, dist.distributed_c10d._get_default_store(), config.comm)
        self.rewards = RewardPool(config.reward) if placement.leads_engine else None
        self.rollbacks = 0
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
        if checked.learns:
            trainer = config.trainer
            keep = Keep(trainer.keep_checkpoints, trainer.keep_every, trainer.keep_best)
            self.saver = Saver(config.run.checkpoints, keep, config.comm.init_timeout_seconds)
            self.phases.before_training = self.saver.wait
        self.limit_waits(config.comm.init_timeout_seconds)

    def limit_waits(self, seconds: float) -> None:
        """How long ranks wait for each other in a collective, but for those of an engine while it samples."""
        limit_waits(seconds)
        self.rollout.limit_waits()
        if self.actor.optimizer is not None:
            self.saver.limit_waits()

    def push(self) -> PushReport:
        """The actor's weights into the engine, which is awake for a rollout afterwards."""
        with self.phases.push(), self.actor.readable():
            return self.weights.run()

    def collect(self, prompts: PromptStream, step: int) -> Batch:
        """Sample a step's trees; behind a push."""
        with self.phases.rollout():
            return self.rollout.collect(prompts, step)

    def evaluate(self, sets: Sequence[HeldOut]) -> dict[str, float]:
        """How the actor's current weights answer: `rollout.evaluation.metrics`, the same on every rank."""
        self.push()
        with self.phases.rollout():
            return self.rollout.evaluate(sets)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Scope in which the actor is whole, and its weights can be read."""
        with self.phases.train(), self.actor.readable():
            yield

    def load(self, iteration: Path) -> None:
        """Weights of a checkpoint, and the optimizer where there is one."""
        with self.phases.train():
            checkpoint.load(iteration, self.actor)

    def roll_back(self, error: BadNumbersError) -> str:
        """Weights and optimizer of the newest checkpoint, for the next step has other prompts; returns what to tell.

        Raises the error where there is no checkpoint, or it happens more than `trainer.max_rollbacks` times.
        """
        self.saver.wait()
        self.rollbacks += 1
        found, most = checkpoint.newest(self.config.run.checkpoints), self.config.trainer.max_rollbacks
        if found is None or self.rollbacks > most:
            raise error
        self.load(found)
        self.rollout.drop_unfinished()
        return f"{error}: back to {found.name}'s weights, and on with other prompts ({self.rollbacks} of {most})"

    def save(self, step: int, state: dict[str, Any], last: bool) -> None:
        """Begin a checkpoint of this step, which is written while the engine samples.

        last: no training follows. It then loads in any layout, for which the optimizer's state is gathered.
        """
        with self.phases.train():
            self.saver.plan(step, self.actor, state, "fully_reshardable" if last else "dp_reshardable")
        self.saver.write(self.actor.memory)

    def export(self, directory: Path) -> None:
        """The weights as a Hugging Face directory, with the files of the one they came from."""
        with self.training():
            actor = self.actor
            export_directory(self.directory, directory, self.arch, actor.pieces, actor.tensors, actor.dtype)

    @property
    def layout(self) -> str:
        """For people."""
        actor, rollout = self.config.actor, self.config.rollout
        experts = f" ep{actor.ep} etp{actor.etp}" if self.arch.experts else ""
        engine = f"rollout-tp{rollout.tp}" + (" with expert parallelism" if rollout.expert_parallel else "")
        context = f" cp{actor.cp}" if actor.cp > 1 else ""
        return f"tp{actor.tp}{context} pp{actor.pp} dp{self.grid.dp}{experts} {engine}"

    def metrics(self) -> dict[str, float]:
        """What moves and checkpoints took since the last call: `Phases.metrics`, `Saver.metrics`."""
        return self.phases.metrics() | self.saver.metrics()

    def describe(self) -> list[str]:
        """Lines for people: who quantises an FP8 engine's weights, and what is predicted of a GPU's memory."""
        lines = []
        if where := self.weights.quantisers:
            cut = [name for name, place in where.items() if place != "owner"]
            some = f", the first {cut[0]}" if cut else ""
            lines.append(f"FP8: {len(where)} weights, {len(cut)} quantised by receivers (shards cut blocks){some}")
        return [*lines, self.phases.describe()] if torch.cuda.is_available() else lines

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
        plan = plan_push(self.actor.pieces, vllm_layout(*where, self.config.rollout.expert_parallel))
        staging_bytes = self.config.rollout.push_staging_mb << 20
        return Push(plan, self.actor.tensors, parameters, padding=vllm_padding(*where), staging_bytes=staging_bytes)


def working_bytes(config: Config, actor: Actor, capability: tuple[int, int] | None) -> dict[Phase, dict[str, int]]:
    """What comes and goes on this rank's GPU in each phase, by the formulas of `actor/costs.py`.

    capability: the GPU's; None on a CPU, where no weight is quantised. Micro-batches are taken to be full. "context" is
    assumed: CUDA, NCCL and what is left of a sleeping engine. FP8 weights are given up with the gradients, or stay.
    """
    grid = actor.grid
    always = {"context": CONTEXT_BYTES, "staging": config.rollout.push_staging_mb << 20}
    stage = stages(config.actor, actor.arch.layers)[grid.pp_rank]
    tokens = config.actor.rank_tokens
    update = update_working(config.actor, actor.arch, stage, grid.pp_rank, tokens, capability or (0, 0))
    if update["FP8 weights"] and "gradients" not in config.memory.offloaded(capability is not None):
        always["FP8 weights"] = update["FP8 weights"]
    plain = plain_copies(config.actor, actor.arch, stage)
    return {
        Phase.PUSH: always | ({"plain copies": plain} if plain else {}),
        Phase.ROLLOUT: always | {"CUDA graphs": GRAPH_BYTES},
        Phase.TRAIN: always | {name: size for name, size in update.items() if size},
    }
