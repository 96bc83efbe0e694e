"""SIGUSR1 and SIGTERM ask a run to stop: it finishes its step, saves, and ends with a status of its own."""

from __future__ import annotations

import signal
from types import FrameType

from treepo_mcore.system.environment import STOP_SIGNALS

# Exit status of a run that saved because it was asked to stop (EX_TEMPFAIL of sysexits.h); the same command continues.
STOPPED = 75


class StopRequest:
    """Remembers a signal until the trainer looks, which is between steps."""

    def __init__(self) -> None:
        self.number = 0  # of the signal, 0 before there is one

    def listen(self) -> None:
        """From now on SIGUSR1 (a batch script, before the time limit) and SIGTERM (preemption) no longer kill."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
