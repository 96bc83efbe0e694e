"""From a score to the reward that the advantage sees."""

from __future__ import annotations

from treepo_mcore.config import RewardConfig


def shape(score: float, n_tokens: int, max_tokens: int, config: RewardConfig) -> float:
    """A custom function's score, or for "math" `config.correct` or `config.wrong`, less DAPO's soft overlong penalty.

    The penalty grows linearly over the last `overlong_buffer_tokens` (B) of the `max_tokens` (M) a response of
    `n_tokens` (n) may have: (n - (M - B)) / B x `overlong_penalty`, at most `overlong_penalty` (DAPO, eq. 13).
    """
    reward = score
    if not config.custom:
        reward = config.correct if score > 0 else config.wrong
    buffer = config.overlong_buffer_tokens
    excess = n_tokens - (max_tokens - buffer)
    if buffer == 0 or excess <= 0:
        return reward
    return reward - min(excess / buffer, 1.0) * config.overlong_penalty
