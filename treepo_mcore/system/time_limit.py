"""Time limits as sbatch takes them, and whether a run has to stop to keep one."""

from __future__ import annotations

import math
import re
import time

from treepo_mcore.config import ConfigError


def seconds_of(limit: str, option: str = "--time") -> float:
    """Of M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0, infinite and UNLIMITED are none. Raises `ConfigError`."""
    if limit.lower() in ("infinite", "unlimited", "0"):
        return math.inf
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", limit):
        raise ConfigError(f"{option}: expected MINUTES, H:M:S, D-H:M:S or UNLIMITED, found {limit!r}")
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = parts + [0] * (3 - len(parts))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class TimeLimit:
    """Counts from when it is made."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.looked: float | None = None
        self.longest = 0.0  # between two looks

    def near(self) -> bool:
        """Whether what is left may be too little for another step and a checkpoint.

        It is when fewer seconds are left than twice the longest time between two of these questions.
        """
        now = time.monotonic()
        if self.looked is not None:
            self.longest = max(self.longest, now - self.looked)
        self.looked = now
        return now + 2 * self.longest > self.end
