"""How long engines decode: their steps played out in strides, with admission, a full cache, and the tail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from treepo_mcore.config import Config
from treepo_mcore.engine.costs import EngineMemory, engine_in_fp8
from treepo_mcore.model.facts import ELEMENT
from treepo_mcore.model.shards import active_parameters, matrix_parameters
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.plan import constants
from treepo_mcore.plan.constants import LINK_EFFICIENCY
from treepo_mcore.plan.hardware import Cluster
from treepo_mcore.plan.workload import Workload

STRIDE = 32  # engine steps between looks at the batch
RECOMPUTED = 8.5  # mean tokens that a fork prefills again: half a block


@dataclass(frozen=True)
class RolloutTime:
    """One rollout phase."""

    seconds: float
    steps: int
    tail_seconds: float  # with fewer requests than half the most that ran at once, and none to come
    mean_batch: float  # requests an engine decodes at once
    full_batch: float  # the most that ran at once
    prefill_seconds: float
    prompts_per_engine: float
    waiting: float  # share of the admitted prompts that the cache has pushed out, mean over engine steps


@dataclass(frozen=True)
class StepCost:
    """Seconds of an engine step: fixed + request x requests + token x context tokens, and a floor by arithmetic."""

    fixed: float
    request: float
    token: float
    compute: float  # each request
    latency: float

    def seconds(self, requests: float, context: float) -> float:
        """Of one step that decodes `requests` tokens and reads `context` keys and values."""
        return max(self.fixed + self.token * context, self.compute * requests) + self.request * requests + self.latency


def step_cost(config: Config, sizes: Sizes, cluster: Cluster, engine: EngineMemory) -> StepCost:
    """Decoding reads all weights once a step and every request's keys; the host and all-reduces come on top."""
    tp = config.rollout.tp
    bandwidth = cluster.gpu.hbm * constants.ENGINE_BANDWIDTH
    table = 0 if sizes.tied else sizes.vocab * sizes.hidden * ELEMENT[config.rollout.dtype] // tp
    peak = engine_peak(config, cluster) * constants.ENGINE_EFFICIENCY
    per_request, latency = constants.ENGINE_REQUEST_SECONDS, sizes.layers * constants.ENGINE_LAYER_SECONDS
    if tp > 1:
        size = ELEMENT[config.rollout.dtype]
        moved = 2 * (tp - 1) / tp * sizes.hidden * size
        per_request += 2 * sizes.layers * moved / (cluster.link(tp) * LINK_EFFICIENCY)
        once = constants.NETWORK_ALL_REDUCE_SECONDS if cluster.crosses(tp) else constants.ALL_REDUCE_SECONDS
        latency += 2 * sizes.layers * once
    return StepCost(
        fixed=(engine.weights - table) / bandwidth,
        request=per_request,
        token=engine.token_bytes / bandwidth,
        compute=2 * active_parameters(sizes) / tp / peak,
        latency=latency,
    )


def engine_peak(config: Config, cluster: Cluster) -> float:
    """Operations a second of one GPU in the engine's matrix products."""
    return cluster.gpu.bf16 * (constants.FP8_GAIN if engine_in_fp8(config) else 1.0)


def rollout_time(
    config: Config, sizes: Sizes, cluster: Cluster, engine: EngineMemory, work: Workload, *, reserve: int | None = None
) -> RolloutTime:
    """The mean engine's share played out, until fewer than half a request is left on all engines together.

    reserve: tokens that admission keeps free for every live path and a whole new tree (rollout/collector.py keeps a
    segment); 0 for an engine that fills its cache and preempts.
    """
    cost = step_cost(config, sizes, cluster, engine)
    engines = cluster.world // config.rollout.tp
    share = work.drawn / engines
    if reserve is None:
        reserve = config.rollout.tree.segment_tokens
    play = _Play(work, share, engine, reserve, config.rollout.tree.width, 0.5 / engines)
    seconds = tail = batch = 0.0
    full = 0.0
    for requests, context in play.strides():
        lasted = STRIDE * cost.seconds(requests, context)
        seconds += lasted
        batch += requests
        full = max(full, requests)
        tail += lasted if requests < full / 2 and play.all_run else 0.0
    prefill = _prefill_seconds(config, sizes, cluster, work, share, play.evicted_tokens)
    return RolloutTime(
        seconds=seconds + prefill,
        steps=play.count * STRIDE,
        tail_seconds=tail,
        mean_batch=batch / max(play.count, 1),
        full_batch=full,
        prefill_seconds=prefill,
        prompts_per_engine=share,
        waiting=play.paused / max(play.paused + play.ran, 1e-9),
    )


def _prefill_seconds(
    config: Config, sizes: Sizes, cluster: Cluster, work: Workload, share: float, evicted: float
) -> float:
    """Prompts once each, the last block of every fork, and what was pushed out of the cache."""
    tokens = share * (work.prompt_tokens + RECOMPUTED * work.profile.requests) + evicted
    peak = engine_peak(config, cluster) * constants.ENGINE_EFFICIENCY * config.rollout.tp
    return tokens * 2 * matrix_parameters(sizes) / peak


class _Play:
    """One engine over a phase: groups of prompts that were admitted together grow older in step."""

    def __init__(
        self, work: Workload, share: float, engine: EngineMemory, reserve: int, width: int, least: float
    ) -> None:
        self.work, self.engine, self.reserve, self.width, self.least = work, engine, reserve, width, least
        profile = work.profile
        ages = np.arange(0, profile.longest + STRIDE, STRIDE)
        inside = np.minimum(ages, profile.longest - 1)
        here = ages < profile.longest
        self.live = _strides_of(profile.live, inside, here)
        self.reach = _strides_of(profile.reach, inside, here)
        self.stored = _strides_of(profile.held, inside, here) + work.prompt_tokens * (self.live > 0)
        self.cache = max(engine.cache_tokens, work.longest)  # less is an error of its own (plan/plan.py)
        self.waiting_prompts = share
        self.counts = np.empty(0)  # prompts of each group, oldest first
        self.ages = np.empty(0, dtype=int)  # in strides
        self.running = np.empty(0, dtype=bool)  # in the stride before
        self.count = 0
        self.paused = self.ran = 0.0
        self.evicted_tokens = 0.0

    @property
    def all_run(self) -> bool:
        """Nobody waits, neither for admission nor for the cache."""
        return self.waiting_prompts <= 0 and bool(self.running.all())

    def strides(self) -> Iterator[tuple[float, float]]:
        """Yields (requests, context tokens they read) of each stride."""
        while True:
            self._admit()
            if float((self.counts * self.live[self.ages]).sum()) < self.least and self.waiting_prompts <= 0:
                return
            self._fit()
            counts, ages = self.counts[self.running], self.ages[self.running]
            live, reach = float((counts * self.live[ages]).sum()), float((counts * self.reach[ages]).sum())
            self.count += 1
            self.ran += float(counts.sum())
            self.paused += float(self.counts[~self.running].sum())
            yield live, reach + live * self.work.prompt_tokens
            self.ages = self.ages + self.running
            keep = self.ages < len(self.live)
            self.counts, self.ages, self.running = self.counts[keep], self.ages[keep], self.running[keep]

    def _admit(self) -> None:
        """Prompts come one by one while they fit, as in `Collector._fits`."""
        live = float((self.counts * self.live[self.ages]).sum())
        stored = float((self.counts * self.stored[self.ages]).sum())
        first, prompt = float(self.live[0]), self.work.prompt_tokens
        new = 0.0
        while self.waiting_prompts > 0:
            one = min(1.0, self.waiting_prompts)
            fits = (
                live + first <= self.engine.requests
                and stored + prompt + (live + self.width) * self.reserve <= self.cache
            )
            if not fits and (len(self.counts) or new):
                break
            new += one
            self.waiting_prompts -= one
            live, stored = live + one * first, stored + one * prompt
        if new:
            self._insert(len(self.counts), new, 0, True)

    def _insert(self, at: int, prompts: float, age: int, running: bool) -> None:
        self.counts = np.insert(self.counts, at, prompts)
        self.ages = np.insert(self.ages, at, age)
        self.running = np.insert(self.running, at, running)

    def _fit(self) -> None:
        """The oldest run as far as the cache holds them, the others wait; what lost its place is prefilled again.

        The state is a list of groups, oldest first: `counts` prompts of the same age (engine steps that they have run),
        which are running or wait. A group that fits in part is cut in two.
        """
        before = self.running.copy()
        used = (self.counts * self.stored[self.ages]).cumsum()
        over = np.flatnonzero(used > self.cache)
        self.running[:] = True
        if not len(over):
            return
        at = int(over[0])
        excess = (used[at] - self.cache) / self.stored[self.ages[at]]
        if excess < self.counts[at]:  # part of this group stays
            self._insert(at + 1, excess, int(self.ages[at]), True)
            before = np.insert(before, at + 1, before[at])
            self.counts[at] -= excess
            at += 1
        self.running[at:] = False
        lost = before & ~self.running
        self.evicted_tokens += float((self.counts * self.stored[self.ages])[lost].sum())


def _strides_of(values: np.ndarray, ages: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Means over each stride of steps."""
    ends = np.minimum(ages + STRIDE, len(values))
    sums = np.concatenate([[0.0], values.cumsum()])
    return np.where(here, (sums[ends] - sums[ages]) / STRIDE, 0.0)
