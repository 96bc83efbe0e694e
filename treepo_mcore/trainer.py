"""The loop: push, roll out, exchange, advantages, pack, update; and what surrounds it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.model import megatron_configs
from treepo_mcore.actor.parallel import build_grid
from treepo_mcore.config import Config, ConfigError, check_grid, dump_config
from treepo_mcore.data.prompts import Prompt, PromptStream, check_token_ids, load_prompts
from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.engine.vllm.engine import VllmEngine, check_engine, engine_arguments
from treepo_mcore.engine.vllm.layout import vllm_layout, vllm_padding
from treepo_mcore.grow.pruning import make_pruner
from treepo_mcore.learn.step import choose, learn
from treepo_mcore.model.architecture import read_architecture, resolve_model
from treepo_mcore.observe.metrics import Clock, MetricsLog, rollout_metrics
from treepo_mcore.observe.progress import Progress
from treepo_mcore.observe.trackers import Tracker, check_trackers, open_trackers
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout.rollout import Rollout
from treepo_mcore.system.heartbeat import listen_to_nodes
from treepo_mcore.system.machine import this_machine
from treepo_mcore.system.phases import Phases, check_allocator, check_host_memory, local_ranks, working_bytes
from treepo_mcore.system.placement import colocated, init_process_group
from treepo_mcore.system.signals import STOPPED, StopRequest
from treepo_mcore.system.versions import versions
from treepo_mcore.tree.tree import Tree, write_trees
from treepo_mcore.weights.fp8 import quantisers
from treepo_mcore.weights.hf import check_weights, export_directory, gather_tensors
from treepo_mcore.weights.transfer import Push, plan_push

POLICY = "policy"  # below run.dir: what was trained, as a Hugging Face directory


class Trainer:
    """A run from its configuration. Every rank makes one and calls `run`."""

    def __init__(self, config: Config, stop: StopRequest | None = None, *, trains: bool = True) -> None:
        """Check everything that can be checked, then build. Raises `ConfigError` before any model is built.

        stop: looked at between steps; on which ranks it was asked does not matter. trains: False where
        `evaluate_newest` is called in place of `run`, and prompts to train on are not needed.
        """
        self.config = config
        self.stop = stop or StopRequest()
        check_trackers(config.run.trackers)
        self.directory = resolve_model(config.model)
        if trains and config.trainer.export and self.directory.resolve() == (config.run.dir / POLICY).resolve():
            raise ConfigError(f"model.path: {self.directory} is where run.dir puts the trained policy")
        self.arch = read_architecture(self.directory)
        check_weights(self.directory, self.arch)
        tokenizer = self.tokenizer = load_tokenizer(self.directory)
        self.held_out = self._load_prompts(config.data.eval) if config.data.eval else []
        self.checkpoint = checkpoint.newest(config.run.dir / "checkpoints") if config.run.resume or not trains else None
        self.state = checkpoint.read_state(self.checkpoint) if self.checkpoint else None
        self._check_optimizer()
        if trains:
            self.prompts = PromptStream(self._load_prompts(config.data.train), config.run.seed, config.data.shuffle)
            if self.state:
                self.prompts.load_state_dict(self.state["prompts"])
        make_pruner(config.rollout.tree.pruning)
        engine_arguments(config, self.arch, self.directory)
        megatron_configs(config.actor, self.arch)
        check_allocator(os.environ, config.rollout)
        init_process_group()
        check_grid(config, dist.get_world_size())
        checkpoint.check_same(config.run.dir, self.checkpoint)
        check_host_memory(config, self.arch, dist.get_world_size(), local_ranks(), torch.cuda.is_available())
        check_engine(config, self.arch, self.directory)
        store = dist.distributed_c10d._get_default_store()
        self.heartbeat = listen_to_nodes(dist.get_rank(), dist.get_world_size(), store)
        self.placement = colocated(dist.get_rank(), dist.get_world_size(), config.rollout.tp)
        self.rewards = RewardPool(config.reward) if self.placement.leads_engine else None
        self.grid = build_grid(config.actor, config.run.seed)
        self.actor = Actor(
            config.actor,
            self.arch,
            self.directory,
            self.grid,
            temperature=config.rollout.temperature,
            total_steps=config.trainer.steps,
        )
        self.phases = Phases(config.memory, self.actor, working_bytes(config, self.actor, this_machine().capability))
        self.engine = VllmEngine(config, self.arch, self.directory, tokenizer.eos_ids)
        self.phases.attach(self.engine, self.engine.weight_bytes(), self.engine.reserved_bytes())
        # The push looks at the actor's parameters, which must be there for it.
        with self.phases.train(), self.actor.readable():
            self.push = self._make_push()
        self.rollout = Rollout(config, self.placement, self.engine, tokenizer, self.rewards)
        self.progress = Progress(config.trainer.steps, self.placement.reports)
        self._say_who_quantises()
        self.step = 0
        self.saved: int | None = None  # step of the newest checkpoint
        self.trackers: list[Tracker] = []  # on rank 0, once the step is known
        self.accuracy_before: float | None = None  # before the very first step, also in a resumed run

    def run(self) -> dict[str, Any]:
        """Train to the configured end; returns the summary that is also written to ``summary.json``.

        Asked to stop, it saves after the step that is under way and returns a summary with `stopped`, the signal's
        name; nothing else is written then.
        """
        self._resume()
        trainer = self.config.trainer
        if trainer.eval_before and self.held_out and self.step == 0:
            self.accuracy_before = self._evaluate_and_say("before training")
        begin = time.perf_counter()
        self.progress.start(self.step)
        while self.step < trainer.steps and not self._out_of_time(begin):
            if asked := self._asked_to_stop():
                return self._stop(asked)
            values = self.train_step()
            self.progress.step(self.step, values)
            self._write(values)
            self.step += 1
            if self._asked_to_stop():
                continue  # an evaluation would keep it waiting
            if self.held_out and self._due(trainer.eval_every):
                self._evaluate_and_say(f"after {self.step} steps")
            if self._due(trainer.save_every):
                self._save()
        seconds = time.perf_counter() - begin
        if asked := self._asked_to_stop():
            return self._stop(asked)
        return self._finish(seconds)

    def _due(self, every: int) -> bool:
        """Between steps; the end has its own evaluation and checkpoint."""
        return every > 0 and self.step % every == 0 and self.step < self.config.trainer.steps

    def train_step(self) -> dict[str, Any]:
        """One rollout phase and its updates."""
        self.phases.metrics()  # what an evaluation took is not this step's
        clock = Clock(lambda phase: self.progress.phase(self.step, phase))
        with self.phases.push(), clock.phase("push"), self.actor.readable():
            push = self.push.run()
        with self.phases.rollout(), clock.phase("rollout"):
            trees, counts = self.rollout.collect(self.prompts, self.step)
        values = rollout_metrics(trees, counts, clock.seconds["rollout"])
        values |= {f"push/{name}": value for name, value in vars(push).items()}
        kept = choose(trees, self.config, self.step)
        with self.phases.train(), clock.phase("update"):
            values |= learn(self.actor, kept, self.config, self.step)
        values |= {f"time/{name}": seconds for name, seconds in clock.seconds.items()} | self.phases.metrics()
        values["filter/kept"] = len(kept) / max(len(trees), 1)
        self._save_trees(trees)
        return values

    def evaluate(self) -> dict[str, float]:
        """How the actor's current weights answer the held-out prompts: `rollout.evaluation.metrics`."""
        with self.phases.push(), self.actor.readable():
            self.push.run()
        with self.phases.rollout():
            return self.rollout.evaluate(self.held_out)

    def evaluate_newest(self) -> dict[str, Any]:
        """Instead of `run`: evaluate the newest checkpoint, or the model; the result is also in ``eval.json``."""
        self._load()
        values = self.evaluate()
        result = {
            "step": self.step,
            "checkpoint": self.checkpoint is not None,
            "prompts": len(self.held_out),
            "samples": self.config.trainer.eval_samples,
            **values,
            "seed": self.config.run.seed,
            "layout": self._layout(),
        }
        if self.placement.reports:
            self.config.run.dir.mkdir(parents=True, exist_ok=True)
            (self.config.run.dir / "eval.json").write_text(json.dumps(result) + "\n")
        self.close()
        return result

    def _make_push(self) -> Push:
        """From the actor's shards into the engine's parameters; the plan is made once."""
        parameters = self.engine.parameters()
        where = (parameters, self.arch, self.config.rollout.tp, self.placement.engine_rank)
        plan = plan_push(self.actor.pieces, vllm_layout(*where))
        staging_bytes = self.config.rollout.push_staging_mb << 20
        return Push(plan, self.actor.tensors, parameters, padding=vllm_padding(*where), staging_bytes=staging_bytes)

    def _say_who_quantises(self) -> None:
        where = quantisers(self.push.plan)
        if where:
            cut = [name for name, place in where.items() if place != "owner"]
            some = f", the first {cut[0]}" if cut else ""
            self.progress.say(f"FP8: {len(where)} weights, {len(cut)} quantised by receivers (shards cut blocks){some}")

    def _load_prompts(self, file: Path) -> list[Prompt]:
        prompts = load_prompts(file, self.config.data, self.tokenizer)
        check_token_ids(prompts, self.arch.vocab)
        return prompts

    def _optimizer_settings(self) -> dict[str, Any]:
        """What Megatron finds its parameter groups by, or takes from a checkpoint whatever the configuration says."""
        names = {"distributed", "lr", "min_lr", "betas", "eps"}
        return self.config.actor.optimizer.model_dump(mode="json", include=names)

    def _check_optimizer(self) -> None:
        if self.state is None:
            return
        saved = self.state.get("optimizer")
        if saved is None:
            raise ConfigError(
                f"{self.checkpoint}: of an earlier version of this package; run.resume: false begins anew"
            )
        for name, value in self._optimizer_settings().items():
            before = saved[name]
            if value != before:
                raise ConfigError(
                    f"actor.optimizer.{name}: found {value}, {self.checkpoint} was made with {before}; a run goes on "
                    "as it began. For another value start a new run.dir from its exported weights"
                )

    def _load(self) -> None:
        """Weights, optimizer and state of the newest checkpoint, if there is one."""
        if self.checkpoint is None or self.state is None:
            return
        with self.phases.train():
            checkpoint.load(self.checkpoint, self.actor)
        self.step = self.saved = self.state["step"]
        self.accuracy_before = self.state["accuracy_before"]

    def _resume(self) -> None:
        run = self.config.run
        self._load()
        if self.placement.reports:
            run.dir.mkdir(parents=True, exist_ok=True)
            if not run.resume:  # or a run that is cut off before it saves would be continued as the one before it
                checkpoint.forget(run.dir / "checkpoints")
            (run.dir / "config.yaml").write_text(dump_config(self.config))
            (run.dir / "versions.json").write_text(json.dumps(versions(), indent=1))
            self.metrics = MetricsLog(run.dir, self.step)
            self.trackers = open_trackers(self.config, self.step)
        where = "resumed at" if self.checkpoint else "start at"
        self.progress.say(f"{where} step {self.step}  {self._layout()}  -> {run.dir}")
        if torch.cuda.is_available():
            self.progress.say(self.phases.describe())
        dist.barrier()

    def _finish(self, seconds: float) -> dict[str, Any]:
        trainer, run = self.config.trainer, self.config.run
        self._save()  # before an evaluation that may be the one thing too many for the time a job has
        after = self._evaluate_and_say("after training") if trainer.eval_after and self.held_out else None
        if trainer.export:
            with self.phases.train(), self.actor.readable():
                named = gather_tensors(self.arch, self.actor.pieces, self.actor.tensors, self.actor.dtype, to=0)
                export_directory(self.directory, run.dir / POLICY, named)
        summary = {
            "accuracy_before": self.accuracy_before,
            "accuracy_after": after,
            "steps": self.step,
            "train_seconds": round(seconds, 1),
            "seed": run.seed,
            "layout": self._layout(),
        }
        if self.placement.reports:
            (run.dir / "summary.json").write_text(json.dumps(summary) + "\n")
        self.close()
        return summary

    def _stop(self, asked: str) -> dict[str, Any]:
        self._save()
        done = f"saved at step {self.step}" if self.step else "nothing to save yet"
        how = "the same command" if self.config.run.resume else "run.resume=true"
        self.progress.say(f"{asked}: {done}, exit status {STOPPED}; {how} goes on")
        self.close()
        return {"stopped": asked, "steps": self.step, "seed": self.config.run.seed, "layout": self._layout()}

    def close(self) -> None:
        """End the reward workers and trackers, and tell the other nodes that this one is done."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        if self.rewards is not None:
            self.rewards.close()
        for tracker in self.trackers:
            tracker.close()

    def _save(self) -> None:
        """Unless this very step is saved: the tracker must not name a checkpoint that is being rewritten.

        Before the first step there is nothing that the same command would not make again.
        """
        if self.step in (0, self.saved):
            return
        trainer = self.config.trainer
        state = {
            "step": self.step,
            "accuracy_before": self.accuracy_before,
            "prompts": self.prompts.state_dict(),
            "optimizer": self._optimizer_settings(),
        }
        with self.phases.train():
            checkpoint.save(self.config.run.dir / "checkpoints", self.step, self.actor, state, trainer.keep_checkpoints)
        self.saved = self.step

    def _evaluate_and_say(self, when: str) -> float:
        values = self.evaluate()
        told = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
        self.progress.say(f"held-out {told} {when}")
        self._write(values)
        return values["eval/accuracy"]

    def _write(self, values: dict[str, Any]) -> None:
        if self.placement.reports:
            self.metrics.write(self.step, values)
        for tracker in self.trackers:
            tracker.write(self.step, values)

    def _save_trees(self, trees: list[Tree]) -> None:
        every = self.config.trainer.save_trees_every
        if every and self.step % every == 0 and self.placement.reports:
            folder = self.config.run.dir / "trees"
            folder.mkdir(exist_ok=True)
            write_trees(folder / f"step_{self.step:06d}.jsonl", trees)

    def _out_of_time(self, begin: float) -> bool:
        """Rank 0's clock decides for all."""
        limit = self.config.trainer.max_seconds
        if limit is None:
            return False
        late = torch.tensor(int(time.perf_counter() - begin > limit))
        dist.broadcast(late, 0)
        return bool(late)

    def _asked_to_stop(self) -> str | None:
        """The signal that any rank has got; the ranks get it at different times, or only one of them does."""
        asked = torch.tensor(self.stop.number)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return signal.Signals(int(asked)).name if asked else None

    def _layout(self) -> str:
        return f"tp{self.grid.tp} pp{self.grid.pp} dp{self.grid.dp} rollout-tp{self.config.rollout.tp}"
