"""What a person sees of a run: a line a step, and on a terminal the part that is under way."""

from __future__ import annotations

import sys
import time

from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step

CLEAR_LINE = "\r\x1b[K"


class Progress(Observer):
    """Rank 0's voice. Rank 0 makes one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.begin, self.first = time.perf_counter(), 0

    def start(self, step: int) -> None:
        """Time left is reckoned from here."""
        self.begin, self.first = time.perf_counter(), step

    def say(self, text: str) -> None:
        """A line of its own."""
        print(f"{CLEAR_LINE if sys.stdout.isatty() else ''}{text}", flush=True)

    def part(self, step: int, name: str) -> None:
        """Shown until the next line, on a terminal only."""
        if sys.stdout.isatty():
            print(f"{CLEAR_LINE}step {step + 1}/{self.steps}  {name} ...", end="", flush=True)

    def trained(self, step: Step) -> Wish:
        """What a step came to."""
        values, done = step.values, step.number + 1 - self.first
        left = (time.perf_counter() - self.begin) / done * (self.steps - step.number - 1)
        minutes, seconds = divmod(int(left), 60)
        told = _sampled(step) if "reward/mean" in values else _taught(step)
        none = "" if step.updates else "  no informative prompt: nothing was trained"
        self.say(f"step {step.number + 1:>4}/{self.steps}  {told}  left {minutes}m{seconds:02d}s{none}")
        return Wish.NOTHING

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """How the held-out prompts were answered."""
        shown = {name: value for name, value in values.items() if not name.endswith(("_low", "_high"))}
        told = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in shown.items())
        when = "before training" if step == 0 else "after training" if step >= self.steps else f"after {step} steps"
        self.say(f"held-out {told} {when}")


def _sampled(step: Step) -> str:
    values = step.values
    return (
        f"reward {values['reward/mean']:+.3f}  accuracy {values['reward/accuracy']:.3f}  "
        f"length {values['rollout/response_tokens_mean']:.0f}  {values['rollout/tokens_per_second']:.0f} tok/s  "
        f"rollout {step.seconds['rollout']:.1f}s  update {step.seconds.get('update', 0.0):.1f}s"
    )


def _taught(step: Step) -> str:
    values, seconds = step.values, step.seconds["update"]
    speed = values["data/tokens"] / seconds
    return f"loss {values['actor/loss']:.3f}  {speed:.0f} tok/s  update {seconds:.1f}s"
