"""Where paths fork when forks are planned: depths with widths instead of a factor at every boundary (docs/algorithm.md
2.8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from treepo_mcore.config import TreeConfig
from treepo_mcore.grow.forks import best_plan
from treepo_mcore.tree.curve import CurveSums, mean_length, rising
from treepo_mcore.tree.profile import STEPS, ProfileSums
from treepo_mcore.tree.tree import Tree

MEMORY = 10  # steps that the running mean of the response length looks back, and twice that of the curve
FIRST_SHARE = 0.5  # of the longest response: the mean length before anything was sampled
MEASURING_SHARE = 0.45  # where paths fork before the first plan of `auto`, and where flat sampling is as good
WORTH = 1.03  # a smaller gain is not worth a fork


class Fork(NamedTuple):
    """Paths that live at `tokens` response tokens fork until, with those that ended before, there are `width`."""

    tokens: int
    width: int


Forks = tuple[Fork, ...]  # ascending; the first is the prompt's, at 0 tokens


Planned = Sequence[tuple[float, int]]  # as branching.schedule


class Schedule:
    """The planned forks of each step. Depths given as shares follow the mean response length of the last steps.

    Under `auto` the plan follows the curve of where outcomes are decided (1.8), measured from the trees themselves.
    """

    def __init__(self, config: TreeConfig) -> None:
        self._config = config
        self._auto = config.branching.schedule == "auto"
        self._mean = FIRST_SHARE * config.response_tokens
        self._steps = 0
        self._curve, self._profile = CurveSums(), ProfileSums()
        self._planned: Planned | None = None
        if self._auto:
            self._planned = self._measuring()
        elif config.branching.schedule is not None:
            assert config.branching.schedule != "auto"
            self._planned = config.branching.schedule

    def forks(self) -> Forks | None:
        """For the next step; None where paths fork at every boundary."""
        planned = self._planned
        if planned is None:
            return None
        if self._auto and len(planned) == 1 and self._is_last_before_planning():
            planned = self._measuring()  # answers that share nothing say nothing about the curve
        return resolve_forks(planned, self._config, self._mean)

    def look(self, trees: Sequence[Tree]) -> str | None:
        """Take a step's trees in. Returns a line for people when the plan was made anew."""
        lengths = [mean_length(tree) for tree in trees]
        weight = max(1 / (self._steps + 1), 1 / MEMORY)  # a plain mean at first
        self._mean += weight * (sum(lengths) / len(lengths) - self._mean)
        if self._auto:
            self._curve = self._curve.faded(1 - 0.5 / MEMORY) + CurveSums.of(trees)
            self._profile = self._profile.faded(1 - 1 / MEMORY) + ProfileSums.of(trees)
        plans = self._auto and self._is_last_before_planning()
        self._steps += 1
        return self._plan_anew() if plans else None

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {
            "mean_length": self._mean,
            "steps": self._steps,
            "curve": self._curve.state_dict(),
            "profile": self._profile.state_dict(),
            "planned": self._planned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. A schedule of the configuration counts, whatever the saved run had."""
        self._mean, self._steps = state["mean_length"], state["steps"]
        self._curve = CurveSums.from_state_dict(state["curve"])
        self._profile = ProfileSums.from_state_dict(state["profile"])
        if self._auto and state["planned"]:
            self._planned = [(share, width) for share, width in state["planned"]]

    def _is_last_before_planning(self) -> bool:
        return (self._steps + 1) % self._config.branching.replan_every == 0

    def _measuring(self) -> Planned:
        width = self._config.width
        return [(0.0, (width + 1) // 2), (MEASURING_SHARE, width)]

    def _plan_anew(self) -> str:
        points = self._curve.points()
        if not points:
            return "forks: no two leaves of one tree have differed behind a fork yet; the plan stays as it is"
        known = rising(points, [step / STEPS for step in range(1, STEPS + 1)])
        plan = best_plan(known, self._config.width, self._profile.profile())
        seen = f"{known[STEPS // 2 - 1]:.2f} of the variance is decided at half of the mean length of {self._mean:.0f}"
        if plan.gain < WORTH:
            self._planned = [(0.0, self._config.width)]
            return f"forks: {seen}: the best tree would gain {plan.gain:.2f}, flat sampling is as good and is used"
        self._planned = plan.forks
        return f"forks: {seen}: {[list(fork) for fork in plan.forks]}, expected gain over flat {plan.gain:.2f} a token"


def resolve_forks(planned: Planned, config: TreeConfig, mean: float) -> Forks:
    """Depths in tokens. A share that falls on another depth, or behind the longest response, leaves its width to it."""
    last = config.response_tokens - 1
    widths: dict[int, int] = {}
    for depth, width in planned:
        tokens = depth * (config.segment_tokens if depth >= 1 else mean)
        widths[min(max(round(tokens), depth > 0), last)] = width
    return tuple(Fork(*fork) for fork in sorted(widths.items()))
