"""Rewards in worker processes, with a time limit per call; a call that hangs or crashes costs only itself.

Workers are fresh interpreters (`worker.py`), not `multiprocessing` children: the trainer holds CUDA, gloo and vLLM
threads, so it must not fork, and `spawn` would import the trainer's main module, and torch with it, into every worker.
So entry scripts need no `if __name__ == "__main__"` for the pool's sake, and a worker starts in about half a second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from multiprocessing import connection
from types import TracebackType
from typing import Any, NamedTuple

from treepo_mcore.config import RewardConfig
from treepo_mcore.rewards.check import check_function, recipe_of, secrets_of
from treepo_mcore.rewards.known import Recipe
from treepo_mcore.rewards.math import quick_verdict
from treepo_mcore.rewards.worker import PROGRESS, Outcome
from treepo_mcore.system.environment import deaf_children

log = logging.getLogger(__name__)

_BATCH_CALLS = 256  # at most, in one message to a worker
_BATCH_SECONDS = 0.1  # and about this much work, so that workers end together
_GRACE_SECONDS = 1.0  # a worker ends itself at the time limit; the pool kills one that has not by then
_WAIT_SECONDS = 0.05


@dataclass(frozen=True)
class Result:
    """What one call gave. A call that failed has an `error`, is not correct, and its score of 0.0 means nothing."""

    key: Hashable
    correct: bool  # score > 0
    score: float  # what `reward.function` returned; 1.0 or 0.0 for "math"
    error: str | None
    seconds: float  # inside the function; of a worker that died, until that was noticed
    components: dict[str, float] = field(default_factory=dict)  # what else was returned, by name
    added: float = 0.0  # of `reward.components`, with their weights


class _Item(NamedTuple):
    key: Hashable
    response: str
    answer: Any
    prompt: str
    row: dict[str, Any]


class _Death(NamedTuple):
    """A worker ended: the call to blame, if one ran, and the calls to run again."""

    item: _Item | None
    seconds: float
    again: list[_Item]


class _Worker:
    """One process and what it was given."""

    def __init__(self, recipe: Recipe, config: RewardConfig) -> None:
        self.limit = config.timeout
        self.ready = False
        self.batch: deque[_Item] = deque()  # given and not answered
        self.answered = 0  # of the batch
        self.connection, theirs = multiprocessing.Pipe()
        with tempfile.TemporaryFile() as file:
            file.truncate(PROGRESS.size)
            self.progress = mmap.mmap(file.fileno(), PROGRESS.size)
            memory = "" if config.memory_gib is None else str(int(config.memory_gib * 2**30))
            command = [sys.executable, "-P", "-m", "treepo_mcore.rewards.worker"]
            settings = [json.dumps(recipe.to_json()), str(config.timeout), str(config.concurrency), memory]
            with deaf_children():
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(file.fileno()), *settings],
                    pass_fds=[theirs.fileno(), file.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(secrets_of(config)),
                    start_new_session=True,  # so that what a function starts can be ended with it
                )
        theirs.close()

    def give(self, items: list[_Item]) -> None:
        self.batch, self.answered = deque(items), 0
        # A worker that has just died is found by the next `receive`, with this batch still to answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send([(item.response, item.answer, item.prompt, item.row) for item in items])

    def receive(self) -> tuple[list[tuple[_Item, Outcome]], bool]:
        """Answers that have arrived, and whether the worker has ended. Raises `RuntimeError` if it never got ready."""
        answers: list[tuple[_Item, Outcome]] = []
        try:
            while self.connection.poll():
                message = json.loads(self.connection.recv_bytes())
                if not self.ready:
                    self._started(message)
                    continue
                answers += [(self.batch.popleft(), outcome) for outcome in message]
                self.answered += len(message)
        except (EOFError, OSError):  # OSError: it died while it was sending
            if not self.ready:
                self._started(f"exit code {self.process.wait()}")
            return answers, True
        return answers, False

    def overdue(self) -> bool:
        _, started = PROGRESS.unpack_from(self.progress)
        return bool(started > 0 and time.monotonic() - started > self.limit + _GRACE_SECONDS)

    def death(self) -> _Death:
        """Who is to blame; results that the worker had not sent yet are computed again."""
        position, started = PROGRESS.unpack_from(self.progress)
        again = list(self.batch)
        if started == 0:
            return _Death(None, 0.0, again)
        item = again.pop(position - self.answered)
        return _Death(item, time.monotonic() - started, again)

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):  # the worker may have ended, what it started may run on
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.connection.close()
        return code

    def _started(self, failure: str | None) -> None:
        if failure is not None:
            raise RuntimeError(f"reward worker could not start: {failure}")
        self.ready = True


SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS)(_|$)")


def _environment(secrets: set[str]) -> dict[str, str]:
    """Of a worker: the trainer's, without what opens other people's services, but for the `secrets` that it needs."""
    shared = {name: value for name, value in os.environ.items() if name in secrets or not SECRET.search(name.upper())}
    return shared | {"PYTHONPATH": os.pathsep.join(sys.path)}


class RewardPool:
    """Scores responses in `config.workers` processes. Not thread-safe: one thread submits and polls.

    For the function "math" alone, what comparing strings can decide (`rewards.math.quick_verdict`) is decided on
    `submit`, without a worker. A custom function is called as f(response=, answer=, prompt=, row=) or as verl's
    compute_score; a coroutine is awaited. It returns a finite number, or a mapping with one as its `score`; a response
    is correct when that is more than 0. Results come in any order. Raises `ConfigError` for a function that cannot be
    found or called; `poll` and `drain` raise `RuntimeError` when a worker cannot start.
    """

    def __init__(self, config: RewardConfig) -> None:
        check_function(config)
        self._config, self._recipe = config, recipe_of(config)
        self._quick = config.function == "math" and not config.components
        self._weights = {name: component.weight for name, component in config.components.items()}
        self._workers = [self._start() for _ in range(config.workers)]
        self._pending: deque[_Item] = deque()
        self._decided: list[Result] = []
        self._outstanding = 0
        self._counts = {"calls": 0, "quick": 0, "raised": 0, "timed_out": 0, "died": 0}
        self._worked, self._work_seconds = 1, 0.01  # calls answered and their time, from a first guess of 10 ms

    def submit(self, key: Hashable, response_text: str, answer: Any, prompt_text: str, row: dict[str, Any]) -> None:
        """Ask for one reward; `key` comes back in its `Result`. row: the prompt's, for a custom function."""
        self._outstanding += 1
        self._counts["calls"] += 1
        verdict = quick_verdict(response_text, answer) if self._quick else None
        if verdict is None:
            self._pending.append(_Item(key, response_text, answer, prompt_text, {} if self._quick else row))
        else:
            self._counts["quick"] += 1
            self._decided.append(Result(key, verdict, float(verdict), None, 0.0))

    def poll(self) -> list[Result]:
        """Results that are there; never waits. Also hands out work, so call it often."""
        results, self._decided = self._decided, []
        for index, worker in enumerate(self._workers):
            answers, ended = worker.receive()
            results += [self._result(item, outcome) for item, outcome in answers]
            if ended or worker.overdue():
                results += self._bury(worker, late=not ended)
                self._workers[index] = self._start()
        self._hand_out()
        self._outstanding -= len(results)
        return results

    def drain(self) -> list[Result]:
        """Wait for everything submitted so far and return what has not been returned yet."""
        results = self.poll()
        while self._outstanding:
            connection.wait([worker.connection for worker in self._workers], timeout=_WAIT_SECONDS)
            results += self.poll()
        return results

    def metrics(self) -> dict[str, int]:
        """Counts since the start: calls, of them decided quickly, and failed: raised, timed_out, died."""
        return dict(self._counts)

    def close(self) -> None:
        """End the workers; what they have not answered is lost."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> _Worker:
        return _Worker(self._recipe, self._config)

    def _result(self, item: _Item, outcome: Outcome) -> Result:
        score, error, seconds, components = outcome
        self._worked += 1
        self._work_seconds += seconds
        if error is not None:
            self._failed("raised", error)
        added = 0.0 if error else sum(weight * components[name] for name, weight in self._weights.items())
        return Result(item.key, score > 0, score, error, seconds, components, added)

    def _bury(self, worker: _Worker, late: bool) -> list[Result]:
        code = worker.kill()
        late = late or code == -signal.SIGALRM
        item, seconds, again = worker.death()
        self._pending.extendleft(reversed(again))
        if item is None:
            return []
        error = f"timed out after {self._config.timeout:g} s" if late else f"worker died with exit code {code}"
        self._failed("timed_out" if late else "died", error)
        return [Result(item.key, False, 0.0, error, seconds)]

    def _failed(self, how: str, error: str) -> None:
        if self._counts[how] == 0:  # of many that fail alike one is told; reward/failed has the number
            log.warning("reward.function %s: a call %s, see reward.failed: %s", self._config.function, how, error)
        self._counts[how] += 1

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if worker.ready and not worker.batch]
        affordable = max(self._config.concurrency, int(_BATCH_SECONDS * self._worked / self._work_seconds))
        for left, worker in zip(range(len(idle), 0, -1), idle, strict=True):
            size = min(math.ceil(len(self._pending) / left), affordable, _BATCH_CALLS)
            if size:
                worker.give([self._pending.popleft() for _ in range(size)])
