"""What answers to one prompt have in common: the short answer that a majority is counted of."""

from __future__ import annotations

from collections.abc import Callable

from treepo_mcore.config import RewardConfig
from treepo_mcore.rewards.math import boxed_answer
from treepo_mcore.rewards.short import found_answer, letter_of, read_number

Vote = Callable[[str], str | None]  # a response; None: it does not vote


def vote_of(config: RewardConfig) -> Vote | None:
    """As `reward.function` reads answers; None for a function that does not say where the answer is."""
    pattern = config.options.get("pattern", "")
    match config.function:
        case "math":
            return boxed_answer
        case "exact":
            return lambda response: " ".join(found_answer(response, pattern).split()) or None
        case "choice":
            return lambda response: letter_of(found_answer(response, pattern))
        case "numeric":
            return lambda response: _text(read_number(found_answer(response, pattern)))
        case _:
            return None


def _text(value: object) -> str | None:
    return None if value is None else str(value)
