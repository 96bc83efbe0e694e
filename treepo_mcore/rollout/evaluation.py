"""Answers to held-out prompts and what they are worth: one greedy answer each, or k sampled ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from treepo_mcore.config import RewardConfig
from treepo_mcore.data.prompts import Prompt
from treepo_mcore.engine.protocol import Engine
from treepo_mcore.grow.sampler import Request, stable_seed
from treepo_mcore.rewards.math import boxed_answer
from treepo_mcore.rewards.pool import Result, RewardPool


def sample(engine: Engine, prompts: Sequence[Prompt], samples: int, max_tokens: int, seed: int) -> list[list[int]]:
    """`samples` independent answers to each prompt at the rollout's temperature, EOS included, prompt by prompt.

    The draws follow (seed, prompt, number of the answer) alone: the same weights answer the same.
    """
    answers: dict[str, list[int]] = {}
    for prompt in prompts:
        for number in range(samples):
            name = f"eval/{prompt.id}/{number}"
            answers[name] = []
            draws = stable_seed(seed, "eval", prompt.id, number)
            engine.submit(Request(name, 0, prompt.tokens, max_tokens, draws))
    running = len(answers)
    while running:
        for chunk in engine.step():
            answers[chunk.request] += chunk.tokens
            running -= chunk.finish is not None
    return list(answers.values())


def score(rewards: RewardPool, prompts: Sequence[Prompt], texts: Sequence[str], samples: int) -> Tensor:
    """Sums over prompts, float64[4]: correct answers, their scores, majorities that are correct, prompts with any.

    texts: `samples` a prompt, prompt by prompt.
    """
    for index, text in enumerate(texts):
        prompt = prompts[index // samples]
        rewards.submit(index, text, prompt.answer, prompt.text, prompt.meta)
    results: dict[object, Result] = {result.key: result for result in rewards.drain()}
    sums = torch.zeros(4, dtype=torch.float64)
    for begin in range(0, len(texts), samples):
        mine = [results[index] for index in range(begin, begin + samples)]
        right = [result.correct for result in mine]
        winner = majority([boxed_answer(text) for text in texts[begin : begin + samples]])
        good = winner is not None and right[winner]
        scores = sum(result.score for result in mine)
        sums += torch.tensor([sum(right), scores, good, any(right)], dtype=torch.float64)
    return sums


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first of the most frequent answers, of equally frequent ones the one met first; None do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None


def metrics(sums: Tensor, prompts: int, samples: int, config: RewardConfig) -> dict[str, float]:
    """`score`'s sums over all prompts as means.

    With several samples `eval/accuracy` is mean@k, `eval/majority` maj@k and `eval/best` the share of prompts with any
    correct answer. Answers of a custom function need no box, so there is no majority; their mean score is there.
    """
    correct, scores, majorities, best = sums.tolist()
    values = {"eval/accuracy": correct / (prompts * samples)}
    if config.custom:
        values["eval/score"] = scores / (prompts * samples)
    if samples > 1:
        if not config.custom:
            values["eval/majority"] = majorities / prompts
        values["eval/best"] = best / prompts
    return values
