"""Runs a function on N processes under torchrun and brings back what each rank returned.

Starting costs about ten seconds, so one launch should look at many cases.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent


class LaunchError(AssertionError):
    """The job failed or ran too long; the message ends with the tail of its output."""


def launch(function: str, processes: int, arguments: dict[str, Any], limit: float = 900) -> list[Any]:
    """Call ``module:function`` (a module of tests/ or tests/distributed/) with JSON `arguments` on every rank.

    Returns what the ranks returned, in their order; it must be JSON too. limit: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        (job / "job.json").write_text(json.dumps({"function": function, "arguments": arguments, "limit": limit}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        code, output = _run([*torchrun, str(Path(__file__)), str(job)], job / "output", limit)
        if code:
            # torchrun's own traceback comes last and says nothing.
            ranks = output.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
            raise LaunchError(f"{function} on {processes} processes: {code}\n{ranks[-6000:]}")
        return [json.loads((job / f"rank_{rank}.json").read_text()) for rank in range(processes)]


def _run(command: list[str], log: Path, limit: float) -> tuple[str, str]:
    """Why the command failed ("" when it did not) and what it printed."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(HERE), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            code = process.wait(limit)
            reason = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"still running after {limit} s"
        finally:
            _end(process)
    return reason, log.read_text(errors="replace")


def _end(process: subprocess.Popen) -> None:
    """Workers have sessions of their own, and only torchrun ends them: it must not be killed before it has."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    """Inside a rank."""
    folder = Path(sys.argv[1])
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

    if dist.is_initialized() and "vllm" not in sys.modules:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
