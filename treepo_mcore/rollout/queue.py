"""Who samples which prompt of a step, and when a step has enough.

The prompts of a step are numbered in the order of the data. They are drawn in that order, and one more may be drawn
for each that is rejected (its leaves all agree, or the engine lost it). So nothing is sampled in excess, and whatever
the engines' speeds, the prompts drawn in the end are the shortest run of numbers that holds as many accepted ones as
wanted: which prompts are accepted does not depend on how fast they were.

Only the first rank of an engine holds a queue.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist


class PromptQueue(Protocol):
    """One engine's view of the numbers of a step."""

    def draw(self) -> int | None:
        """The number of a prompt for this engine, None when there is none at the moment."""

    def held_back(self) -> bool:
        """Whether there is a prompt that this engine may draw once one of its own is done."""

    def report(self, rejected: bool) -> None:
        """A prompt of this engine is done: accepted, or rejected so that another one takes its place."""

    def tick(self, finished: bool) -> None:
        """Called after the same count of engine steps on every engine; `finished`: it runs nothing now."""

    def give_up(self) -> None:
        """This engine's tail took too long: no more prompts take the place of rejected ones, on any engine."""

    def closed(self) -> bool:
        """Whether all prompts of the step are done, on all engines."""


class SharedQueue:
    """Engines of any speed draw from one counter in a store: the default.

    At any time an engine holds at most its share of the prompts wanted. Where there are few, the first engine to ask
    would otherwise take as many as it has room for, and the others would wait for it.
    """

    def __init__(self, store: dist.Store, engine: int, engines: int, wanted: int, limit: int) -> None:
        """store: the same empty one on all engines. limit: the most prompts that may be drawn."""
        self._store, self._engine, self._wanted, self._limit = store, engine, wanted, limit
        self._share = math.ceil(wanted / engines)
        self._held = 0
        store.compare_set("drawn", "", "0 -")

    def draw(self) -> int | None:
        """See `PromptQueue`."""
        while self._held < self._share:
            current = self._store.get("drawn")
            number = int(current.split()[0])
            if number >= self._allowed():
                return None
            # With the engine's name in it, a changed value is known to be ours.
            mine = f"{number + 1} {self._engine}".encode()
            if self._store.compare_set("drawn", current.decode(), mine.decode()) == mine:
                self._held += 1
                return number
        return None

    def held_back(self) -> bool:
        """See `PromptQueue`."""
        return self._held >= self._share and int(self._store.get("drawn").split()[0]) < self._allowed()

    def report(self, rejected: bool) -> None:
        """See `PromptQueue`."""
        self._held -= 1
        self._store.add("rejected", int(rejected))
        self._store.add("decided", 1)

    def tick(self, finished: bool) -> None:
        """See `PromptQueue`."""

    def give_up(self) -> None:
        """See `PromptQueue`."""
        self._store.add("over", 1)

    def closed(self) -> bool:
        """See `PromptQueue`."""
        # In this order: when all were decided that had been drawn, the count of rejected ones is final.
        decided = self._store.add("decided", 0)
        drawn = int(self._store.get("drawn").split()[0])
        return decided == drawn and drawn >= self._allowed()

    def _allowed(self) -> int:
        if self._store.add("over", 0):
            return 0
        return min(self._limit, self._wanted + self._store.add("rejected", 0))


class LockstepQueue:
    """Engine e of E draws the numbers e, e + E, ...; engines tell each other only on ticks: repeatable."""

    def __init__(self, leaders: dist.ProcessGroup | None, engine: int, engines: int, wanted: int, limit: int) -> None:
        """leaders: the first ranks of all engines, None for one engine."""
        self._leaders, self._engines, self._wanted, self._limit = leaders, engines, wanted, limit
        self._next = engine
        self._mine = 0  # rejected here
        self._allowed = min(wanted, limit)
        self._over = False
        self._closed = False

    def draw(self) -> int | None:
        """See `PromptQueue`."""
        if self._next >= self._allowed:
            return None
        number = self._next
        self._next += self._engines
        return number

    def held_back(self) -> bool:
        """Never: the numbers of an engine are its own."""
        return False

    def report(self, rejected: bool) -> None:
        """See `PromptQueue`."""
        self._mine += rejected

    def tick(self, finished: bool) -> None:
        """See `PromptQueue`."""
        # An engine is busy while it runs something or has a number of its own left to draw.
        has_more = self._next < self._allowed and not self._over
        counts = torch.tensor([self._mine, int(not finished or has_more), int(self._over)])
        if self._leaders is not None:
            dist.all_reduce(counts, group=self._leaders)  # summed over engines
        rejected, busy, given_up = counts.tolist()
        # Every rejected prompt lets one more be drawn, unless some engine has given its tail up.
        allowed = self._allowed if given_up else min(self._limit, self._wanted + rejected)
        # A raised limit gives engines new numbers, which they only learn of now: they must have a tick to draw them
        # before the step can be over.
        self._closed = not busy and allowed == self._allowed
        self._allowed = allowed

    def give_up(self) -> None:
        """See `PromptQueue`."""
        self._over = True

    def closed(self) -> bool:
        """See `PromptQueue`."""
        return self._closed
