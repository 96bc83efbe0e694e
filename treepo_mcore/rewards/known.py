"""The reward functions that a configuration can name, and the record of what a reward is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# By the name in `reward.function`; the names of config/rewards.py. The standard library is enough to read this:
# reward workers start with it.
REWARDS = {
    "math": "treepo_mcore.rewards.math:math_reward",
    "exact": "treepo_mcore.rewards.short:exact",
    "choice": "treepo_mcore.rewards.short:choice",
    "numeric": "treepo_mcore.rewards.short:numeric",
    "format": "treepo_mcore.rewards.short:format_reward",
    "code": "treepo_mcore.rewards.code:code",
    "judge": "treepo_mcore.rewards.judge:judge",
}


@dataclass(frozen=True)
class Named:
    """A function by its place, ``package.module:name``, and what it is called with besides the answer."""

    place: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What a worker computes for each answer, as it travels on its command line."""

    score: Named
    components: dict[str, Named]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """The opposite."""
        return cls(Named(**data["score"]), {name: Named(**part) for name, part in data["components"].items()})
