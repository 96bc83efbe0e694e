"""What watches a run: observers are told of everything that happens in it, and may ask for something.

The trainer calls all of them in one place. Files, the line on the terminal, trackers and the mismatch guard are
observers; so is whatever is given to `Trainer(observers=...)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from treepo_mcore.records import Step


class Wish(IntEnum):
    """What an observer asks of the run; where several ask, on any rank, the greatest is done."""

    NOTHING = 0
    SAVE = 1  # a checkpoint after this step
    SKIP = 2  # no update in this step: only before it
    STOP = 3  # a checkpoint after this step, and the end, as if a signal had asked for it


class Observer:
    """Base of all observers: it asks for nothing. Methods are called on every rank that has made the observer."""

    def start(self, step: int) -> None:
        """The run begins, or goes on, at this step."""

    def part(self, step: int, name: str) -> None:
        """A part of a step begins: push, rollout, update."""

    def sampled(self, step: Step) -> Wish:
        """The trees are there and chosen; nothing is updated yet."""
        return Wish.NOTHING

    def trained(self, step: Step) -> Wish:
        """The step is done, its values are complete. An error raised here ends the run, with nothing saved of it."""
        return Wish.NOTHING

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Held-out prompts were answered, before this step; names begin with ``eval/``."""

    def say(self, text: str) -> None:
        """A line for people."""

    def close(self) -> None:
        """The run has ended on this rank."""


class Observers(Observer):
    """All of a rank's, in order, as one."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self.all = list(observers)

    def start(self, step: int) -> None:
        for observer in self.all:
            observer.start(step)

    def part(self, step: int, name: str) -> None:
        for observer in self.all:
            observer.part(step, name)

    def sampled(self, step: Step) -> Wish:
        """Collective: the greatest wish of all ranks."""
        return _greatest([observer.sampled(step) for observer in self.all])

    def trained(self, step: Step) -> Wish:
        """Collective: the greatest wish of all ranks."""
        return _greatest([observer.trained(step) for observer in self.all])

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        for observer in self.all:
            observer.evaluated(step, values)

    def say(self, text: str) -> None:
        for observer in self.all:
            observer.say(text)

    def close(self) -> None:
        for observer in self.all:
            observer.close()


def _greatest(wishes: list[Wish]) -> Wish:
    asked = torch.tensor(max(wishes, default=Wish.NOTHING))
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return Wish(int(asked))


def run_values(step: Step) -> dict[str, Any]:
    """The step's line in metrics.jsonl: its values, and `time/...` seconds of its parts."""
    return step.values | {f"time/{name}": seconds for name, seconds in step.seconds.items()}
