"""What runs in a reward worker: `python -m treepo_mcore.rewards.worker`, started and killed by `pool.py`.

Imports little, so that it starts fast. Over its connection the worker first says that it is ready (None) or why it
cannot be (text), then answers each batch, a list of (response, answer, prompt, row), with lists of (score, error,
seconds, numbers by name) in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import math
import mmap
import numbers
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from treepo_mcore.named import function_named
from treepo_mcore.rewards.known import REWARDS, Recipe

RewardFunction = Callable[..., Any]
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")  # parameters of a reward function of verl's
Call = tuple[str, Any, str, dict[str, Any]]  # response, answer, prompt, row
Outcome = tuple[float, str | None, float, dict[str, float]]  # score, error, seconds, what else it returned by name

# Written into memory shared with the pool, which must know whose fault it was when a worker dies: the position in the
# batch of the call that runs, and when it started (`time.monotonic`); 0.0 while none runs.
PROGRESS = struct.Struct("=qd")

_REPORT_SECONDS = 0.02  # results are sent together, but not held back longer than this behind a slow call
_ERROR_CHARACTERS = 200
_BLOCKED_SECONDS = 0.5  # that calls which run together may be late


def arguments_of(function: RewardFunction, call: Call) -> dict[str, Any]:
    """The call, by the names that the function has: ours, or those of verl's `compute_score`."""
    response, answer, prompt, row = call
    if VERL[0] in inspect.signature(function).parameters:
        columns = (row.get("data_source"), response, answer, row.get("extra_info"))
        return dict(zip(VERL, columns, strict=True))
    return {"response": response, "answer": answer, "prompt": prompt, "row": row}


class Scorer:
    """What a recipe names, ready to be called."""

    def __init__(self, recipe: Recipe, limit: float, together: int) -> None:
        """limit: seconds of a call. together: calls at once, where a function is a coroutine.

        Raises ValueError for what cannot be imported.
        """
        self.limit, self.names = limit, list(recipe.components)
        named = [recipe.score, *recipe.components.values()]
        self.functions = [(function_named(one.place), one.options) for one in named]
        coroutines = any(inspect.iscoroutinefunction(function) for function, _ in self.functions)
        self.together = together if coroutines else 1
        self.loop = asyncio.new_event_loop()

    def run(self, calls: list[Call]) -> list[Outcome]:
        """Of calls that run at the same time; this process ends where they do not come to an end."""
        # Nobody handles this signal, so it ends the process even inside C code and even when the pool is busy or gone.
        signal.setitimer(signal.ITIMER_REAL, self.limit + (_BLOCKED_SECONDS if self.together > 1 else 0))
        try:
            if self.together == 1:
                return [self._alone(call) for call in calls]
            return self.loop.run_until_complete(self._together(calls))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _alone(self, call: Call) -> Outcome:
        """Outside any event loop: a function may start one of its own."""
        start = time.monotonic()
        try:
            results = [_called(function, options, call) for function, options in self.functions]
            waited = [self.loop.run_until_complete(one) if inspect.iscoroutine(one) else one for one in results]
            return self._outcome(waited, start)
        except (Exception, SystemExit) as error:  # whatever a function raises belongs to its call, not to the worker
            return _failure(f"{type(error).__name__}: {error}", start)

    async def _together(self, calls: list[Call]) -> list[Outcome]:
        return await asyncio.gather(*[self._one(call) for call in calls])

    async def _one(self, call: Call) -> Outcome:
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.limit):
                results = [_called(function, options, call) for function, options in self.functions]
                return self._outcome([await one if inspect.iscoroutine(one) else one for one in results], start)
        except TimeoutError as error:
            return _failure(str(error) or f"took longer than {self.limit:g} s", start)
        except (Exception, SystemExit) as error:
            return _failure(f"{type(error).__name__}: {error}", start)

    def _outcome(self, results: list[Any], start: float) -> Outcome:
        """Of what the functions returned: a number each, or a mapping with a `score`."""
        parts, *others = [dict(result) if isinstance(result, dict) else {"score": result} for result in results]
        score = float(parts.pop("score"))
        told = {str(name): float(value) for name, value in parts.items() if _is_number(value)}
        told |= {name: float(other["score"]) for name, other in zip(self.names, others, strict=True)}
        for name, value in [("", score), *told.items()]:
            if not math.isfinite(value):
                return _failure(f"{name} returned {value}".strip(), start)
        return score, None, time.monotonic() - start, told


def _called(function: RewardFunction, options: dict[str, Any], call: Call) -> Any:
    # Calls of one batch share the rows of their prompts; what a function does to its own must not reach the next.
    return function(**arguments_of(function, copy.deepcopy(call)), **copy.deepcopy(options))


def _failure(error: str, start: float) -> Outcome:
    return 0.0, error[:_ERROR_CHARACTERS], time.monotonic() - start, {}


def serve(connection: Connection, progress: mmap.mmap, scorer: Scorer) -> None:
    """Answer batches until the pool hangs up."""
    while True:
        batch: list[Call] = connection.recv()
        outcomes: list[Outcome] = []
        reported = time.monotonic()
        for first in range(0, len(batch), scorer.together):
            PROGRESS.pack_into(progress, 0, first, time.monotonic())
            outcomes += scorer.run(batch[first : first + scorer.together])
            PROGRESS.pack_into(progress, 0, first, 0.0)
            if time.monotonic() - reported > _REPORT_SECONDS:
                _send(connection, outcomes)
                outcomes, reported = [], time.monotonic()
        if outcomes:
            _send(connection, outcomes)


def _is_number(value: Any) -> bool:
    """Also of numpy; texts and lists are no components."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _send(connection: Connection, message: Any) -> None:
    """As data: a process that runs code of others must not have the trainer unpickle what it sends."""
    connection.send_bytes(json.dumps(message).encode())


def main() -> None:
    """What the pool starts: file descriptors, function and time limit are in the arguments."""
    connection_fd, progress_fd, recipe, limit, together, memory = sys.argv[1:]
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(int(connection_fd))
    progress = mmap.mmap(int(progress_fd), PROGRESS.size)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the pool hung up, or is gone
        try:
            scorer = Scorer(Recipe.from_json(json.loads(recipe)), float(limit), int(together))
            function, _ = scorer.functions[0]
            if function is function_named(REWARDS["math"]):
                # Loads the parser now, not in somebody's time limit.
                function(response=r"\boxed{\frac{1}{2}}", answer="0.5", prompt="", row={})
        except Exception as error:  # told to the pool, which raises it
            _send(connection, f"{type(error).__name__}: {error}")
            return
        _send(connection, None)
        serve(connection, progress, scorer)


if __name__ == "__main__":
    main()
