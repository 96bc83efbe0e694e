"""The loop: push, roll out, choose, learn; and what surrounds it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from treepo_mcore.actor import checkpoint
from treepo_mcore.checks import POLICY, Context, check_and_meet, optimizer_settings
from treepo_mcore.config import Config, dump_config
from treepo_mcore.learn.filter import choose
from treepo_mcore.learn.step import learn
from treepo_mcore.observe.metrics import Clock, rollout_metrics
from treepo_mcore.observe.observer import Observer, Observers, Wish
from treepo_mcore.observe.usual import usual_observers
from treepo_mcore.policy import Policy
from treepo_mcore.records import Step
from treepo_mcore.system.garbage import Garbage
from treepo_mcore.system.signals import STOPPED, StopRequest, out_of_time
from treepo_mcore.system.versions import versions


class Trainer:
    """A run from its configuration. Every rank makes one and calls `run`."""

    def __init__(
        self,
        config: Config,
        stop: StopRequest | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Check everything that can be checked, then build. Raises `ConfigError` before any model is built.

        stop: looked at between steps; on which ranks it was asked does not matter. observers: beside the usual ones, of
        this rank.
        """
        self.config = config
        self.stop = stop or StopRequest()
        self.checked = Context(config)
        check_and_meet(self.checked)
        self.policy = Policy(self.checked)
        self.observers = Observers([*usual_observers(config, self.policy.placement.reports), *observers])
        self.garbage = Garbage()
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
        if trainer.eval_before and self.checked.held_out and self.step == 0:
            self.accuracy_before = self._evaluate()
        self.stop.begin_steps()
        begin = time.perf_counter()
        self.clock = Clock(lambda part: self.observers.part(self.step, part))
        self.garbage.begin()
        while self.step < trainer.steps and not out_of_time(begin, trainer.max_seconds):
            if asked := self.stop.on_any_rank():
                return self._stop(asked)
            wish = self.train_step()
            self.step += 1
            self.garbage.step(self.step)
            if wish is Wish.STOP:
                return self._stop("observer")
            if self.stop.on_any_rank():
                continue  # an evaluation would keep it waiting
            if self.checked.held_out and self._due(trainer.eval_every):
                with self.clock.part("evaluate"):
                    self._evaluate()
            if wish is Wish.SAVE or self._due(trainer.save_every):
                with self.clock.part("save"):
                    self._save()
        seconds = time.perf_counter() - begin
        if asked := self.stop.on_any_rank():
            return self._stop(asked)
        return self._finish(seconds)

    def train_step(self) -> Wish:
        """One rollout and its updates; returns what the observers ask for."""
        policy, clock = self.policy, self.clock
        policy.phases.metrics()  # what an evaluation took is not this step's
        with clock.part("push"):
            push = policy.push()
        with clock.part("rollout"):
            step = Step(self.step, policy.collect(self.checked.prompts, self.step))
        with clock.part("choose"):
            step.values |= rollout_metrics(step.batch, clock.seconds["rollout"])
            step.values |= {f"push/{name}": value for name, value in vars(push).items()}
            step.kept = choose([*step.batch.trees, *step.batch.restarts], self.config, self.step)
        if self.observers.sampled(step) is not Wish.SKIP:
            with clock.part("update"), policy.phases.train():
                learn(policy.actor, step, self.config)
        step.values |= policy.phases.metrics() | {"filter/kept": len(step.kept) / max(len(step.batch.trees), 1)}
        step.seconds = clock.look()
        with clock.part("observe"):
            return self.observers.trained(step)

    def close(self) -> None:
        """End what runs beside the trainer."""
        self.garbage.end()
        self.policy.close()
        self.observers.close()

    def _load(self) -> None:
        """Weights, optimizer and state of the newest checkpoint, if there is one."""
        if self.checked.checkpoint is None or self.checked.state is None:
            return
        self.policy.load(self.checked.checkpoint)
        self.step = self.saved = self.checked.state["step"]
        self.accuracy_before = self.checked.state["accuracy_before"]
        self.policy.rollout.load_state_dict(self.checked.state["rollout"])

    def _start(self) -> None:
        run = self.config.run
        self._load()
        if self.policy.placement.reports and not run.resume:
            # Or a run that is cut off before it saves would be continued as the one before it.
            checkpoint.forget(run.checkpoints)
        self._write("config.yaml", dump_config(self.config))
        self._write("versions.json", json.dumps(versions(), indent=1))
        self.observers.start(self.step)
        if told := self.policy.who_quantises():
            self.observers.say(told)
        where = "resumed at" if self.checked.checkpoint else "start at"
        self.observers.say(f"{where} step {self.step}  {self.policy.layout}  -> {run.dir}")
        if torch.cuda.is_available():
            self.observers.say(self.policy.phases.describe())
        dist.barrier()

    def _evaluate(self) -> float:
        values = self.policy.evaluate(self.checked.held_out)
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
            "prompts": self.checked.prompts.state_dict(),
            "rollout": self.policy.rollout.state_dict(),
            "optimizer": optimizer_settings(self.config),
        }
        self.policy.save(self.step, state)
        self.saved = self.step

    def _finish(self, seconds: float) -> dict[str, Any]:
        trainer, run = self.config.trainer, self.config.run
        self._save()  # before an evaluation that may be the one thing too many for the time a job has
        after = self._evaluate() if trainer.eval_after and self.checked.held_out else None
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
        self.stop.end()
        self.close()
        dist.barrier()  # none ends, and has the others ended by torchrun, before all ignore that
        return {"stopped": asked, "steps": self.step, "seed": self.config.run.seed, "layout": self.policy.layout}

    def _write(self, name: str, text: str) -> None:
        """A file of run.dir, by the rank that reports."""
        if self.policy.placement.reports:
            self.config.run.dir.mkdir(parents=True, exist_ok=True)
            (self.config.run.dir / name).write_text(text)
