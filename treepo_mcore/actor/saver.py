"""Writes checkpoints beside the run: a thread on every rank, and a group of these threads alone."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.memory import ActorMemory
from treepo_mcore.actor.sharded import Form, any_adam, sharded_state, shards_of
from treepo_mcore.actor.sums import settle, write_sums, written_by
from treepo_mcore.config import NEWEST_CHECKPOINT

PART = ".part"  # behind the name of a checkpoint that is not whole yet
STATE = "trainer_state.json"
SHARED = "it has to be one directory, on a file system that all nodes share"


class Keep(NamedTuple):
    """Which checkpoints stay when another one is written."""

    newest: int
    every: int = 0  # steps; 0: none for that
    best: int = 0  # of those with an accuracy in their state


class Saver:
    """One checkpoint at a time: `plan` while the actor is whole, `write` when it is not in use, later `wait`.

    Every rank makes one, and calls `plan` together with the others.
    """

    def __init__(self, directory: Path, keep: Keep, timeout_seconds: float) -> None:
        """Checkpoints lie in `directory`. Collective.

        timeout_seconds: how long the thread of a rank that is done waits for the others.
        """
        self.directory, self.keep = directory, keep
        self.timeout = timedelta(seconds=timeout_seconds)
        self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.planned: _Planned | None = None
        self.thread: threading.Thread | None = None
        self.failure: str | None = None
        self.begin = 0.0
        self.values: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Of the checkpoint that was finished since the last call: `save/seconds`, from its plan to its name."""
        values, self.values = self.values, {}
        return values

    def limit_waits(self) -> None:
        """Have the threads wait as long as they were told; to be called when all groups have got another limit."""
        self.group.set_timeout(self.timeout)

    @on_megatron_device
    def plan(self, step: int, actor: Actor, state: dict[str, Any], form: Form) -> None:
        """Divide the work between the ranks. Nothing is copied, but for what `fully_reshardable` gathers.

        Raises RuntimeError on all ranks where the disk has no room for it or takes no files; no checkpoint was removed
        then.
        state must be JSON; it comes back from `checkpoint.read_state`, with the actor's layout and optimizer settings.
        """
        self.wait()
        self.begin = time.monotonic()
        part = self.directory / f"iter_{step:07d}{PART}"
        told = [self._make(part) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(told)
        if told[0] is not None:
            raise RuntimeError(told[0])
        whole = not actor.config.optimizer.distributed
        layout = {"form": "fully_reshardable" if whole else form} | shards_of(actor.config)
        with any_adam(actor.optimizer):  # without state, if no step so far had an informative prompt
            sharded = sharded_state(actor, form, loading=False)
        state = state | {"layout": layout, "optimizer": actor.config.optimizer.model_dump(mode="json")}
        self.planned = _Planned(part, json.dumps(state, indent=1))
        # Megatron would start a server process for a queue that only this process uses.
        filesystem_async._results_queue = queue.Queue()
        # A new one each time: what it remembers of one form leaves tensors of the other out, without a word.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(self.planned, group)
        dist_checkpointing.save(sharded, str(part), strategy, async_sharded_save=True, async_strategy="mcore")
        self._check_room(self.planned)

    def _make(self, part: Path) -> str | None:
        """Rank 0's part: the directory to write into. Returns what went wrong."""
        try:
            for left in self.directory.glob(f"iter_*{PART}"):  # behind by a job that died while it wrote
                shutil.rmtree(left)
            part.mkdir(parents=True)
        except OSError as error:  # the other ranks wait for it
            return f"checkpoint {part}: rank 0 on {socket.gethostname()}: {error}"
        return None

    def _check_room(self, planned: _Planned) -> None:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (planned.bytes(), shutil.disk_usage(planned.part).free))
        needed, free = sum(size for size, _ in everyone), min(free for _, free in everyone)
        if needed > free:
            raise RuntimeError(
                f"{self.directory}: a checkpoint of {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} are free there"
            )

    def write(self, memory: ActorMemory) -> None:
        """Begin to write. What waits in host memory is written from there, and must stay there; the rest is copied."""
        assert self.planned is not None, "nothing is planned"
        self.planned.take(memory)
        self.thread = threading.Thread(target=self._write, args=(self.planned,), name="checkpoint", daemon=True)
        self.planned = None
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun has its name. Raises RuntimeError on all ranks where one of them failed."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if self.failure is not None:
            raise RuntimeError(self.failure)

    def _write(self, planned: _Planned) -> None:
        """The thread. Its failure is told to all ranks, and raised by `wait`."""
        rank = dist.get_rank()
        try:
            mine = planned.write()
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.gather_object(mine, everyone if rank == 0 else None, group=self.group)
            told = [self._publish(planned, everyone) if rank == 0 else None]
            dist.broadcast_object_list(told, group=self.group)
            self.failure = told[0] or self._unseen(planned)
            self.values["save/seconds"] = time.monotonic() - self.begin
        except Exception as error:
            self.failure = f"checkpoint {planned.part}: rank {rank} on {socket.gethostname()}: {error!r}"

    def _publish(self, planned: _Planned, everyone: list[Any]) -> str | None:
        """Rank 0's part: give a whole checkpoint its name and move the tracker. Returns what went wrong."""
        if failed := [found for found in everyone if isinstance(found, str)]:
            return failed[0]
        try:
            target = planned.publish(everyone)
            tracker = self.directory / NEWEST_CHECKPOINT
            temporary = tracker.with_suffix(".tmp")
            temporary.write_text(str(int(target.name.removeprefix("iter_"))))
            settle(temporary)
            temporary.replace(tracker)
            for old in superfluous(self.directory, target.name, self.keep):
                shutil.rmtree(old)
        except Exception as error:  # the other ranks wait for it
            return f"checkpoint {planned.part}: rank 0 on {socket.gethostname()}: {error}"
        return None

    def _unseen(self, planned: _Planned) -> str | None:
        if NEWEST_CHECKPOINT in os.listdir(self.directory):
            return None
        return f"{self.directory}: what rank 0 has saved is not here on {socket.gethostname()}; {SHARED}"


class _Planned(TorchDistSaveShardedStrategy):
    """Megatron's way to save, up to where it would write; it writes itself, and finishes without the main group."""

    def __init__(self, part: Path, state: str) -> None:
        super().__init__()
        self.part, self.state = part, state

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, strategy: str) -> Any:
        self.writer, self.metadata = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, strategy)

    def take(self, memory: ActorMemory) -> None:
        """Replace tensors that training will change by values that it will not."""
        lasting = memory.lasting()
        buckets = self.writer.write_buckets
        self.writer.write_buckets = [
            (path, name, (objects, [(item, lasting(tensor)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in buckets
        ]

    def bytes(self) -> int:
        """That this rank will write, about."""
        return sum(tensor.nbytes for _, _, (_, tensors) in self.writer.write_buckets for _, tensor in tensors)

    def write(self) -> tuple[Any, dict[str, str]] | str:
        """This rank's files: Megatron's results and the sums; or what went wrong."""
        rank, results = dist.get_rank(), []
        try:
            for number, bucket in enumerate(self.writer.write_buckets):
                transforms = [self.writer.transforms]
                _, found = self.writer.write_preloaded_data(transforms, number, bucket, None, None, use_fsync=True)
                if isinstance(found, Exception):
                    raise found
                results += found
            self.writer.write_buckets = []  # nobody needs the values any more
            return results, {file.name: settle(file) for file in written_by(self.part, rank)}
        except Exception as error:  # the other ranks wait for it
            return f"checkpoint {self.part}: rank {rank} on {socket.gethostname()}: {_first(error)}"

    def publish(self, everyone: list[Any]) -> Path:
        """Rank 0 writes what is not of tensors, and the directory gets its name, which is returned."""
        self.writer.finish(self.metadata, [results for results, _ in everyone])
        save_config(CheckpointingConfig(self.backend, self.version), str(self.part))
        (self.part / STATE).write_text(self.state)
        sums = {name: found for _, sums in everyone for name, found in sums.items()}
        sums |= {file.name: settle(file) for file in written_by(self.part, 0) if file.name not in sums}
        write_sums(self.part, sums)
        target = self.part.with_suffix("")
        shutil.rmtree(target, ignore_errors=True)  # of a run that was not continued from here
        self.part.rename(target)
        return target


def _first(error: BaseException) -> BaseException:
    """What led to it: torch's archives fail once more where they are closed, which hides that the disk is full."""
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    return error


def superfluous(directory: Path, newest: str, keep: Keep) -> list[Path]:
    """Checkpoints that need not stay, where one of this name is the newest.

    Later ones belong to a run that was not continued; they say nothing about what to keep of this one.
    """
    upto = sorted(found for found in directory.glob("iter_*") if found.name <= newest and found.suffix != PART)
    stay = set(upto[-keep.newest :])
    if keep.every:
        stay |= {found for found in upto if int(found.name.removeprefix("iter_")) % keep.every == 0}
    if keep.best:
        accuracy = {found: json.loads((found / STATE).read_text()).get("accuracy") for found in upto}
        known = [found for found in upto if accuracy[found] is not None]
        stay |= set(sorted(known, key=lambda found: accuracy[found])[-keep.best :])
    return [found for found in upto if found not in stay]


def save(directory: Path, step: int, actor: Actor, state: dict[str, Any], keep: int) -> None:
    """A checkpoint that loads in any layout, written before this returns. Collective."""
    saver = Saver(directory, Keep(keep), timeout_seconds=1800)
    saver.plan(step, actor, state, "fully_reshardable")
    saver.write(actor.memory)
    saver.wait()
