"""What a person sees of a run: a line a step, and on a terminal the phase that is under way."""

from __future__ import annotations

import sys
import time
from typing import Any

CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Rank 0's voice; silent on the others."""

    def __init__(self, steps: int, speaks: bool) -> None:
        self.steps, self.speaks = steps, speaks
        self.begin, self.first = time.perf_counter(), 0

    def start(self, step: int) -> None:
        """Time left is reckoned from here."""
        self.begin, self.first = time.perf_counter(), step

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.speaks:
            print(f"{CLEAR_LINE if sys.stdout.isatty() else ''}{text}", flush=True)

    def phase(self, step: int, name: str) -> None:
        """Shown until the next line, on a terminal only."""
        if self.speaks and sys.stdout.isatty():
            print(f"{CLEAR_LINE}step {step + 1}/{self.steps}  {name} ...", end="", flush=True)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """What a step came to."""
        done = step + 1 - self.first
        minutes, seconds = divmod(int((time.perf_counter() - self.begin) / done * (self.steps - step - 1)), 60)
        self.say(
            f"step {step + 1:>4}/{self.steps}  reward {values['reward/mean']:+.3f}  "
            f"accuracy {values['reward/accuracy']:.3f}  length {values['rollout/response_tokens_mean']:.0f}  "
            f"{values['rollout/tokens_per_second']:.0f} tok/s  rollout {values['time/rollout']:.1f}s  "
            f"update {values['time/update']:.1f}s  left {minutes}m{seconds:02d}s"
        )
