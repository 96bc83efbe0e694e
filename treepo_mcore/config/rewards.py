"""What a finished path is worth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from treepo_mcore.config.base import Section

VERDICTS = ("math", "exact", "choice", "numeric", "code")  # functions that say right or wrong
TEXT_ANSWERS = ("math", "exact", "choice", "numeric")  # functions to which an answer is text


class ComponentConfig(Section):
    """Something that is added to the reward."""

    function: str  # a name of ours or yours, as in reward.function
    weight: float = Field(1.0, allow_inf_nan=False)  # times what it returns, a number or a mapping with a `score`
    options: dict[str, Any] = {}  # further arguments of the function


class RewardConfig(Section):
    """What a finished path is worth."""

    # math, exact, choice, numeric, format, code, judge (docs/rewards.md), or "package.module:name" called as
    # f(response=, answer=, prompt=, row=) -> float, with row: dict[str, Any] of the row's other columns; or verl's
    # compute_score(data_source, solution_str, ground_truth, extra_info). A coroutine is awaited. What it returns, a
    # number or a mapping with a `score`, is the reward; a leaf counts as correct where that is more than 0. Other
    # numbers of the mapping are in the metrics, as reward/NAME/mean. Its process has no environment variables named
    # ...TOKEN, ...KEY, ...SECRET.
    function: str = "math"
    options: dict[str, Any] = {}  # further arguments of the function, such as {ignore_case: true} of exact
    # Added to it, by name; in the metrics as reward/NAME/mean, without the weight. Only `function` says what is right.
    components: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], ComponentConfig] = {}
    correct: float = 1.0  # math, exact, choice, numeric, code: the reward of a correct answer
    wrong: float = -1.0  # the same: of any other; and see `failed`
    workers: int = Field(1, ge=1)  # processes per engine
    concurrency: int = Field(1, ge=1)  # calls at once in each of them, where a function is a coroutine, such as judge
    timeout: float = Field(5.0, gt=0)  # of one call, with its components
    memory_gib: float | None = Field(None, gt=0)  # address space of a worker; a call that wants more fails alone
    # What a leaf is worth whose call raised, hung or died; such a leaf is not correct, and makes no prompt informative.
    # wrong: `wrong`, which for a function of yours has to be the least that it returns; a number: that; drop: the leaf
    # leaves its tree, as if it had never been sampled.
    failed: Literal["wrong", "drop"] | float = "wrong"
    max_failed: float = Field(0.2, gt=0, le=1)  # share of a step's calls that may fail; beyond it the run stops
    overlong_buffer_tokens: int = Field(0, ge=0)  # soft length penalty over the last tokens (DAPO)
    overlong_penalty: float = Field(1.0, ge=0)
    shuffle: bool = False  # control experiment: rewards permuted among the leaves that a step trains on

    @property
    def verdict(self) -> bool:
        """Whether the function says right or wrong, and not what the answer is worth."""
        return self.function in VERDICTS

    @property
    def text_answers(self) -> bool:
        """Whether an answer has to be text or a number; for other functions lists and objects are answers, too."""
        return self.function in TEXT_ANSWERS
