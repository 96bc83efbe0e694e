"""The loop: push, roll out, choose, learn; and what surrounds it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from treepo_mcore.actor import checkpoint
from treepo_mcore.checks import POLICY, Context, check_and_meet
from treepo_mcore.config import Config, dump_config
from treepo_mcore.learn.filter import choose
from treepo_mcore.learn.step import learn
from treepo_mcore.observe.guard import BadNumbersError
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

    supervised = False

    def __init__(self, config: Config, stop: StopRequest | None = None, observers: Sequence[Observer] = ()) -> None:
        """Check everything that can be checked, then build. Raises `ConfigError` before any model is built.

        stop: looked at between steps; on which ranks it was asked does not matter. observers: beside the usual ones, of
        this rank.
        """
        self.config = config
        self.stop = stop or StopRequest()
        self.checked = Context(config, supervised=self.supervised)
        check_and_meet(self.checked)
        self.policy = Policy(self.checked)
        self.observers = Observers([*usual_observers(config, self.policy.placement, self.supervised), *observers])
        self.garbage = Garbage()
        self.step = 0
        self.saved: int | None = None  # step of the newest checkpoint
        self.accuracy_before: float | None = None  # before the very first step, also in a resumed run
        self.accuracy: dict[int, float] = {}  # of the last evaluation, by its step

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
        while self.step < trainer.steps and not self._is_enough(begin):
            if asked := self.stop.on_any_rank():
                return self._stop(asked)
            try:
                wish = self.train_step()
            except BadNumbersError as error:
                self.observers.say(self.policy.roll_back(error))
                wish = Wish.NOTHING
            self.step += 1
            self.garbage.step(self.step)
            self.policy.limit_waits(self.config.comm.train_timeout_seconds)
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
            if self._due(trainer.export_every):
                with self.clock.part("export"):
                    self.policy.export(self.config.run.dir / "policies" / f"step_{self.step:06d}")
        if asked := self.stop.on_any_rank():
            return self._stop(asked)
        return self._finish(time.perf_counter() - begin)

    def train_step(self) -> Wish:
        """One rollout and its updates; returns what the observers ask for."""
        policy, clock = self.policy, self.clock
        policy.metrics()  # what an evaluation took is not this step's
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
        step.values |= policy.metrics() | {"filter/kept": len(step.kept) / max(len(step.batch.trees), 1)}
        step.seconds = clock.look()
        with clock.part("observe"):
            return self.observers.trained(step)

    def close(self) -> None:
        """End what runs beside the trainer."""
        self.garbage.end()
        self.policy.close()
        self.observers.close()
        self.checked.release()

    def _start(self) -> None:
        """From the newest checkpoint, if there is one; or from weights and optimizer as another run left them."""
        run = self.config.run
        if found := self.checked.checkpoint or self.checked.start:
            self.policy.load(found)
        if state := self.checked.state:
            self.step = self.saved = state["step"]
            self.accuracy_before = state["accuracy_before"]
            self.policy.rollout.load_state_dict(state["rollout"])
        if self.policy.placement.reports and not run.resume:
            # Or a run that is cut off before it saves would be continued as the one before it.
            checkpoint.forget(run.checkpoints)
        self._write("config.yaml", dump_config(self.config))
        self._write("versions.json", json.dumps(versions(), indent=1))
        self.observers.start(self.step)
        where = "resumed" if self.checked.checkpoint else "start"
        origin = f"from {self.checked.start}  " if self.checked.start else ""
        self.observers.say(f"{where} at step {self.step}  {origin}{self.policy.layout}  -> {run.dir}")
        for told in self.policy.describe():
            self.observers.say(told)
        dist.barrier()

    def _evaluate(self) -> float:
        values = self.policy.evaluate(self.checked.held_out)
        self.observers.evaluated(self.step, values)
        self.accuracy = {self.step: values["eval/accuracy"]}
        return values["eval/accuracy"]

    def _is_enough(self, begin: float) -> bool:
        trainer = self.config.trainer
        reached = any(found >= (trainer.stop_at_accuracy or math.inf) for found in self.accuracy.values())
        return reached or out_of_time(begin, trainer.max_seconds)

    def _due(self, every: int) -> bool:
        """Between steps; the end has its own evaluation and checkpoint."""
        return every > 0 and self.step % every == 0 and self.step < self.config.trainer.steps

    def _save(self, last: bool = False) -> None:
        """Begin a checkpoint, if there is anything new to save; last: no step follows, and it is whole on return."""
        if self.step not in (0, self.saved):
            state = {
                "step": self.step,
                "accuracy_before": self.accuracy_before,
                "accuracy": self.accuracy.get(self.step),
                "prompts": self.checked.prompts.state_dict(),
                "rollout": self.policy.rollout.state_dict(),
            }
            self.policy.save(self.step, state, last)
            self.saved = self.step
        if last:
            self.policy.saver.wait()

    def _finish(self, seconds: float) -> dict[str, Any]:
        trainer, run = self.config.trainer, self.config.run
        self._save(last=True)  # before an evaluation that may be the one thing too many for the time a job has
        after = self.accuracy.get(self.step)
        if trainer.eval_after and self.checked.held_out and after is None:
            after = self._evaluate()
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
        self._save(last=True)
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
            (self.config.run.dir / name).write_text(text)
