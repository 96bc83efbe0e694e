"""Metrics of a run: wall time by phase, and one JSON object a step in metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Clock:
    """Wall seconds of named phases within a step."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        """announce is called with a phase's name when it begins."""
        self.seconds: dict[str, float] = {}
        self.announce = announce

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`."""
        self.announce(name)
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
