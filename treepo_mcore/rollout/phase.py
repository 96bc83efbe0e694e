"""The rollout phase of all engines together: who samples what, and what is learnt from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from treepo_mcore.config import Config
from treepo_mcore.data.prompts import PromptStream
from treepo_mcore.data.tokenizer import Tokenizer
from treepo_mcore.engine.protocol import Engine
from treepo_mcore.grow.contrast import RarePaths
from treepo_mcore.grow.early import Prior
from treepo_mcore.grow.schedule import Schedule
from treepo_mcore.records import Batch
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rewards.votes import vote_of
from treepo_mcore.rollout import evaluation
from treepo_mcore.rollout.collection import Collection
from treepo_mcore.rollout.collector import Collector
from treepo_mcore.rollout.evaluation import Answer, HeldOut
from treepo_mcore.rollout.exchange import Exchange
from treepo_mcore.rollout.queue import LockstepQueue, PromptQueue, SharedQueue, Wanted
from treepo_mcore.system.placement import Placement
from treepo_mcore.tree.stats import informative

logger = logging.getLogger(__name__)


class Rollout:
    """Every rank makes one and calls it at the same time as the others."""

    def __init__(
        self, config: Config, placement: Placement, engine: Engine, tokenizer: Tokenizer, rewards: RewardPool | None
    ) -> None:
        """rewards: only on the first rank of each engine. Collective: makes process groups."""
        self.config, self.placement, self.engine = config, placement, engine
        self.tokenizer, self.rewards = tokenizer, rewards
        self.engine_group, tree_group = self._engine_group(), self._engine_group()
        self.collector = Collector(config, engine, tokenizer, rewards, self.engine_group)
        tree = self.collector.tree_config
        self.schedule, self.prior, self.rare = Schedule(tree), Prior(), RarePaths(tree.contrast)
        self.leaders = dist.new_group(list(placement.leaders), backend="gloo")
        self.exchange = Exchange(placement, self.leaders, tree_group)
        self.begun = 0  # queues; their counters in the store must not meet
        self.parked = 0  # prompts that go on in the next step, on all engines

    def collect(self, stream: PromptStream, step: int) -> Batch:
        """Sample until enough prompts are informative; every rank gets outlines of all trees, see `Batch`.

        Moves the stream on by what was drawn. Raises RuntimeError when not one tree was finished.
        """
        accepted = self.config.trainer.prompts_per_step
        drawn = math.ceil(accepted * self.config.rollout.over_provision)
        # Without the filter too: another prompt takes the place of one that an engine lost.
        limit = math.ceil(drawn * self.config.filter.max_prompts_factor)
        prompts = stream.peek(limit)
        wanted = Wanted(accepted, drawn, limit, self.parked, len(self.collector.parked))
        queue = self._queue(wanted) if self.placement.leads_engine else None
        progress = step / max(self.config.trainer.steps, 1)
        known = (self.schedule.forks(), self.prior, self.rare)
        mine = self.collector.collect(prompts, queue, step, progress, stream.returned, *known)
        total, deliver = self.exchange.meet(mine)
        if not total.trees:
            raise RuntimeError(f"step {step}: no prompt was finished; see rollout.tail_steps and the engine's log")
        self._move(stream, total)
        stream.saw({prompts[int(tree.meta["number"])].index: not informative(tree) for tree in total.trees})
        self.prior.look(total.trees)
        self.rare.look([found for _, found in total.rare])
        told = self.schedule.look(total.trees)
        if told and self.placement.reports:
            logger.info("step %d: %s", step, told)
        total.counts.resting_prompts = stream.resting
        own = [*mine.trees, *mine.restarts] if self.placement.leads_engine else []
        return Batch(total.trees, step, total.counts, total.restarts, own, deliver)

    def state_dict(self) -> dict[str, Any]:
        """What was learnt from the trees so far, as JSON values, for a checkpoint."""
        return {
            "schedule": self.schedule.state_dict(),
            "prior": self.prior.state_dict(),
            "rare": self.rare.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Trees that were put off are not in it."""
        self.drop_unfinished()
        self.schedule.load_state_dict(state["schedule"])
        self.prior.load_state_dict(state["prior"])
        self.rare.load_state_dict(state["rare"])

    def drop_unfinished(self) -> None:
        """Trees that were put off; their prompts still come first, sampled anew."""
        self.collector.parked, self.parked = {}, 0

    def _move(self, stream: PromptStream, result: Collection) -> None:
        """Behind the last prompt that was drawn; what was not drawn before it or not finished comes again.

        Under `run.deterministic` an engine can draw a number while another one, whose tail was cut, leaves a lower one.
        """
        passed = stream.next(max(result.drawn) + 1)
        again = set(range(len(passed))) - set(result.drawn)
        unfinished = sorted(result.unfinished)
        if self.config.rollout.unfinished == "carry":
            again.update(unfinished)
        stream.put_back([passed[number] for number in sorted(again)])
        if self.config.rollout.unfinished == "resume":
            stream.put_back([passed[number] for number in unfinished])
            self.collector.number_resumed(unfinished)
            self.parked = len(unfinished)

    def _queue(self, wanted: Wanted) -> PromptQueue:
        engine, engines = self.placement.engine, len(self.placement.engines)
        assert engine is not None
        self.begun += 1
        if self.config.run.deterministic:
            return LockstepQueue(self.leaders if engines > 1 else None, engine, engines, wanted)
        # The store that the process groups met at; with one engine nobody else looks.
        store = dist.distributed_c10d._get_default_store() if engines > 1 else dist.HashStore()
        return SharedQueue(dist.PrefixStore(f"treepo/collect{self.begun}", store), engine, engines, wanted)

    def evaluate(self, sets: Sequence[HeldOut]) -> dict[str, float]:
        """What all engines together answer, see `evaluation.metrics`; the same values on every rank.

        Single answers are dealt over the engines, and all of them leave together: none waits in a collective.
        """
        return evaluation.named({held_out.name: self._evaluate(held_out) for held_out in sets})

    def _evaluate(self, held_out: HeldOut) -> dict[str, float]:
        config, asked = held_out.sampling(self.config), held_out.asked()
        collector = Collector(config, self.engine, self.tokenizer, self.rewards, self.engine_group, by_prompt=True)
        queue = self._queue(Wanted(len(asked), len(asked), len(asked))) if self.placement.leads_engine else None
        trees = collector.collect(asked, queue, step=0, progress=0.0).trees
        vote = vote_of(self.config.reward)
        mine = {int(tree.meta["number"]): Answer.of(tree, vote) for tree in trees} if self.rewards is not None else {}
        found = {number: answer for part in self.exchange.of_all_engines(mine) for number, answer in part.items()}
        return evaluation.metrics(found, held_out, self.config.reward)

    def _engine_group(self) -> dist.ProcessGroup | None:
        """A group of this engine's ranks; all ranks make all groups."""
        if len(self.placement.engine_ranks) == 1:
            return None
        groups = [dist.new_group(list(ranks), backend="gloo") for ranks in self.placement.engines]
        assert self.placement.engine is not None
        return groups[self.placement.engine]

    def limit_waits(self) -> None:
        """A rank of an engine that went another way must not keep the others for long, while they sample.

        Slow verdicts may, where all wait for them, and trees, which the first rank gets from all engines before its own
        ranks do.
        """
        if self.engine_group is not None and not self.config.run.deterministic:
            self.engine_group.set_timeout(timedelta(seconds=self.config.comm.engine_timeout_seconds))
