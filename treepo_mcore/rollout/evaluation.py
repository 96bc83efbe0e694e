"""Held-out prompts: answered as trees of one leaf, on the engines and through the queue of a rollout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treepo_mcore.config import (
    Config,
    FallbackConfig,
    FilterConfig,
    HeldOutConfig,
    RewardConfig,
    StoppingConfig,
    TreeConfig,
)
from treepo_mcore.data.prepared import Prompt, Prompts
from treepo_mcore.rewards.votes import Vote, vote_of
from treepo_mcore.tree.tree import Tree

Z = 1.959964  # standard deviations that hold 95 % of a normal distribution on both sides of its mean


@dataclass(frozen=True)
class HeldOut:
    """A set of prompts, and how they are answered (`Config.held_out`, with nothing left to a default)."""

    name: str  # empty where there is one set only
    prompts: Prompts
    config: HeldOutConfig

    @property
    def samples(self) -> int:
        """Answers per prompt."""
        return self.config.samples or 1

    def asked(self) -> list[Prompt]:
        """Every prompt as often as it is answered, one behind the other, with ids that tell the answers apart."""
        return [replace(prompt, id=f"{prompt.id}/{k}") for prompt in self.prompts for k in range(self.samples)]

    def sampling(self, config: Config) -> Config:
        """A run's configuration changed so that every prompt gets one independent answer, which ends by EOS or length.

        No prompt is replaced or given up.
        """
        longest, segment = self.config.max_response_tokens or 1, config.rollout.tree.segment_tokens
        tree = TreeConfig(
            width=1,
            segment_tokens=segment,
            max_depth=math.ceil(longest / segment),
            max_response_tokens=longest,
            stopping=StoppingConfig(boxed="none", repetition_count=0),
            fallback=FallbackConfig(candidates="none"),
        )
        rollout = config.rollout.model_copy(
            update={"sampler": "flat", "tree": tree, "tail_steps": None, "temperature": self.config.temperature}
        )
        return config.model_copy(update={"rollout": rollout, "filter": FilterConfig(enabled=False)})


@dataclass(frozen=True)
class Answer:
    """What one answer was worth."""

    correct: bool
    score: float
    vote: str | None  # of a majority

    @classmethod
    def of(cls, tree: Tree, vote: Vote | None) -> Answer:
        """The only leaf's."""
        leaf = tree.leaves[0]
        return cls(bool(leaf.correct), leaf.score or 0.0, vote(leaf.text or "") if vote else None)


LOST = Answer(False, 0.0, None)  # by its engine, or by its reward under `reward.failed: drop`


def metrics(found: Mapping[int, Answer], held_out: HeldOut, reward: RewardConfig) -> dict[str, float]:
    """Means over prompts, by names without their set's. found: answers by number in `HeldOut.asked`; others are wrong.

    With several samples `accuracy` is mean@k, `majority` maj@k, `pass@k` for powers of two the chance that any of k
    answers is correct, and `best` the share of prompts with any correct answer, which is pass@k of all. Each has an
    interval of 95 %, `NAME_low` to `NAME_high`: of what other prompts of the same kind would have given.
    A `majority` is there where `reward.function` says where an answer is, the mean `score` where it says what an answer
    is worth.
    """
    samples, prompts = held_out.samples, len(held_out.prompts)
    answers = [found.get(number, LOST) for number in range(prompts * samples)]
    groups = [answers[begin : begin + samples] for begin in range(0, len(answers), samples)]
    right = [sum(answer.correct for answer in group) for group in groups]
    of_prompts = {"accuracy": [count / samples for count in right]}
    if samples > 1:
        if vote_of(reward) is not None:
            of_prompts["majority"] = [float(_majority_is_right(group)) for group in groups]
        for k in (2**power for power in range(1, samples.bit_length()) if 2**power < samples):
            of_prompts[f"pass@{k}"] = [pass_at(k, samples, count) for count in right]
        of_prompts["best"] = [float(count > 0) for count in right]
    values: dict[str, float] = {}
    for name, shares in of_prompts.items():
        low, high = interval(shares)
        values |= {name: math.fsum(shares) / prompts, f"{name}_low": low, f"{name}_high": high}
    if not reward.verdict:
        values["score"] = math.fsum(answer.score for answer in answers) / len(answers)
    if lost := len(answers) - len(found):
        values["lost"] = lost
    return values


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """Of 95 %, for the mean of shares in [0, 1], one a prompt: Wilson's.

    Where prompts differ by less than right and wrong would, their number counts as so much larger.
    """
    number: float = len(shares)
    mean = math.fsum(shares) / number
    if 0 < mean < 1 and number > 1:
        variance = math.fsum((share - mean) ** 2 for share in shares) / number
        number = number * mean * (1 - mean) / variance if variance > 0 else math.inf
    if math.isinf(number):
        return mean, mean
    middle, square = mean + Z**2 / (2 * number), Z * math.sqrt(mean * (1 - mean) / number + Z**2 / (4 * number**2))
    return (middle - square) / (1 + Z**2 / number), (middle + square) / (1 + Z**2 / number)


def named(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of all sets as they are logged: ``eval/accuracy``, ``eval/NAME/accuracy``.

    Of several sets ``eval/accuracy`` is the mean, each counted alike.
    """
    flat = {
        f"eval/{name}/{key}" if name else f"eval/{key}": value
        for name, of_set in values.items()
        for key, value in of_set.items()
    }
    return {"eval/accuracy": sum(of_set["accuracy"] for of_set in values.values()) / len(values)} | flat


def pass_at(k: int, samples: int, right: int) -> float:
    """Chance that any of k answers, drawn from the samples without putting them back, is right.

    The unbiased estimate of arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _majority_is_right(group: Sequence[Answer]) -> bool:
    winner = majority([answer.vote for answer in group])
    return winner is not None and group[winner].correct


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first of the most frequent answers, of equally frequent ones the one met first; None do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None
