"""Supervised training: the loop of `trainer.py`, taught by answers that are there in place of answers sampled."""

from __future__ import annotations

from treepo_mcore.learn.supervised import teach
from treepo_mcore.observe.observer import Wish
from treepo_mcore.records import Batch, Counts, Step
from treepo_mcore.trainer import Trainer


class SupervisedTrainer(Trainer):
    """`trainer.prompts_per_update` rows of `data.train` a step, whose answer column is what the model should say."""

    supervised = True

    def train_step(self) -> Wish:
        """One optimizer step; returns what the observers ask for."""
        clock, policy = self.clock, self.policy
        policy.metrics()  # what an evaluation took is not this step's
        prompts = self.checked.prompts.next(self.config.trainer.prompts_per_update)
        step = Step(self.step, Batch([], self.step, Counts()))
        with clock.part("update"), policy.phases.train():
            teach(policy.actor, prompts, step, self.config)
        step.values |= policy.metrics()
        step.seconds = clock.look()
        with clock.part("observe"):
            return self.observers.trained(step)
