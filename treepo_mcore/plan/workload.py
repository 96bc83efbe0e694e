"""What one step has to do: prompts, trees, tokens; from the configuration and assumed mean lengths.

Answers are taken to end at a constant rate per token (their lengths are exponential, cut at the longest response), so
one number, the mean length of an independent answer, says it all. Trees are then grown with the rules of the sampler
on numbers alone: `grow` runs a few hundred of them and keeps the means.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from treepo_mcore.config import Config, ConfigError, TreeConfig
from treepo_mcore.grow.shape import sampled_shape

TREES = 200  # grown for the means: their error is below 2 %


@dataclass(frozen=True)
class Assumptions:
    """What a configuration does not say. Lengths are means in tokens."""

    prompt_tokens: int
    response_tokens: int  # of an independent answer, cut at the longest response
    informative: float = 0.6  # share of prompts that the dynamic filter keeps


def assume(config: Config, prompt_tokens: int | None, response_tokens: int | None, informative: float) -> Assumptions:
    """Defaults for what is not given: a quarter of the longest prompt and of the longest response."""
    longest = config.rollout.tree.response_tokens
    prompt = prompt_tokens or max(1, config.data.max_prompt_tokens // 4)
    response = response_tokens or max(1, longest // 4)
    if response > longest:
        raise ConfigError(f"--response-tokens: {response} is more than the longest response, {longest}")
    if prompt > config.data.max_prompt_tokens:
        raise ConfigError(
            f"--prompt-tokens: {prompt} is more than data.max_prompt_tokens = {config.data.max_prompt_tokens}"
        )
    return Assumptions(prompt, response, informative)


@dataclass(frozen=True)
class TreeProfile:
    """Means over trees of one prompt. Arrays count engine steps since the prompt was admitted, prompt tokens apart."""

    leaves: float
    physical: float  # decoded tokens
    logical: float  # counted once per leaf
    requests: float
    live: np.ndarray  # float64 [T], requests that decode
    reach: np.ndarray  # float64 [T], sum over these of their response tokens so far
    held: np.ndarray  # float64 [T], response tokens that live paths stand on, shared ones once
    longest: int

    @property
    def sharing(self) -> float:
        """Logical over physical tokens."""
        return self.logical / self.physical


@dataclass(frozen=True)
class Workload:
    """One step."""

    drawn: float  # prompts sampled
    trained: float  # prompts that the update sees
    updates: int
    prompt_tokens: int
    profile: TreeProfile
    packed: float  # tokens of one prompt's training sequences
    predicted: float  # of these, tokens with a prediction in the loss: rows of logits
    attended: float  # mean tokens that a trained token sees
    longest: int  # tokens of the longest sequence

    @property
    def trained_tokens(self) -> float:
        """Tokens through the actor in one pass over the step's prompts."""
        return self.trained * self.packed


def make_workload(config: Config, assumed: Assumptions) -> Workload:
    """The step of a configuration."""
    rate = hazard(assumed.response_tokens, config.rollout.tree.response_tokens)
    profile = grow(sampled_shape(config.rollout), rate)
    prompts = config.trainer.prompts_per_step
    drawn = prompts / assumed.informative if config.filter.enabled else float(prompts)
    drawn = min(drawn, prompts * config.filter.max_prompts_factor) if config.filter.enabled else drawn
    trained = min(float(prompts), drawn * assumed.informative) if config.filter.enabled else float(prompts)
    tree = config.actor.packing != "flat"  # a packing of the user's is taken to share prefixes
    response = profile.physical if tree else profile.logical
    copies = 1.0 if tree else profile.leaves
    return Workload(
        drawn=drawn,
        trained=trained,
        updates=math.ceil(trained / config.trainer.prompts_per_update),
        prompt_tokens=assumed.prompt_tokens,
        profile=profile,
        packed=copies * assumed.prompt_tokens + response,
        predicted=response,
        attended=assumed.prompt_tokens + _mean_position(profile),
        longest=config.data.max_prompt_tokens + config.rollout.tree.response_tokens,
    )


def hazard(mean: float, longest: int) -> float:
    """Rate per token at which answers end, so that their mean length, cut at `longest`, is `mean`."""
    if mean >= longest:
        return 0.0
    low, high = 1e-9, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        if -math.expm1(-middle * longest) / middle > mean:
            low = middle
        else:
            high = middle
    return low


def grow(tree: TreeConfig, rate: float) -> TreeProfile:
    """Means over `TREES` trees whose paths end at `rate` per token."""
    branching = tree.branching
    first = branching.first or branching.factor
    return _grow(tree.width, tree.segment_tokens, tree.response_tokens, branching.factor, first, rate)


@lru_cache(maxsize=64)
def _grow(
    width: int, segment: int, longest: int, factor: tuple[int, int], first: tuple[int, int], rate: float
) -> TreeProfile:
    total = _Sums()
    for index in range(TREES):
        _grow_one(width, segment, longest, factor, first, rate, random.Random(index), total)
    return total.means(TREES)


class _Sums:
    """Adds up what trees do over time, in engine steps since their prompt was admitted, as if nothing had to wait.

    A stretch is one path decoding one token a step. From all stretches follow, for every step: the live paths; the
    response tokens that their contexts reach back over, shared ones counted for each; and the tokens that the cache
    holds, which is all that was decoded less what was released, but never more than is reached.
    """

    def __init__(self) -> None:
        self.leaves = self.logical = self.requests = 0
        self.stretches: list[tuple[int, int, int]] = []  # begin, end, in engine steps; response tokens at the begin
        self.released: list[tuple[int, int]] = []  # engine step, tokens that no live path needs any more

    def means(self, trees: int) -> TreeProfile:
        begin, end, position = (np.array(column) for column in zip(*self.stretches, strict=True))
        steps = int(end.max()) + 1
        live, offset = np.zeros(steps), np.zeros(steps)
        for at, sign in ((begin, 1), (end, -1)):
            np.add.at(live, at, sign)
            np.add.at(offset, at, sign * (position - begin))
        live, offset = live.cumsum(), offset.cumsum()
        reach = live * np.arange(steps) + offset
        released = np.zeros(steps)
        np.add.at(released, [step for step, _ in self.released], [tokens for _, tokens in self.released])
        return TreeProfile(
            leaves=self.leaves / trees,
            physical=float((end - begin).sum()) / trees,
            logical=self.logical / trees,
            requests=self.requests / trees,
            live=live / trees,
            reach=reach / trees,
            held=np.minimum(live.cumsum() - released.cumsum(), reach) / trees,
            longest=steps,
        )


def _grow_one(
    width: int,
    segment: int,
    longest: int,
    factor: tuple[int, int],
    first: tuple[int, int],
    rate: float,
    draw: random.Random,
    total: _Sums,
) -> None:
    """The sampler's rules (docs/algorithm.md 2.3 to 2.7): waves, budget handed on, restarts at boundaries."""
    leaves: list[int] = []  # lengths
    # Of each path: its response tokens at the start of the wave, and those that it shares with others.
    wave, now = [(0, 0)] * min(draw.randint(*first), width), 0
    total.requests += len(wave)
    while True:
        ended, survivors, last = 0, [], now
        for position, shared in wave:
            room = min(segment, longest - position)
            life = _life(rate, draw)
            taken = min(life, room)
            total.stretches.append((now, now + taken, position))
            last = max(last, now + taken)
            if life <= room or position + taken >= longest:
                leaves.append(position + taken)
                total.released.append((now + taken, position + taken - shared))
                ended += 1
            else:
                survivors.append((position + taken, shared))
        now = last
        missing = width - len(leaves)
        if survivors:
            children = max(len(survivors), min(missing, draw.randint(*factor) * (ended + len(survivors))))
            total.requests += children - len(survivors)
            wave = [_child(survivors, index, children) for index in range(children)]
        elif missing > 0:
            wave = _restarts(leaves, missing, segment, factor, draw)
            total.requests += len(wave)
        else:
            break
    total.leaves += len(leaves)
    total.logical += sum(leaves)


def _restarts(
    leaves: list[int], missing: int, segment: int, factor: tuple[int, int], draw: random.Random
) -> list[tuple[int, int]]:
    """Fallback: finished paths in random order, each cut at a random boundary and continued `factor` times."""
    wave: list[tuple[int, int]] = []
    for length in draw.sample(leaves, len(leaves)):
        copies = min(draw.randint(*factor), missing - len(wave))
        cut = segment * draw.randint(0, (length - 1) // segment)
        wave += [(cut, cut)] * copies
        if len(wave) == missing:
            break
    return wave


def _child(survivors: list[tuple[int, int]], index: int, children: int) -> tuple[int, int]:
    """An only child keeps what its path has for itself; siblings share all of it."""
    position, shared = survivors[index % len(survivors)]
    siblings = len(range(index % len(survivors), children, len(survivors)))
    return position, position if siblings > 1 else shared


def _life(rate: float, draw: random.Random) -> int:
    """Tokens until the path ends; at least one."""
    return max(1, math.ceil(draw.expovariate(rate))) if rate > 0 else 1 << 40


def _mean_position(profile: TreeProfile) -> float:
    """Mean over decoded tokens of the response tokens before them."""
    return float(profile.reach.sum() / profile.live.sum())
