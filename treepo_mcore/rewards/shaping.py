"""From a score to the reward that the advantage sees."""

from __future__ import annotations

from treepo_mcore.config import RewardConfig


def shape(
    score: float, n_tokens: int, max_tokens: int, config: RewardConfig, failed: bool = False, added: float = 0.0
) -> float:
    """What `reward.function` gave and what is added to it, less DAPO's soft overlong penalty.

    score: of a function that says right or wrong it becomes `config.correct` or `config.wrong`. added: of the
    components, with their weights.
    failed: the score is no answer of the function, see `failed_score`, and is the reward as it stands.
    The penalty grows linearly over the last `overlong_buffer_tokens` (B) of the `max_tokens` (M) a response of
    `n_tokens` (n) may have: (n - (M - B)) / B x `overlong_penalty`, at most `overlong_penalty` (DAPO, eq. 13).
    """
    reward = score + added
    if config.verdict and not failed:
        reward = (config.correct if score > 0 else config.wrong) + added
    buffer = config.overlong_buffer_tokens
    excess = n_tokens - (max_tokens - buffer)
    if buffer == 0 or excess <= 0:
        return reward
    return reward - min(excess / buffer, 1.0) * config.overlong_penalty


def failed_score(config: RewardConfig) -> float:
    """Of a call that gave no answer: the number that `reward.failed` is, else the least there is, `reward.wrong`."""
    return config.failed if isinstance(config.failed, float) else config.wrong
