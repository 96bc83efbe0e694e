"""The samplers that `rollout.py` compares, on one vLLM engine, and what the engine's scheduler saw of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from vllm import SamplingParams

from treepo_mcore.config import Config
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.engine.vllm.engine import VllmEngine
from treepo_mcore.grow.branching import first_children
from treepo_mcore.rollout.collector import Collector
from treepo_mcore.rollout.queue import LockstepQueue, SharedQueue, Wanted


@dataclass
class Trace:
    """One entry an engine step, from the scheduler: the same counts for every sampler, ours or not."""

    block_tokens: int
    live: list[int] = field(default_factory=list)  # requests scheduled
    requests: int = 0
    context_tokens: int = 0  # sent to the engine
    hit_tokens: int = 0  # of these, found in the prefix cache
    aligned_tokens: int = 0  # of these, in whole blocks before the last token: what could be found
    preemptions: int = 0

    def record(self, output: Any) -> None:
        """Take in a `SchedulerOutput` of vLLM."""
        if not output.num_scheduled_tokens:
            return
        self.live.append(len(output.num_scheduled_tokens))
        for request in output.scheduled_new_reqs:
            tokens = len(request.prompt_token_ids)
            self.requests += 1
            self.context_tokens += tokens
            self.hit_tokens += request.num_computed_tokens
            self.aligned_tokens += (tokens - 1) // self.block_tokens * self.block_tokens
        self.preemptions += len(output.preempted_req_ids or ())


def watch(engine: VllmEngine) -> list[Trace]:
    """Record every step from now on into the last trace of the list."""
    traces = [Trace(engine.block_tokens)]
    schedule = engine.scheduler.schedule

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        output = schedule(*arguments, **keywords)
        traces[-1].record(output)
        return output

    engine.scheduler.schedule = recorded
    return traces


@dataclass
class Leaves:
    """What a sampler made."""

    lengths: list[int] = field(default_factory=list)  # tokens of every leaf
    effective: list[float] = field(default_factory=list)  # 1 / sum of squared path masses, a prompt
    decoded: int = 0  # physical tokens
    fallbacks: int = 0  # requests


def flat(engine: VllmEngine, prompts: Sequence[Prompt], config: Config, mixing: random.Random | None = None) -> Leaves:
    """vLLM's own `generate(n=W)`, all prompts queued: the strongest plain baseline.

    mixing: every answer is a request of its own, in random order.
    """
    tree = config.rollout.tree
    contexts = [_tokens(prompt.tokens) for prompt in prompts]
    if mixing:
        contexts *= tree.width
        mixing.shuffle(contexts)
    params = _params(engine, tree.response_tokens, n=1 if mixing else tree.width)
    outputs = engine.llm.generate(contexts, params, use_tqdm=False)
    result = Leaves(effective=[float(tree.width)] * len(prompts))
    result.lengths = [len(answer.token_ids) for output in outputs for answer in output.outputs]
    result.decoded = sum(result.lengths)
    return result


def ours(
    engine: VllmEngine, prompts: Sequence[Prompt], config: Config, expansion: str, group: dist.ProcessGroup | None
) -> Leaves:
    """This package's collector. Under `run.deterministic` by logical time."""
    tree = config.rollout.tree.model_copy(update={"expansion": expansion})
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"tree": tree})})
    count = len(prompts)
    queue = (
        LockstepQueue(None, 0, 1, Wanted(count, count, count))
        if config.run.deterministic
        else SharedQueue(dist.HashStore(), 0, 1, Wanted(count, count, count))
    )
    leads = group is None or dist.get_rank() == 0
    collector = Collector(config, engine, None, None, group)  # type: ignore[arg-type]  # no text is looked at
    found = collector.collect(prompts, queue if leads else None, 0, 0.0)
    result = Leaves(decoded=found.counts.decoded_tokens)
    for tree_ in found.trees:
        result.lengths += [tree_.leaf_tokens(leaf) for leaf in range(len(tree_.leaves))]
        result.effective.append(float(1 / (tree_.masses(fallback=False) ** 2).sum()))
        starts = [n for n in tree_.nodes[1:] if n.from_fallback and not tree_.nodes[n.parent].from_fallback]
        result.fallbacks += len(starts)
    return result


# The released design: every path of a wave of prompts takes one segment in one blocking call. Two of its defects are
# left out, because they would change what is sampled: the context behind a fallback is the right one, and a segment's
# first token may end it.


@dataclass
class _Path:
    tokens: list[int]  # of the response
    mass: float
    depth: int = 0


@dataclass
class _Query:
    prompt: Prompt
    live: list[_Path]
    leaves: list[tuple[_Path, bool]] = field(default_factory=list)  # with whether it ended by EOS
    before: int = 0  # leaves at the last boundary


def depth_synchronous(
    engine: VllmEngine, prompts: Sequence[Prompt], config: Config, wave: int, rng: random.Random
) -> Leaves:
    """Waves of `wave` prompts, one after the other."""
    result = Leaves()
    for begin in range(0, len(prompts), wave):
        _wave(engine, prompts[begin : begin + wave], config, rng, result)
    return result


def _wave(engine: VllmEngine, prompts: Sequence[Prompt], config: Config, rng: random.Random, result: Leaves) -> None:
    tree = config.rollout.tree
    queries = []
    for prompt in prompts:
        first = first_children(tree, rng)
        queries.append(_Query(prompt, [_Path([], 1 / first) for _ in range(first)]))
    while any(query.live for query in queries):
        _segment(engine, queries, config, result)
        for query in queries:
            _branch(query, config, rng, result)
    for query in queries:
        result.lengths += [len(path.tokens) for path, _ in query.leaves]
        # Fallback leaves have no share in an unbiased estimate; the share of the path they restart from is kept by it.
        masses = [path.mass for path, _ in query.leaves]
        result.effective.append(sum(masses) ** 2 / sum(mass**2 for mass in masses))


def _segment(engine: VllmEngine, queries: Sequence[_Query], config: Config, result: Leaves) -> None:
    tree = config.rollout.tree
    paths = [(query, path) for query in queries for path in query.live]
    prompts = [_tokens(query.prompt.tokens + path.tokens) for query, path in paths]
    params = [_params(engine, min(tree.segment_tokens, tree.response_tokens - len(path.tokens))) for _, path in paths]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    for query in queries:
        query.live = []
    for (query, path), output in zip(paths, outputs, strict=True):
        answer = output.outputs[0]
        path.tokens = path.tokens + list(answer.token_ids)
        path.depth += 1
        result.decoded += len(answer.token_ids)
        ended = answer.finish_reason == "stop"
        if ended or len(path.tokens) >= tree.response_tokens or path.depth >= tree.max_depth:
            query.leaves.append((path, ended))
        else:
            query.live.append(path)


def _branch(query: _Query, config: Config, rng: random.Random, result: Leaves) -> None:
    tree = config.rollout.tree
    factor = rng.randint(*tree.branching.factor)
    done, survivors = len(query.leaves), query.live
    new, query.before = done - query.before, done
    if survivors:
        children = max(len(survivors), min(tree.width - done, factor * (new + len(survivors))))
        share = children // len(survivors)
        counts = [share] * len(survivors)
        counts[-1] += children - share * len(survivors)  # as released: the last one takes all that is left
        query.live = [
            _Path(path.tokens, path.mass / count, path.depth)
            for path, count in zip(survivors, counts, strict=True)
            for _ in range(count)
        ]
        return
    missing = tree.width - done
    candidates = [path for path, ended in query.leaves if ended]
    rng.shuffle(candidates)
    while missing > 0:
        source = candidates.pop() if candidates else _Path([], 0.0)
        windows = math.ceil(len(source.tokens) / tree.segment_tokens)
        kept = rng.randrange(windows) if windows else 0
        copies = min(factor, missing)
        missing -= copies
        result.fallbacks += copies
        query.live += [_Path(source.tokens[: kept * tree.segment_tokens], 0.0, kept) for _ in range(copies)]
        if not candidates:
            break


def _params(engine: VllmEngine, max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(
        n=n, max_tokens=max_tokens, temperature=1.0, logprobs=0, detokenize=False, stop_token_ids=engine.eos_ids
    )


def _tokens(tokens: Sequence[int]) -> Any:
    return {"prompt_token_ids": list(tokens)}
