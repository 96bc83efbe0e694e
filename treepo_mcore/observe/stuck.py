"""A run in which nothing happens any more: every rank shows where it stands, and the job ends."""

from __future__ import annotations

import faulthandler
import socket
import sys
import threading

import torch.distributed as dist

from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step

STACKS_SECONDS = 2  # behind the line that says whose they are


class StuckWatch(Observer):
    """Ends this rank where a part of a step takes too long, with a line and the stacks of its threads on stderr.

    Where one rank is stuck the others wait for it, and all show their stacks at about the same time. The stacks come
    from `faulthandler`, which needs no cooperation from a thread that has Python's lock.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timer: threading.Timer | None = None

    def start(self, step: int) -> None:
        """Until the first part begins: an evaluation."""
        self._watch(f"before step {step}")

    def part(self, step: int, name: str) -> None:
        """Anew."""
        self._watch(f"step {step}, {name}")

    def trained(self, step: Step) -> Wish:
        """Anew."""
        self._watch(f"behind step {step.number}")
        return Wish.NOTHING

    def close(self) -> None:
        """No longer."""
        faulthandler.cancel_dump_traceback_later()
        if self.timer is not None:
            self.timer.cancel()

    def _watch(self, where: str) -> None:
        self.close()
        self.timer = threading.Timer(self.seconds, self._say, [where])
        self.timer.daemon = True
        self.timer.start()
        faulthandler.dump_traceback_later(self.seconds + STACKS_SECONDS, exit=True)

    def _say(self, where: str) -> None:
        rank = f"rank {dist.get_rank()} on {socket.gethostname()}"
        told = f"nothing happened for {self.seconds:g} s (comm.stuck_seconds); it shows its stacks and ends"
        print(f"error: {rank}: {where}: {told}", file=sys.stderr, flush=True)
