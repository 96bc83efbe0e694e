"""Drives one engine: admits prompts, feeds their samplers, scores leaves while others still decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist

from treepo_mcore.config import Config
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.data.tokenizer import Tokenizer
from treepo_mcore.engine.protocol import Chunk, Engine
from treepo_mcore.grow.contrast import RarePaths, shape_behind
from treepo_mcore.grow.early import FIRST, Prior, agrees, goes_on, looked_at
from treepo_mcore.grow.sampler import Actions, TreeSampler, stable_seed
from treepo_mcore.grow.schedule import Forks
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.grow.stopping import BoxDetector, RuleStopper
from treepo_mcore.rewards.pool import Result, RewardPool
from treepo_mcore.rewards.shaping import failed_score, shape
from treepo_mcore.rollout.agreement import VERDICTS, Agreement, Next, Verdict, Word
from treepo_mcore.rollout.collection import Collection
from treepo_mcore.rollout.queue import PromptQueue
from treepo_mcore.rollout.requests import Growing, Requests
from treepo_mcore.tree.stats import informative
from treepo_mcore.tree.tree import Tree

IDLE_POLL_SECONDS = 0.005
ANCHOR = "boxed"  # any text does; a tokenizer that cannot write this one has no boxes to find

NO_WORD = Word()
CONTRAST = 1  # in the key of a restart's draws

logger = logging.getLogger(__name__)


class Collector:
    """Samples trees on one engine. All ranks of the engine run the same collector in the same order."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: Tokenizer,
        rewards: RewardPool | None,
        group: dist.ProcessGroup | None,
        by_prompt: bool = False,
    ) -> None:
        """rewards: only on the engine's first rank. group: the engine's ranks, None when it has one.

        by_prompt: draws follow the prompts' ids alone, not the step and the order of the prompts.
        """
        self.config, self.by_prompt = config, by_prompt
        self.tree_config = sampled_shape(config.rollout)
        self.engine, self.tokenizer, self.rewards, self.group = engine, tokenizer, rewards, group
        stopping = self.tree_config.stopping
        self.stopper = RuleStopper(stopping, BoxDetector(_decoder(tokenizer)) if stopping.boxed != "none" else None)
        self.warned = False
        # Of the step before, by their numbers in it, and then, as `number_resumed` says, in the next one.
        self.parked: dict[int, Growing] = {}

    def number_resumed(self, unfinished: Sequence[int]) -> None:
        """What is parked comes first in the next step, in the order of its numbers in the last one, on all engines."""
        self.parked = {now: self.parked[then] for now, then in enumerate(unfinished) if then in self.parked}

    def collect(
        self,
        prompts: Sequence[Prompt],
        queue: PromptQueue | None,
        step: int,
        progress: float,
        returned: int = 0,
        forks: Forks | None = None,
        prior: Prior | None = None,
        rare: RarePaths | None = None,
    ) -> Collection:
        """Trees of the prompts that this engine draws, until the step has enough.

        prompts: all that may be drawn, by number. queue: only on the engine's first rank. progress in [0, 1] drives
        the schedules. returned: so many numbers, the first ones, an earlier step put back; no tail is cut off them.
        forks: where they are planned. prior, rare: what is known of prompts whose first answers agree, by default what
        is known before the first step.
        Raises RuntimeError when the ranks of the engine disagree.
        """
        return _Collect(self, prompts, queue, step, progress, returned, forks, prior or Prior(), rare).run()

    def text_of(self, response: list[int]) -> str:
        """What the reward function sees. A model may have more words than its tokenizer: they have no text."""
        if not self.warned and max(response) >= self.tokenizer.vocab_size:
            self.warned = True
            logger.warning(
                "the model answered with token %d, its tokenizer has %d: such tokens have no text",
                max(response),
                self.tokenizer.vocab_size,
            )
        return self.tokenizer.decode(response)


class _Collect:
    """One call of `collect`."""

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Prompt],
        queue: PromptQueue | None,
        step: int,
        progress: float,
        returned: int,
        forks: Forks | None,
        prior: Prior,
        rare: RarePaths | None,
    ) -> None:
        self.config, self.tree_config, self.forks = collector.config, collector.tree_config, forks
        self.by_prompt = collector.by_prompt
        self.prior, self.rare = prior, rare or RarePaths(self.tree_config.contrast)
        self.engine, self.rewards, self.text_of = collector.engine, collector.rewards, collector.text_of
        self.stopper, self.prompts, self.queue = collector.stopper, prompts, queue
        self.step, self.progress, self.returned = step, progress, returned
        self.agreement = Agreement(collector.group)
        self.result = Collection()
        self.counts = self.result.counts
        self.active: dict[int, Growing] = {}  # with running requests
        self.undecided: dict[int, Growing] = {}  # with nothing but first answers, before it is said whether they go on
        self.verdicts: list[Verdict] = []  # on these, not yet told to the engine's other ranks
        self.scoring: dict[int, Growing] = {}  # complete, rewards outstanding
        temperature = self.config.rollout.temperature
        self.requests = Requests(self.engine, self.tree_config, temperature, self.counts)
        self.resumed, collector.parked = collector.parked, {}
        self.parked = collector.parked
        self.dry = False  # the queue had nothing for this engine at the last look
        self.tail = False  # nor will it, unless prompts are rejected
        self.next_look = 0
        self.over = False  # the tail was cut
        self.closed = False

    def run(self) -> Collection:
        preempted = self.engine.preemptions()
        for number, entry in self.resumed.items():
            self._resume(number, entry)
        while True:
            self._admit()
            if self.active:
                self._engine_step()
            elif self.closed:
                break
            else:
                self._idle()
        self.counts.preemptions = self.engine.preemptions() - preempted
        self.result.rare = [
            (int(tree.meta["number"]), found) for tree in self.result.trees if (found := self.rare.found_in(tree))
        ]
        self.result.sort()
        return self.result

    # Admission.

    def _admit(self) -> None:
        """Let prompts go on behind their first answers, and draw others while there is room for them."""
        if self.undecided and (self.agreement.alone or not self.active):
            self._meet()
        while self._fits():
            if self.dry and self.active and self.counts.steps < self.next_look:
                return
            number = self._draw()
            if number is None:
                # Several ranks look again now and then only: each look is a message.
                self.next_look = self.counts.steps + (
                    1 if self.agreement.alone else self.config.rollout.agreement_every
                )
                return
            self._start(number, self.prompts[number])

    def _fits(self) -> bool:
        """With nothing running a prompt always fits, so the phase goes on in any cache that can hold one path."""
        return not self.active or self.requests.room(len(self.undecided))

    def _draw(self) -> int | None:
        word = Word()
        if self.queue is not None:
            word = Word(None if self.over else self.queue.draw())
            if word.number is None:
                closed = not self._busy and self.queue.closed()
                word = Word(None, closed, self.queue.held_back())
        word = self._meet(word)
        self.closed = word.closed
        self.dry = word.number is None
        self.tail = self.dry and not word.held_back
        return word.number

    def _meet(self, word: Word = NO_WORD) -> Word:
        """What the engine's first rank knows, on all of its ranks; prompts go on or end as it says."""
        told, self.verdicts = self.verdicts[:VERDICTS], self.verdicts[VERDICTS:]
        word = self.agreement.order(word._replace(verdicts=told))
        for prompt, then in word.verdicts:
            if prompt in self.undecided:  # not given up meanwhile
                self._decide(self.undecided.pop(prompt), then)
        return word

    @property
    def _busy(self) -> bool:
        """Whether a prompt is not done; no verdict may be left to tell then, or ranks would part."""
        return bool(self.active or self.undecided or self.scoring)

    def _start(self, number: int, prompt: Prompt) -> None:
        tree = _tree(prompt, number)
        seed = self.config.run.seed
        key = (seed, stable_seed(prompt.id)) if self.by_prompt else (seed, self.step, number)
        sampler = TreeSampler(tree, self.tree_config, self.stopper, key, self.progress, self.forks)
        entry = Growing(number, prompt, sampler)
        self.active[number] = entry
        self.result.drawn.append(number)
        self.counts.drawn_prompts += 1
        self._apply(entry, entry.sampler.start())

    def _resume(self, number: int, entry: Growing) -> None:
        """A prompt of the step before, under its number in this one; verdicts that were outstanding are asked for."""
        entry.number, entry.unscored = number, 0
        tree = entry.sampler.tree
        tree.meta["number"] = number
        self.active[number] = entry
        self.result.drawn.append(number)
        self.counts.resumed_prompts += 1
        self.counts.resumed_tokens += entry.decoded
        waiting = [index for index, leaf in enumerate(tree.leaves) if leaf.reward is None]
        actions = entry.sampler.resume()
        self._apply(entry, replace(actions, leaves=waiting))
        self._look(entry)

    def _idle(self) -> None:
        """Nothing runs, but other engines or rewards may still bring prompts."""
        begin = time.perf_counter()
        if self.queue is not None:
            self._tick()
            if not self.config.run.deterministic:
                time.sleep(IDLE_POLL_SECONDS)
        self.counts.idle_seconds += time.perf_counter() - begin

    # Engine steps.

    def _engine_step(self) -> None:
        counts = self.counts
        counts.live_sum += len(self.requests)
        chunks = self.engine.step()
        counts.steps += 1
        self.agreement.saw(chunks)
        word = Word(enough=self.queue is not None and self.queue.enough())
        if not self.agreement.alone:
            word = self._meet(word)
        for chunk in chunks:
            self._feed(chunk)
        if self.queue is not None:
            if counts.steps % self.config.rollout.agreement_every == 0:
                self._tick()
            elif self.rewards is not None:
                self._scored(self.rewards.poll())
        if self.tail and self._fits():
            counts.tail_steps += 1
            limit = self.config.rollout.tail_steps
            if limit is not None and counts.tail_steps > limit:
                self._cut_tail()
        if word.enough:
            self._cut_tail()

    def _feed(self, chunk: Chunk) -> None:
        fed = self.requests.feed(chunk)
        if fed is None:
            return
        entry, actions = fed
        if actions.submit or actions.abort or actions.leaves:
            self._apply(entry, actions)
        self._look(entry)

    def _look(self, entry: Growing) -> None:
        """Where an active prompt belongs behind its newest tokens."""
        if entry.sampler.failed:
            self._lose(entry)
        elif entry.sampler.done:
            del self.active[entry.number]
            self.scoring[entry.number] = entry
            self._finish_if_scored(entry)
        elif entry.sampler.waits:
            del self.active[entry.number]
            self.undecided[entry.number] = entry
            self._judge_if_scored(entry)

    def _apply(self, entry: Growing, actions: Actions) -> None:
        self.requests.apply(entry, actions)
        if self.rewards is not None:
            for leaf in actions.leaves:
                self._submit_reward(entry, leaf)

    # Rewards and the ends of prompts.

    def _tick(self) -> None:
        """Take verdicts in and meet the other engines; by logical time under `deterministic`."""
        assert self.queue is not None
        if self.rewards is not None:
            self._scored(self.rewards.drain() if self.config.run.deterministic else self.rewards.poll())
        self.queue.tick(finished=not self._busy)

    def _submit_reward(self, entry: Growing, leaf: int) -> None:
        assert self.rewards is not None
        tree = entry.sampler.tree
        text = tree.leaves[leaf].text = self.text_of(tree.answer(leaf))
        entry.unscored += 1
        prompt = entry.prompt
        self.rewards.submit((self.step, entry.number, leaf), text, prompt.answer, prompt.text, prompt.meta)

    def _scored(self, results: Sequence[Result]) -> None:
        for result in results:
            assert isinstance(result.key, tuple)
            step, number, index = result.key
            entry = self.active.get(number) or self.undecided.get(number) or self.scoring.get(number)
            if entry is None or step != self.step:  # its prompt was given up
                continue
            tree, reward = entry.sampler.tree, self.config.reward
            length = tree.leaf_tokens(index) + tree.replayed
            leaf, lengths = tree.leaves[index], (length, self.tree_config.response_tokens)
            leaf.failed = result.error is not None
            self.counts.rewards += 1
            self.counts.failed_rewards += leaf.failed
            leaf.correct, leaf.components = result.correct, result.components
            score = failed_score(reward) if leaf.failed else result.score
            leaf.score = score + result.added
            leaf.reward = shape(score, *lengths, reward, leaf.failed, result.added)
            entry.unscored -= 1
            self._judge_if_scored(entry)
            self._finish_if_scored(entry)

    def _judge_if_scored(self, entry: Growing) -> None:
        """On the engine's first rank: whether a prompt goes on behind its first answers."""
        if self.rewards is None or entry.unscored or entry.number not in self.undecided:
            return
        tree, config = entry.sampler.tree, self.tree_config
        tree.meta[FIRST] = list(looked_at(tree))
        then = Next(goes_on(tree, config.width, config.early_stop.min_chance, self.prior))
        right = agrees(tree)
        if right is not None and self.rare.contradicts(tree.prompt_id, right):
            then = Next.CONTRAST
        self.verdicts.append((entry.number, then))

    def _decide(self, entry: Growing, then: Next) -> None:
        """Start what waited for the first answers, or let the tree be complete with them."""
        self.active[entry.number] = entry
        if then is Next.REST:
            self._apply(entry, entry.sampler.go_on())
        else:
            entry.sampler.give_back()
            self.counts.stopped_prompts += 1
            entry.goes_on_elsewhere = then is Next.CONTRAST
        self._look(entry)
        if then is Next.CONTRAST:
            self._restart(entry.number, entry.prompt)

    def _restart(self, number: int, prompt: Prompt) -> None:
        """Another tree for a prompt whose first answers agree, behind a remembered one."""
        replayed = self.rare.replay(prompt.id)
        tree, config = _tree(prompt, number, replayed), shape_behind(self.tree_config, len(replayed))
        key = (self.config.run.seed, self.step, number, CONTRAST)
        entry = Growing(number, prompt, TreeSampler(tree, config, self.stopper, key, self.progress), restart=True)
        self.active[number] = entry
        self.counts.restarted_prompts += 1
        self._apply(entry, entry.sampler.start())

    def _finish_if_scored(self, entry: Growing) -> None:
        if entry.unscored or entry.number not in self.scoring:
            return
        del self.scoring[entry.number]
        tree = entry.sampler.tree
        # Context tokens that no cache served were computed: those of the prompt once, which is no waste, and others
        # that one request of the tree had computed before another did again.
        computed = entry.context - entry.cached
        prompt_once = len(entry.prompt.tokens) - entry.found
        tree.meta |= {"prefix_hit_tokens": entry.cached, "recomputed_tokens": computed - prompt_once}
        dropped: set[int] = set()
        if self.config.reward.failed == "drop":
            dropped = {index for index, leaf in enumerate(tree.leaves) if leaf.failed}
        if len(dropped) == len(tree.leaves):
            self._lose(entry)
            return
        # Node ids followed the arrival of tokens; equal trees become identical tables.
        tree = tree.canonical(dropped)
        (self.result.restarts if entry.restart else self.result.trees).append(tree)
        if self.queue is not None and not entry.goes_on_elsewhere:
            self.queue.report(rejected=self.config.filter.enabled and not informative(tree))

    def _lose(self, entry: Growing) -> None:
        """The engine dropped one of its requests, or no leaf has a reward: the prompt is lost, another may be drawn."""
        self.active.pop(entry.number, None)
        self.counts.failed_prompts += 1
        self.counts.discarded_tokens += entry.decoded
        if self.queue is not None:
            self.queue.report(rejected=True)

    def _cut_tail(self) -> None:
        """Once: give up what is unfinished, or put it off; nothing more is drawn in this step.

        What a step before gave up is left to finish: the slowest prompts would be given up again and again.
        """
        if self.over:
            return
        self.over = True
        if self.queue is not None:
            self.queue.give_up()
        resumes = self.config.rollout.unfinished == "resume"
        running = [*self.active.values(), *self.undecided.values()]
        for entry in [entry for entry in running if resumes or entry.number >= self.returned]:
            parks = resumes and not entry.restart
            self._apply(entry, entry.sampler.suspend() if parks else entry.sampler.fail())
            self.active.pop(entry.number, None)
            self.undecided.pop(entry.number, None)
            if not entry.restart:
                self.result.unfinished.append(entry.number)
            self.counts.unfinished_prompts += 1
            if parks:
                self.parked[entry.number] = entry
            else:
                self.counts.discarded_tokens += entry.decoded
            if self.queue is not None:
                self.queue.report(rejected=True)


def _tree(prompt: Prompt, number: int, replayed: Sequence[int] = ()) -> Tree:
    """With nothing but its prompt, which may go on into an answer: what is replayed has no log-probs and no loss."""
    meta = {"prompt": prompt.text, "answer": prompt.answer, "number": number}
    meta |= {"set": prompt.set} if prompt.set else {}
    return Tree(prompt.id, [*prompt.tokens, *replayed], meta | ({"replayed": len(replayed)} if replayed else {}))


def _decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """The text of tokens in the midst of others: SentencePiece leaves out spaces at the start of a text."""
    anchor = tokenizer.encode(ANCHOR)
    before = len(tokenizer.decode(anchor))
    return lambda ids: tokenizer.decode([*anchor, *ids])[before:]
