"""Drives one engine: admits prompts, feeds their samplers, scores leaves while others still decode."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from treepo_mcore.config import BranchingConfig, Config, RolloutConfig, TreeConfig
from treepo_mcore.data.prompts import Prompt
from treepo_mcore.data.tokenizer import Tokenizer
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rewards.shaping import shape
from treepo_mcore.rollout.engine import Chunk, Engine
from treepo_mcore.tree.sampler import Actions, TreeSampler
from treepo_mcore.tree.stopping import BoxDetector, RuleStopper
from treepo_mcore.tree.tree import Tree


@dataclass
class Counts:
    """What one engine did; summed over engines."""

    steps: int = 0
    decoded_tokens: int = 0  # physical
    context_tokens: int = 0  # sent to the engine, over all requests
    cached_tokens: int = 0  # of these, served by the prefix cache
    requests: int = 0
    live_sum: int = 0  # live paths summed over steps: occupancy is live_sum / steps
    failed_prompts: int = 0

    def add(self, other: Counts) -> None:
        """Sum in place."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class _Prompt:
    prompt: Prompt
    sampler: TreeSampler
    number: int


@dataclass
class Collection:
    """Trees of one call, in the order of the prompts; only the engine's first rank holds rewards."""

    trees: list[Tree]
    counts: Counts = field(default_factory=Counts)


class Collector:
    """Samples trees on one engine. All ranks of the engine run the same collector in the same order."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: Tokenizer,
        rewards: RewardPool | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        """rewards: only on the engine's first rank. group: the engine's ranks, None when it has one."""
        self.config = config
        self.tree_config = tree_config(config.rollout)
        self.engine, self.tokenizer, self.rewards, self.group = engine, tokenizer, rewards, group
        stopping = self.tree_config.stopping
        self.stopper = RuleStopper(stopping, BoxDetector(_decoder(tokenizer)) if stopping.boxed != "none" else None)

    def collect(self, prompts: Sequence[tuple[int, Prompt]], step: int, progress: float) -> Collection:
        """One tree for each (number in the step, prompt). progress in [0, 1] drives the schedules."""
        result = Collection([])
        queue = deque(prompts)
        owner: dict[str, _Prompt] = {}
        active: dict[int, _Prompt] = {}
        trees: dict[int, Tree] = {}
        digest = 0
        while queue or active:
            while queue and len(owner) < self.config.rollout.live_paths:
                self._admit(*queue.popleft(), step, progress, owner, active, result.counts)
            chunks = self.engine.step()
            result.counts.steps += 1
            result.counts.live_sum += len(owner)
            for chunk in chunks:
                digest = zlib.crc32(repr((chunk.request, chunk.tokens)).encode(), digest)
                self._feed(chunk, owner, active, trees, result.counts)
            if result.counts.steps % self.config.rollout.agreement_every == 0:
                self._agree(digest, result.counts.steps)
        self._agree(digest, result.counts.steps)
        result.trees = [trees[number] for number in sorted(trees)]
        self._score(result.trees)
        # Node ids followed the arrival of tokens; equal trees become identical tables.
        result.trees = [tree.canonical() for tree in result.trees]
        return result

    def _admit(
        self,
        number: int,
        prompt: Prompt,
        step: int,
        progress: float,
        owner: dict[str, _Prompt],
        active: dict[int, _Prompt],
        counts: Counts,
    ) -> None:
        tree = Tree(prompt.id, prompt.tokens, {"prompt": prompt.text, "answer": prompt.answer, "number": number})
        key = (self.config.run.seed, step, number)
        entry = _Prompt(prompt, TreeSampler(tree, self.tree_config, self.stopper, key, progress), number)
        active[number] = entry
        self._apply(entry, entry.sampler.start(), owner, counts)

    def _feed(
        self,
        chunk: Chunk,
        owner: dict[str, _Prompt],
        active: dict[int, _Prompt],
        trees: dict[int, Tree],
        counts: Counts,
    ) -> None:
        entry = owner.get(chunk.request)
        if entry is None:  # aborted in this very step
            return
        counts.decoded_tokens += len(chunk.tokens)
        counts.cached_tokens += chunk.cached_tokens
        if chunk.finish is not None:
            del owner[chunk.request]
        actions = entry.sampler.on_tokens(self._inner(chunk.request, entry), chunk.tokens, chunk.logprobs, chunk.finish)
        self._apply(entry, actions, owner, counts)
        if entry.sampler.failed:
            counts.failed_prompts += 1
            del active[entry.number]
        elif entry.sampler.done:
            trees[entry.number] = entry.sampler.tree
            del active[entry.number]

    def _apply(self, entry: _Prompt, actions: Actions, owner: dict[str, _Prompt], counts: Counts) -> None:
        # A prompt can come twice in a step, and ids must not: the engine sees them with the prompt's number.
        if actions.abort:
            ids = [self._outer(request, entry) for request in actions.abort]
            self.engine.abort([request for request in ids if owner.pop(request, None)])
        for request in actions.submit:
            outer = self._outer(request.id, entry)
            self.engine.submit(type(request)(outer, request.node, request.context, request.max_tokens, request.seed))
            owner[outer] = entry
            counts.requests += 1
            counts.context_tokens += len(request.context)
        if self.rewards is not None:
            for leaf in actions.leaves:
                self._submit_reward(entry, leaf)

    def _outer(self, request: str, entry: _Prompt) -> str:
        return f"{entry.number}:{request}"

    def _inner(self, request: str, entry: _Prompt) -> str:
        return request.removeprefix(f"{entry.number}:")

    def _submit_reward(self, entry: _Prompt, leaf: int) -> None:
        assert self.rewards is not None
        tree = entry.sampler.tree
        text = tree.leaves[leaf].text = self.tokenizer.decode(tree.response(leaf))
        self.rewards.submit((entry.number, leaf), text, entry.prompt.answer, entry.prompt.text)

    def _score(self, trees: list[Tree]) -> None:
        """Wait for the last verdicts and write rewards into the leaves."""
        if self.rewards is None:
            return
        by_number = {tree.meta["number"]: tree for tree in trees}
        for result in self.rewards.drain():
            assert isinstance(result.key, tuple)
            number, index = result.key
            if number not in by_number:  # its prompt was dropped
                continue
            tree = by_number[number]
            leaf = tree.leaves[index]
            leaf.correct = result.correct
            leaf.reward = shape(
                result.score, tree.leaf_tokens(index), self.tree_config.response_tokens, self.config.reward
            )

    def _agree(self, digest: int, step: int) -> None:
        """Raise where the ranks of an engine saw different tokens; otherwise they would hang much later."""
        if self.group is None:
            return
        pair = torch.tensor([digest, -digest])
        dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=self.group)
        if int(pair[0]) != -int(pair[1]):
            raise RuntimeError(
                f"the ranks of this engine sampled different tokens within the last "
                f"{self.config.rollout.agreement_every} steps before engine step {step}"
            )


def tree_config(rollout: RolloutConfig) -> TreeConfig:
    """The tree's shape; flat sampling is a tree that only forks at the prompt."""
    if rollout.sampler == "tree":
        return rollout.tree
    width = rollout.tree.width
    return rollout.tree.model_copy(update={"branching": BranchingConfig(factor=(1, 1), first=(width, width))})


def _decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids)
