"""Runs a function on N processes, as torchrun would start them, and brings back what each rank returned.

torchrun's processes import for ten seconds before they do anything. Without a GPU ranks are forked from a process that
has imported everything (`preloaded.py`), with torchrun's variables and its store; CUDA does not bear that.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
SECONDS_TO_END = 30


class LaunchError(AssertionError):
    """The job failed or ran too long; the message ends with the tail of its output."""


def launch(function: str, processes: int, arguments: dict[str, Any], limit: float = 900) -> list[Any]:
    """Call ``module:function`` (a module of tests/ or tests/distributed/) with JSON `arguments` on every rank.

    Returns what the ranks returned, in their order; it must be JSON too. limit: seconds.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        (job / "job.json").write_text(json.dumps({"function": function, "arguments": arguments, "limit": limit}))
        start = _torchrun if torch.cuda.is_available() else _forked
        code = start(job, processes, limit)
        if code:
            output = (job / "output").read_text(errors="replace")
            # torchrun's own traceback comes last and says nothing.
            ranks = output.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
            raise LaunchError(f"{function} on {processes} processes: {code}\n{ranks[-6000:]}")
        return [json.loads((job / f"rank_{rank}.json").read_text()) for rank in range(processes)]


def _path() -> str:
    return os.pathsep.join([str(TESTS.parent), str(TESTS), str(HERE), os.environ.get("PYTHONPATH", "")])


def _forked(job: Path, processes: int, limit: float) -> str:
    """Why the ranks failed, "" when they did not."""
    from torch.distributed import TCPStore

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _path()  # of the process that forks, which starts with the first job
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=_rank, args=(job, variables)) for variables in _variables(store.port, processes)]
    for rank in ranks:
        rank.start()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    end, left = time.monotonic() + limit, list(ranks)
    while left and not any(rank.exitcode for rank in ranks) and time.monotonic() < end:
        connection.wait([rank.sentinel for rank in left], timeout=max(0, end - time.monotonic()))
        left = [rank for rank in left if rank.exitcode is None]
    bad = next((rank.exitcode for rank in ranks if rank.exitcode), None)
    for rank in left:
        rank.terminate()
    for rank in ranks:
        rank.join(SECONDS_TO_END)
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    if bad is not None:
        return f"exit status {bad}"
    return f"still running after {limit} s" if left else ""


def _variables(port: int, processes: int) -> list[dict[str, str]]:
    """The environment of each rank, by torchrun's names."""
    shared = {
        "PYTHONPATH": _path(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _rank(job: Path, variables: dict[str, str]) -> None:
    """What a forked process does."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(variables)
    first = [part for part in variables["PYTHONPATH"].split(os.pathsep) if part]
    sys.path[:] = first + [part for part in sys.path if part not in first]
    with (job / "output").open("ab", buffering=0) as output, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    run(job)
    atexit._run_exitfuncs()  # a forked process ends without


def _torchrun(job: Path, processes: int, limit: float) -> str:
    """Why the command failed ("" when it did not)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with (job / "output").open("w") as output:
        process = subprocess.Popen(
            [*torchrun, str(Path(__file__)), str(job)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": _path()},
        )
        try:
            code = process.wait(limit)
            return f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"still running after {limit} s"
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Workers have sessions of their own, and only torchrun ends them: it must not be killed before it has."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def run(folder: Path) -> None:
    """Inside a rank."""
    job = json.loads((folder / "job.json").read_text())
    faulthandler.dump_traceback_later(job["limit"] * 0.9)  # a job that hangs says where
    from treepo_mcore.system.environment import prepare_environment

    prepare_environment()
    module, name = job["function"].split(":")
    result = getattr(importlib.import_module(module), name)(**job["arguments"])
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
    _leave()


def _leave() -> None:
    """Under load a rank was seen to abort on its way out, with gloo's threads still there. vLLM ends its own."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    if dist.is_initialized() and not model_parallel_is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
