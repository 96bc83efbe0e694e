"""Metrics of a run: one JSON object a step in metrics.jsonl, and one line a step for a person."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Clock:
    """Wall seconds of named phases within a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class MetricsLog:
    """Appends to ``metrics.jsonl``; a resumed run drops the lines of the steps that it repeats."""

    def __init__(self, directory: Path, resume_at: int) -> None:
        self.file = directory / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] < resume_at]
        self.file.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line."""
        with self.file.open("a") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")

    def _lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.is_file() else []


def progress_line(step: int, steps: int, values: dict[str, Any], left: float) -> str:
    """What a person follows."""
    minutes, seconds = divmod(int(left), 60)
    return (
        f"step {step + 1:>4}/{steps}  reward {values['reward/mean']:+.3f}  accuracy {values['reward/accuracy']:.3f}  "
        f"length {values['rollout/response_tokens_mean']:.0f}  {values['rollout/tokens_per_second']:.0f} tok/s  "
        f"rollout {values['time/rollout']:.1f}s update {values['time/update']:.1f}s  left {minutes}m{seconds:02d}s"
    )
