"""The rollout phase of all engines together: who samples what, and every tree to every rank."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from treepo_mcore.config import Config
from treepo_mcore.data.prompts import Prompt, PromptStream
from treepo_mcore.data.tokenizer import Tokenizer
from treepo_mcore.engine.protocol import Engine
from treepo_mcore.grow.contrast import RarePaths
from treepo_mcore.grow.early import Prior
from treepo_mcore.grow.schedule import Schedule
from treepo_mcore.records import Batch
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout import evaluation
from treepo_mcore.rollout.collector import Collection, Collector
from treepo_mcore.rollout.queue import LockstepQueue, PromptQueue, SharedQueue
from treepo_mcore.system.placement import Placement
from treepo_mcore.tree.stats import informative

ENGINE_TIMEOUT = 60  # seconds that the ranks of an engine wait for each other

logger = logging.getLogger(__name__)


class Rollout:
    """Every rank makes one and calls it at the same time as the others."""

    def __init__(
        self, config: Config, placement: Placement, engine: Engine, tokenizer: Tokenizer, rewards: RewardPool | None
    ) -> None:
        """rewards: only on the first rank of each engine. Collective: makes process groups."""
        self.config, self.placement, self.engine = config, placement, engine
        self.tokenizer, self.rewards = tokenizer, rewards
        self.engine_group = self._engine_group(short=not config.run.deterministic)
        self.tree_group = self._engine_group(short=False)
        self.collector = Collector(config, engine, tokenizer, rewards, self.engine_group)
        tree = self.collector.tree_config
        self.schedule, self.prior, self.rare = Schedule(tree), Prior(), RarePaths(tree.contrast)
        self.leaders = dist.new_group(list(placement.leaders), backend="gloo")
        self.begun = 0  # collect calls; their counters in the store must not meet

    def collect(self, stream: PromptStream, step: int) -> Batch:
        """Sample until enough prompts are informative; every rank gets all trees, in the order of the prompts.

        Moves the stream on by what was drawn. Raises RuntimeError when not one tree was finished.
        """
        wanted = self.config.trainer.prompts_per_step
        # Without the filter too: another prompt takes the place of one that an engine lost.
        limit = math.ceil(wanted * self.config.filter.max_prompts_factor)
        prompts = stream.peek(limit)
        self.begun += 1
        queue = self._queue(wanted, limit) if self.placement.leads_engine else None
        progress = step / max(self.config.trainer.steps, 1)
        known = (self.schedule.forks(), self.prior, self.rare)
        result = self._exchange(self.collector.collect(prompts, queue, step, progress, stream.returned, *known))
        if not result.trees:
            raise RuntimeError(f"step {step}: no prompt was finished; see rollout.tail_steps and the engine's log")
        self._move(stream, result)
        stream.saw({tree.prompt_id: not informative(tree) for tree in result.trees})
        self.prior.look(result.trees)
        self.rare.look(result.trees)
        told = self.schedule.look(result.trees)
        if told and self.placement.reports:
            logger.info("step %d: %s", step, told)
        result.counts.resting_prompts = stream.resting
        return Batch(result.trees, step, result.counts, result.restarts)

    def state_dict(self) -> dict[str, Any]:
        """What was learnt from the trees so far, as JSON values, for a checkpoint."""
        return {
            "schedule": self.schedule.state_dict(),
            "prior": self.prior.state_dict(),
            "rare": self.rare.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.schedule.load_state_dict(state["schedule"])
        self.prior.load_state_dict(state["prior"])
        self.rare.load_state_dict(state["rare"])

    def _move(self, stream: PromptStream, result: Collection) -> None:
        """Behind the last prompt that was drawn; what was not drawn before it or not finished comes again.

        Under `run.deterministic` an engine can draw a number while another one, whose tail was cut, leaves a lower one.
        """
        passed = stream.next(max(result.drawn) + 1)
        again = set(range(len(passed))) - set(result.drawn)
        if self.config.rollout.unfinished == "carry":
            again.update(result.unfinished)
        stream.put_back([passed[number] for number in sorted(again)])

    def _queue(self, wanted: int, limit: int) -> PromptQueue:
        engine, engines = self.placement.engine, len(self.placement.engines)
        assert engine is not None
        if self.config.run.deterministic:
            return LockstepQueue(self.leaders if engines > 1 else None, engine, engines, wanted, limit)
        # The store that the process groups met at; with one engine nobody else looks.
        store = dist.distributed_c10d._get_default_store() if engines > 1 else dist.HashStore()
        return SharedQueue(dist.PrefixStore(f"treepo/collect{self.begun}", store), engine, engines, wanted, limit)

    def _exchange(self, mine: Collection) -> Collection:
        """All engines' results on every rank: from first rank to first rank, and from there to the engine's others."""
        begin = time.perf_counter()
        dist.barrier()
        mine.counts.idle_seconds += time.perf_counter() - begin  # until the slowest engine is done
        everyone: list[Any] = [None] * len(self.placement.engines)
        if self.placement.leads_engine:
            dist.all_gather_object(everyone, mine, group=self.leaders)
        if self.tree_group is not None:
            dist.broadcast_object_list(everyone, self.placement.leader, group=self.tree_group)
        total = Collection()
        for part in everyone:
            total.trees += part.trees
            total.restarts += part.restarts
            total.drawn += part.drawn
            total.unfinished += part.unfinished
            total.counts.add(part.counts)
        for trees in (total.trees, total.restarts):
            trees.sort(key=lambda tree: int(tree.meta["number"]))
        return total

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """What all engines together answer, see `evaluation.metrics`; the same values on every rank."""
        samples, longest = self.config.trainer.eval_samples, self.collector.tree_config.response_tokens
        mine = prompts[self.placement.engine :: len(self.placement.engines)]
        if samples == 1:
            answers = self.engine.greedy([prompt.tokens for prompt in mine], longest)
        else:
            answers = evaluation.sample(self.engine, mine, samples, longest, self.config.run.seed)
        sums = torch.zeros(4, dtype=torch.float64)
        if self.rewards is not None:
            texts = [self.tokenizer.decode(answer) for answer in answers]
            sums = evaluation.score(self.rewards, mine, texts, samples)
        dist.all_reduce(sums)
        return evaluation.metrics(sums, len(prompts), samples, self.config.reward)

    def _engine_group(self, short: bool) -> dist.ProcessGroup | None:
        """A group of this engine's ranks; all ranks make all groups.

        short: a rank that went another way must not keep the others for half an hour. Slow verdicts may, where all wait
        for them, and trees, which the first rank gets from all engines before its own ranks do.
        """
        if len(self.placement.engine_ranks) == 1:
            return None
        wait = timedelta(seconds=ENGINE_TIMEOUT) if short else None
        groups = [dist.new_group(list(ranks), backend="gloo", timeout=wait) for ranks in self.placement.engines]
        assert self.placement.engine is not None
        return groups[self.placement.engine]
