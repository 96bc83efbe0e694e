"""The loop: push, roll out, choose, learn; and what surrounds it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.model import megatron_configs
from treepo_mcore.config import Config, ConfigError, check_grid, dump_config
from treepo_mcore.data.prompts import Prompt, PromptStream, check_token_ids, load_prompts
from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.engine.vllm.engine import check_engine, engine_arguments
from treepo_mcore.grow.pruning import make_pruner
from treepo_mcore.learn.filter import choose
from treepo_mcore.learn.step import learn
from treepo_mcore.model.architecture import read_architecture, resolve_model
from treepo_mcore.observe.guard import MismatchGuard
from treepo_mcore.observe.metrics import Clock, Metrics, rollout_metrics
from treepo_mcore.observe.observer import Observer, Observers, Wish
from treepo_mcore.observe.progress import Progress
from treepo_mcore.observe.trackers import check_trackers
from treepo_mcore.observe.trees import TreeWriter
from treepo_mcore.policy import Policy
from treepo_mcore.records import Step
from treepo_mcore.system.heartbeat import listen_to_nodes
from treepo_mcore.system.phases import check_allocator, check_host_memory, local_ranks
from treepo_mcore.system.placement import colocated, init_process_group
from treepo_mcore.system.signals import STOPPED, StopRequest
from treepo_mcore.system.versions import versions
from treepo_mcore.weights.hf import check_weights

POLICY = "policy"  # below run.dir: what was trained, as a Hugging Face directory


class Trainer:
    """A run from its configuration. Every rank makes one and calls `run`."""

    def __init__(
        self,
        config: Config,
        stop: StopRequest | None = None,
        observers: Sequence[Observer] = (),
        *,
        trains: bool = True,
    ) -> None:
        """Check everything that can be checked, then build. Raises `ConfigError` before any model is built.

        stop: looked at between steps; on which ranks it was asked does not matter. observers: beside the usual ones, of
        this rank. trains: False where `evaluate_newest` is called in place of `run`, and prompts to train on are not
        needed.
        """
        self.config = config
        self.stop = stop or StopRequest()
        self._check(trains)
        self.placement = colocated(dist.get_rank(), dist.get_world_size(), config.rollout.tp)
        self.policy = Policy(config, self.placement, self.arch, self.directory, self.tokenizer)
        self.observers = Observers([*self._usual_observers(), *observers])
        self.step = 0
        self.saved: int | None = None  # step of the newest checkpoint
        self.accuracy_before: float | None = None  # before the very first step, also in a resumed run

    def run(self) -> dict[str, Any]:
        """Train to the configured end; returns the summary that is also written to ``summary.json``.

        Asked to stop, it saves after the step that is under way and returns a summary with `stopped`, the signal's
        name or "observer"; nothing else is written then.
        """
        self._start()
        trainer = self.config.trainer
        if trainer.eval_before and self.held_out and self.step == 0:
            self.accuracy_before = self._evaluate()
        begin = time.perf_counter()
        self.clock = Clock(lambda part: self.observers.part(self.step, part))
        while self.step < trainer.steps and not self._out_of_time(begin):
            if asked := self._asked_to_stop():
                return self._stop(asked)
            wish = self.train_step()
            self.step += 1
            if wish is Wish.STOP:
                return self._stop("observer")
            if self._asked_to_stop():
                continue  # an evaluation would keep it waiting
            if self.held_out and self._due(trainer.eval_every):
                with self.clock.part("evaluate"):
                    self._evaluate()
            if wish is Wish.SAVE or self._due(trainer.save_every):
                with self.clock.part("save"):
                    self._save()
        seconds = time.perf_counter() - begin
        if asked := self._asked_to_stop():
            return self._stop(asked)
        return self._finish(seconds)

    def train_step(self) -> Wish:
        """One rollout and its updates; returns what the observers ask for."""
        policy, clock = self.policy, self.clock
        policy.phases.metrics()  # what an evaluation took is not this step's
        with clock.part("push"):
            push = policy.push()
        with clock.part("rollout"):
            step = Step(self.step, policy.collect(self.prompts, self.step))
        with clock.part("choose"):
            step.values |= rollout_metrics(step.batch, clock.seconds["rollout"])
            step.values |= {f"push/{name}": value for name, value in vars(push).items()}
            step.kept = choose(step.batch.trees, self.config, self.step)
        if self.observers.sampled(step) is not Wish.SKIP:
            with clock.part("update"), policy.phases.train():
                learn(policy.actor, step, self.config)
        step.values |= policy.phases.metrics() | {"filter/kept": len(step.kept) / max(len(step.batch.trees), 1)}
        step.seconds = clock.look()
        with clock.part("observe"):
            return self.observers.trained(step)

    def evaluate_newest(self) -> dict[str, Any]:
        """Instead of `run`: evaluate the newest checkpoint, or the model; the result is also in ``eval.json``."""
        self._load()
        result = {
            "step": self.step,
            "checkpoint": self.checkpoint is not None,
            "prompts": len(self.held_out),
            "samples": self.config.trainer.eval_samples,
            **self.policy.evaluate(self.held_out),
            "seed": self.config.run.seed,
            "layout": self.policy.layout,
        }
        self._write("eval.json", json.dumps(result) + "\n")
        self.close()
        return result

    def close(self) -> None:
        """End what runs beside the trainer, and tell the other nodes that this one is done."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        self.policy.close()
        self.observers.close()

    def _check(self, trains: bool) -> None:
        config = self.config
        check_trackers(config.run.trackers)
        self.directory = resolve_model(config.model)
        if trains and config.trainer.export and self.directory.resolve() == (config.run.dir / POLICY).resolve():
            raise ConfigError(f"model.path: {self.directory} is where run.dir puts the trained policy")
        self.arch = read_architecture(self.directory)
        check_weights(self.directory, self.arch)
        self.tokenizer = load_tokenizer(self.directory)
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

    def _usual_observers(self) -> list[Observer]:
        """The guard is on every rank, and comes last: by then the values that it ends a run for are written."""
        config = self.config
        guard: list[Observer] = [MismatchGuard(config.actor)]
        if not self.placement.reports:
            return guard
        every = config.trainer.save_trees_every
        trees = [TreeWriter(config.run.dir, every)] if every else []
        return [Metrics(config), *trees, Progress(config.trainer.steps), *guard]

    def _load(self) -> None:
        """Weights, optimizer and state of the newest checkpoint, if there is one."""
        if self.checkpoint is None or self.state is None:
            return
        self.policy.load(self.checkpoint)
        self.step = self.saved = self.state["step"]
        self.accuracy_before = self.state["accuracy_before"]

    def _start(self) -> None:
        run = self.config.run
        self._load()
        if self.placement.reports and not run.resume:
            # Or a run that is cut off before it saves would be continued as the one before it.
            checkpoint.forget(run.dir / "checkpoints")
        self._write("config.yaml", dump_config(self.config))
        self._write("versions.json", json.dumps(versions(), indent=1))
        self.observers.start(self.step)
        if told := self.policy.who_quantises():
            self.observers.say(told)
        where = "resumed at" if self.checkpoint else "start at"
        self.observers.say(f"{where} step {self.step}  {self.policy.layout}  -> {run.dir}")
        if torch.cuda.is_available():
            self.observers.say(self.policy.phases.describe())
        dist.barrier()

    def _evaluate(self) -> float:
        values = self.policy.evaluate(self.held_out)
        self.observers.evaluated(self.step, values)
        return values["eval/accuracy"]

    def _due(self, every: int) -> bool:
        """Between steps; the end has its own evaluation and checkpoint."""
        return every > 0 and self.step % every == 0 and self.step < self.config.trainer.steps

    def _save(self) -> None:
        """Unless this very step is saved: the tracker must not name a checkpoint that is being rewritten.

        Before the first step there is nothing that the same command would not make again.
        """
        if self.step in (0, self.saved):
            return
        state = {
            "step": self.step,
            "accuracy_before": self.accuracy_before,
            "prompts": self.prompts.state_dict(),
            "optimizer": self._optimizer_settings(),
        }
        self.policy.save(self.step, state)
        self.saved = self.step

    def _finish(self, seconds: float) -> dict[str, Any]:
        trainer, run = self.config.trainer, self.config.run
        self._save()  # before an evaluation that may be the one thing too many for the time a job has
        after = self._evaluate() if trainer.eval_after and self.held_out else None
        if trainer.export:
            self.policy.export(run.dir / POLICY)
        summary = {
            "accuracy_before": self.accuracy_before,
            "accuracy_after": after,
            "steps": self.step,
            "train_seconds": round(seconds, 1),
            "seed": run.seed,
            "layout": self.policy.layout,
        }
        self._write("summary.json", json.dumps(summary) + "\n")
        self.close()
        return summary

    def _stop(self, asked: str) -> dict[str, Any]:
        self._save()
        done = f"saved at step {self.step}" if self.step else "nothing to save yet"
        how = "the same command" if self.config.run.resume else "run.resume=true"
        self.observers.say(f"{asked}: {done}, exit status {STOPPED}; {how} goes on")
        self.close()
        return {"stopped": asked, "steps": self.step, "seed": self.config.run.seed, "layout": self.policy.layout}

    def _write(self, name: str, text: str) -> None:
        """A file of run.dir, by the rank that reports."""
        if self.placement.reports:
            self.config.run.dir.mkdir(parents=True, exist_ok=True)
            (self.config.run.dir / name).write_text(text)

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
