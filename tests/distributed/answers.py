"""Greedy answers of the ranks against those of `transformers` with the weights that they exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import EOS_IDS, Reference

from treepo_mcore.engine.protocol import Engine
from treepo_mcore.grow.sampler import Request

TOKENS = 64  # of an answer
DISTINCT = 16  # different tokens in an answer that tells weights apart


def greedy(engine: Engine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The most likely answer to each prompt, EOS included."""
    answers: dict[str, list[int]] = {f"greedy-{number}": [] for number in range(len(prompts))}
    for name, prompt in zip(answers, prompts, strict=True):
        engine.submit(Request(name, 0, prompt, tokens, seed=0, temperature=0.0))
    running = len(prompts)
    while running:
        for chunk in engine.step():
            answers[chunk.request] += chunk.tokens
            running -= chunk.finish is not None
    return list(answers.values())


def check_answers(ranks: list[dict[str, Any]], folder: Path, prompts: list[list[int]], rounds: int) -> int:
    """Every rank's `answers` after every round are those of `round_<n>`; how many are long and varied."""
    telling = 0
    for number in range(rounds):
        reference = Reference(folder / f"round_{number}")
        expected = [reference.greedy(prompt, TOKENS, EOS_IDS) for prompt in prompts]
        for rank, result in enumerate(ranks):
            assert result["answers"][number] == expected, f"round {number}, rank {rank}"
        telling += sum(len(answer) == TOKENS and len(set(answer)) >= DISTINCT for answer in expected)
    return telling
