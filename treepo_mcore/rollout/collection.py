"""What an engine brings home from a rollout phase."""

from __future__ import annotations

from dataclasses import dataclass, field

from treepo_mcore.grow.contrast import Rare
from treepo_mcore.records import Counts
from treepo_mcore.tree.tree import Tree


@dataclass
class Collection:
    """What one engine made of its prompts; only the engine's first rank holds rewards."""

    trees: list[Tree] = field(default_factory=list)  # complete, in the order of their numbers
    restarts: list[Tree] = field(default_factory=list)  # behind remembered answers, in the order of their numbers
    drawn: list[int] = field(default_factory=list)  # numbers of all prompts that were started
    unfinished: list[int] = field(default_factory=list)  # numbers of the prompts given up in the tail, or put off
    rare: list[tuple[int, Rare]] = field(default_factory=list)  # answers to remember, with the numbers of their prompts
    counts: Counts = field(default_factory=Counts)

    def add(self, other: Collection) -> None:
        """What another engine made of its prompts."""
        for name in ("trees", "restarts", "drawn", "unfinished", "rare"):
            getattr(self, name).extend(getattr(other, name))
        self.counts.add(other.counts)
        self.sort()

    def sort(self) -> None:
        """By the numbers of the prompts."""
        self.rare.sort()
        for trees in (self.trees, self.restarts):
            trees.sort(key=lambda tree: int(tree.meta["number"]))
