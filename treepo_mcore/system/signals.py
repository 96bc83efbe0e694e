"""SIGUSR1 and SIGTERM ask a run to stop: it finishes its step, saves, and ends with a status of its own.

Before the first step there is nothing to finish or save: then it ends at once, with the same status.
"""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

from treepo_mcore.system.environment import STOP_SIGNALS
from treepo_mcore.system.time_limit import TimeLimit

# Exit status of a run that saved because it was asked to stop (EX_TEMPFAIL of sysexits.h); the same command continues.
STOPPED = 75


class StopRequest:
    """Remembers a signal until the trainer looks, which is between steps."""

    def __init__(self, limit_seconds: float = math.inf) -> None:
        """limit_seconds: of this process, from here on; the run stops, as for a signal, in time to save."""
        self.limit = TimeLimit(limit_seconds)
        self.number = 0  # of the signal, 0 before there is one
        self.steps = False  # whether there is a step to finish
        self.listens = False  # whether the process's handlers are this one's

    def listen(self) -> None:
        """From now on SIGUSR1 (a batch script, before the time limit) and SIGTERM (preemption) no longer kill."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        self.listens = True

    def begin_steps(self) -> None:
        """From now on a signal waits for the end of the step."""
        self.steps = True

    def end(self) -> None:
        """From now on the signals change nothing: the run ends with its status.

        A launcher ends the other ranks when the first has ended. Ignored signals stay so while Python closes, which a
        handler of Python's does not. Where nobody listened, they are left alone.
        """
        for number in STOP_SIGNALS if self.listens else ():
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.steps:
            # Without unwinding: threads of libraries that are half started would be waited for.
            os.write(2, f"{signal.Signals(number).name} before the first step: exit status {STOPPED}\n".encode())
            os._exit(STOPPED)
        self.number = number

    def on_any_rank(self) -> str | None:
        """The signal's name, or "time limit". Ranks get one at different times, or only one of them. Collective."""
        import torch
        import torch.distributed as dist

        late = signal.SIGALRM if self.limit.near() else 0
        asked = torch.tensor(self.number or int(late))
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked == signal.SIGALRM:
            return "time limit"
        return signal.Signals(int(asked)).name if asked else None


def out_of_time(begin: float, limit: float | None) -> bool:
    """Whether `limit` seconds have passed since `begin` (`time.perf_counter`). Rank 0's clock decides. Collective."""
    import torch
    import torch.distributed as dist

    if limit is None:
        return False
    late = torch.tensor(int(time.perf_counter() - begin > limit))
    dist.broadcast(late, 0)
    return bool(late)
