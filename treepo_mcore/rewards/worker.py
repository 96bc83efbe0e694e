"""What runs in a reward worker: `python -m treepo_mcore.rewards.worker`, started and killed by `pool.py`.

Imports little, so that it starts fast. Over its connection the worker first says that it is ready (None) or why it
cannot be (text), then answers each batch, a list of (response, answer, prompt, row), with lists of (score, error,
seconds) in the same order.
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

RewardFunction = Callable[..., Any]
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")  # parameters of a reward function of verl's
Call = tuple[str, Any, str, dict[str, Any]]  # response, answer, prompt, row
Outcome = tuple[float, str | None, float, dict[str, float]]  # score, error, seconds, what else it returned by name

# Written into memory shared with the pool, which must know whose fault it was when a worker dies: the position in the
# batch of the call that runs, and when it started (`time.monotonic`); 0.0 while none runs.
PROGRESS = struct.Struct("=qd")

MATH = "treepo_mcore.rewards.math:math_reward"
_REPORT_SECONDS = 0.02  # results are sent together, but not held back longer than this behind a slow call
_ERROR_CHARACTERS = 200


def arguments_of(function: RewardFunction, call: Call) -> dict[str, Any]:
    """The call, by the names that the function has: ours, or those of verl's `compute_score`."""
    response, answer, prompt, row = call
    if VERL[0] in inspect.signature(function).parameters:
        columns = (row.get("data_source"), response, answer, row.get("extra_info"))
        return dict(zip(VERL, columns, strict=True))
    return {"response": response, "answer": answer, "prompt": prompt, "row": row}


def serve(connection: Connection, progress: mmap.mmap, function: RewardFunction, limit: float) -> None:
    """Answer batches until the pool hangs up."""
    while True:
        batch: list[Call] = connection.recv()
        outcomes: list[Outcome] = []
        reported = time.monotonic()
        for position, call in enumerate(batch):
            PROGRESS.pack_into(progress, 0, position, time.monotonic())
            outcomes.append(_run(function, call, limit))
            PROGRESS.pack_into(progress, 0, position, 0.0)
            if time.monotonic() - reported > _REPORT_SECONDS:
                _send(connection, outcomes)
                outcomes, reported = [], time.monotonic()
        if outcomes:
            _send(connection, outcomes)


def _run(function: RewardFunction, call: Call, limit: float) -> Outcome:
    start = time.monotonic()
    components: dict[str, float] = {}
    # Nobody handles this signal, so it ends the process even inside C code and even when the pool is busy or gone.
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        # Calls of one batch share the rows of their prompts; what a function does to its own must not reach the next.
        result = function(**arguments_of(function, copy.deepcopy(call)))
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        parts = result if isinstance(result, dict) else {"score": result}
        score = float(parts["score"])
        components = {str(name): float(value) for name, value in parts.items() if name != "score" and _is_number(value)}
        error = None if math.isfinite(score) else f"returned {score}"
    except (Exception, SystemExit) as raised:  # whatever a function raises belongs to its call, not to the worker
        score, error = 0.0, f"{type(raised).__name__}: {raised}"[:_ERROR_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return (0.0 if error else score), error, time.monotonic() - start, {} if error else components


def _is_number(value: Any) -> bool:
    """Also of numpy; texts and lists are no components."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _send(connection: Connection, message: Any) -> None:
    """As data: a process that runs code of others must not have the trainer unpickle what it sends."""
    connection.send_bytes(json.dumps(message).encode())


def main() -> None:
    """What the pool starts: file descriptors, function and time limit are in the arguments."""
    connection_fd, progress_fd, name, limit, memory = sys.argv[1:]
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(int(connection_fd))
    progress = mmap.mmap(int(progress_fd), PROGRESS.size)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the pool hung up, or is gone
        try:
            function = function_named(MATH if name == "math" else name)
            if name == "math":
                function(
                    response=r"\boxed{\frac{1}{2}}", answer="0.5", prompt="", row={}
                )  # loads the parser now, not in somebody's time limit
        except Exception as error:  # told to the pool, which raises it
            _send(connection, f"{type(error).__name__}: {error}")
            return
        _send(connection, None)
        serve(connection, progress, function, float(limit))


if __name__ == "__main__":
    main()
