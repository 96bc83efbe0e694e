"""Who samples which prompt of a step, and when a step has enough.

The prompts of a step are numbered in the order of the data. They are drawn in that order, and one more may be drawn
for each that is rejected (its leaves all agree, or the engine lost it). So nothing is sampled in excess, and whatever
the engines' speeds, the prompts drawn in the end are the shortest run of numbers that holds as many accepted ones as
wanted: which prompts are accepted does not depend on how fast they were.

Only the first rank of an engine holds a queue.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

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

    def enough(self) -> bool:
        """Whether as many prompts are accepted as are wanted, while more are under way."""

    def closed(self) -> bool:
        """Whether all prompts of the step are done, on all engines."""


class Wanted(NamedTuple):
    """What a step is to bring."""

    accepted: int  # prompts; when they are there, the others are put off
    drawn: int  # prompts under way, at least as many
    limit: int  # the most that may be drawn
    # Of these, prompts that go on from an earlier step: they have the first numbers, and nobody draws them.
    resumed: int = 0  # on all engines
    resumed_here: int = 0


LOOKS_PER_SECOND = 2500  # of all engines together: a tenth of what a TCPStore serves (benchmarks/scale.py)
ENGINES = 1 << 16  # at most
# In the value of "done", one above the other: decided prompts, of these the rejected ones, engines that gave up.
REJECTED, GAVE_UP = 1 << 24, 1 << 48


@dataclass(frozen=True)
class _Seen:
    """What a look at the store shows, all of one moment."""

    done: int
    fresh: int  # times that one of the first numbers was asked for or resumed: it goes on behind the last one
    again: str  # "<how many numbers behind the first ones were drawn> <engine that drew the last one>"

    @property
    def decided(self) -> int:
        return self.done % REJECTED

    @property
    def rejected(self) -> int:
        return self.done // REJECTED % (GAVE_UP // REJECTED)

    @property
    def over(self) -> bool:
        return self.done >= GAVE_UP

    @property
    def replaced(self) -> int:
        return int(self.again.split()[0])


class SharedQueue:
    """Engines of any speed draw from counters in a store: the default.

    At any time an engine holds at most its share of the prompts wanted. Where there are few, the first engine to ask
    would otherwise take as many as it has room for, and the others would wait for it.

    The first numbers, as many as are wanted, are drawn by adding to a counter: no engine is refused because another was
    faster. A look at everything is one request, and what it showed is used for a while: thousands of idle engines that
    ask again and again are no load for the store.
    """

    def __init__(self, store: dist.Store, engine: int, engines: int, wanted: Wanted) -> None:
        """store: the same empty one on all engines.

        Raises ValueError where there are more engines or prompts than the counters have room for.
        """
        limit = wanted.limit
        if engines > ENGINES or limit >= REJECTED:
            raise ValueError(f"expected at most {ENGINES} engines and {REJECTED - 1} prompts: {engines} and {limit}")
        self._store, self._engine, self._limit = store, engine, limit
        self._resumed, self._enough = wanted.resumed, wanted.accepted
        self._wanted = max(min(wanted.drawn, limit), wanted.resumed)
        self._share = math.ceil(wanted.drawn / engines)
        self._held = wanted.resumed_here
        self._pause = engines / LOOKS_PER_SECOND
        store.add("done", 0)
        store.add("fresh", 0)
        store.compare_set("again", "", "0 -")
        self._look()

    def draw(self) -> int | None:
        """See `PromptQueue`."""
        seen = self._recent()
        if self._held >= self._share or seen.over:
            return None
        number = None
        if seen.fresh < self._wanted:
            drawn = self._store.add("fresh", 1) + self._resumed
            self._seen = replace(seen, fresh=drawn)
            number = drawn - 1 if drawn <= self._wanted else None
        if number is None:
            number = self._replacement()
        self._held += number is not None
        return number

    def held_back(self) -> bool:
        """See `PromptQueue`."""
        self._recent()
        return self._held >= self._share and self._has_more()

    def report(self, rejected: bool) -> None:
        """See `PromptQueue`."""
        self._held -= 1
        self._add(1 + REJECTED * rejected)

    def tick(self, finished: bool) -> None:
        """See `PromptQueue`."""

    def give_up(self) -> None:
        """See `PromptQueue`."""
        self._add(GAVE_UP)

    def enough(self) -> bool:
        """See `PromptQueue`."""
        seen = self._recent()
        return self._enough <= seen.decided - seen.rejected and self._enough < self._wanted

    def closed(self) -> bool:
        """See `PromptQueue`."""
        self._recent()
        if self._is_closed():
            self._look()  # what this engine changed since the last look is newer than the rest of it
        return self._is_closed()

    def _replacement(self) -> int | None:
        """A number behind the first ones, in the place of a rejected prompt."""
        while self._has_more():
            number = self._seen.replaced
            # With the engine's name in it, a changed value is known to be ours.
            mine = f"{number + 1} {self._engine}"
            found = self._store.compare_set("again", self._seen.again, mine).decode()
            self._seen = replace(self._seen, again=found)
            if found == mine:
                return self._wanted + number
        return None

    def _is_closed(self) -> bool:
        # When all were decided that had been drawn, the count of rejected ones is final.
        drawn = min(self._seen.fresh, self._wanted) + self._seen.replaced
        return self._seen.decided == drawn and not self._has_more()

    def _has_more(self) -> bool:
        seen = self._seen
        allowed = min(self._limit, self._wanted + seen.rejected)
        return not seen.over and min(seen.fresh, self._wanted) + seen.replaced < allowed

    def _add(self, change: int) -> None:
        self._seen = replace(self._seen, done=self._store.add("done", change))

    def _recent(self) -> _Seen:
        if time.monotonic() >= self._next:
            self._look()
        return self._seen

    def _look(self) -> None:
        done, fresh, again = self._store.multi_get(["done", "fresh", "again"])
        self._seen = _Seen(int(done), int(fresh) + self._resumed, again.decode())
        self._next = time.monotonic() + self._pause


class LockstepQueue:
    """Engine e of E draws the numbers e, e + E, ...; engines tell each other only on ticks: repeatable."""

    def __init__(self, leaders: dist.ProcessGroup | None, engine: int, engines: int, wanted: Wanted) -> None:
        """leaders: the first ranks of all engines, None for one engine."""
        self._leaders, self._engines, self._limit = leaders, engines, wanted.limit
        self._wanted, self._accepted = max(min(wanted.drawn, wanted.limit), wanted.resumed), wanted.accepted
        self._next = wanted.resumed + engine
        self._mine = 0  # rejected here
        self._done = 0  # decided here
        self._allowed = self._wanted
        self._enough = False
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
        self._done += 1

    def tick(self, finished: bool) -> None:
        """See `PromptQueue`."""
        # An engine is busy while it runs something or has a number of its own left to draw.
        has_more = self._next < self._allowed and not self._over
        counts = torch.tensor([self._mine, int(not finished or has_more), int(self._over), self._done])
        if self._leaders is not None:
            dist.all_reduce(counts, group=self._leaders)  # summed over engines
        rejected, busy, given_up, done = counts.tolist()
        self._enough = self._accepted <= done - rejected and self._accepted < self._wanted
        # Every rejected prompt lets one more be drawn, unless some engine has given its tail up.
        allowed = self._allowed if given_up else min(self._limit, self._wanted + rejected)
        # A raised limit gives engines new numbers, which they only learn of now: they must have a tick to draw them
        # before the step can be over.
        self._closed = not busy and allowed == self._allowed
        self._allowed = allowed

    def enough(self) -> bool:
        """See `PromptQueue`."""
        return self._enough

    def give_up(self) -> None:
        """See `PromptQueue`."""
        self._over = True

    def closed(self) -> bool:
        """See `PromptQueue`."""
        return self._closed
