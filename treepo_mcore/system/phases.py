"""Whose turn it is on the device: one state machine for actor and engine, which share its memory.

    idle -> push -> rollout -> idle -> train -> idle -> ...

|                    | idle, rollout | push | train |
|--------------------|---------------|------|-------|
| actor: parameters  | unless `memory.offload` names them | yes | yes |
| actor: gradients   | unless named  | unless named | yes |
| actor: optimizer   | unless named  | unless named | yes |
| engine: weights    | in rollout    | yes  | no    |
| engine: KV cache   | in rollout    | no   | no    |

The engine sleeps at level 2: its weights are given up, because the next push brings new ones. The reference policy
waits in host memory and changes places with the parameters for its pass. A call out of order is an error.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import torch

from treepo_mcore.actor.actor import Actor
from treepo_mcore.config import Config, ConfigError, Holder, MemoryConfig, RolloutConfig
from treepo_mcore.engine.protocol import Engine
from treepo_mcore.model.architecture import Architecture
from treepo_mcore.model.shards import Stage
from treepo_mcore.plan.constants import CONTEXT_BYTES, GRAPH_BYTES
from treepo_mcore.plan.memory import host_memory, plain_copies, update_working

log = logging.getLogger(__name__)

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
HOST_SHARE = 0.9  # of the node's free memory, when no limit is configured


class Phase(StrEnum):
    """What the device is used for."""

    IDLE = "idle"
    PUSH = "push"
    ROLLOUT = "rollout"
    TRAIN = "train"


NEXT = {
    Phase.IDLE: (Phase.PUSH, Phase.TRAIN),
    Phase.PUSH: (Phase.ROLLOUT,),
    Phase.ROLLOUT: (Phase.IDLE,),
    Phase.TRAIN: (Phase.IDLE,),
}
NEEDED: dict[Phase, set[Holder]] = {
    Phase.IDLE: set(),
    Phase.PUSH: {"parameters"},
    Phase.ROLLOUT: set(),
    Phase.TRAIN: {"parameters", "gradients", "optimizer"},
}
ENGINE = {Phase.PUSH: ("engine weights",), Phase.ROLLOUT: ("engine",)}  # weights, KV cache and graphs together


class DeviceMemoryError(RuntimeError):
    """Out of device memory; the message names the phase and what holds most."""


def kept(phase: Phase, offload: set[Holder]) -> set[Holder]:
    """Parts of the actor that are on the device in a phase."""
    return NEEDED[phase] | (NEEDED[Phase.TRAIN] - offload)


class Phases:
    """Moves actor and engine in and out. Make it between building the two: the actor then makes room."""

    def __init__(self, config: MemoryConfig, actor: Actor, working: Mapping[Phase, dict[str, int]]) -> None:
        """working: bytes by name that come and go on top of what actor and engine hold, for the prediction."""
        self.actor, self.working = actor, working
        self.engine: Engine | None = None
        self.offload = config.offloaded(torch.cuda.is_available())
        self.phase = Phase.IDLE
        self.engine_bytes = {"engine weights": 0, "engine": 0}
        self.values: dict[str, float] = {}
        self.seen: set[Phase] = set()
        self.actor.memory.keep(kept(Phase.IDLE, self.offload))

    def attach(self, engine: Engine, weights: int, reserved: int) -> None:
        """The engine goes to sleep. weights, reserved: bytes of its parameters and of all it may take."""
        self.engine = engine
        self.engine_bytes = {"engine weights": weights, "engine": reserved}
        self._timed("sleep", engine.sleep)

    @contextmanager
    def push(self) -> Iterator[None]:
        """The engine has memory for its weights, still without values; write all of them inside."""
        with self._watched(Phase.PUSH):
            self._timed("wake", self._awake().wake_weights)
            yield

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """The engine can generate; afterwards it sleeps."""
        engine = self._awake()
        with self._watched(Phase.ROLLOUT):
            self._timed("wake", engine.wake_cache)
            yield
        self._timed("sleep", engine.sleep)
        self._enter(Phase.IDLE)

    @contextmanager
    def train(self) -> Iterator[None]:
        """The actor is whole: for updates, and for saving and loading."""
        with self._watched(Phase.TRAIN):
            yield
        self._enter(Phase.IDLE)

    def metrics(self) -> dict[str, float]:
        """Seconds of the moves and GiB on the device at the end of each phase, since the last call."""
        values, self.values = self.values, {}
        return values

    def predicted(self, phase: Phase) -> dict[str, int]:
        """Bytes by holder at the height of a phase, largest first."""
        held: dict[str, int] = {name: self.actor.memory.bytes[name] for name in kept(phase, self.offload)}
        held |= {name: self.engine_bytes[name] for name in ENGINE.get(phase, ())}
        held |= self.working[phase]
        return dict(sorted(held.items(), key=lambda item: -item[1]))

    def describe(self) -> str:
        """The prediction, on one line."""
        parts = []
        for phase in (Phase.PUSH, Phase.ROLLOUT, Phase.TRAIN):
            held = self.predicted(phase)
            parts.append(f"{phase} {sum(held.values()) / GIB:.2f} ({_list(held)})")
        return f"predicted on the device, GiB a rank: {'; '.join(parts)}{self._too_much()}"

    def _too_much(self) -> str:
        """The phases that the prediction has no room for, if there are any; they may fit all the same."""
        if not torch.cuda.is_available():
            return ""
        total = torch.cuda.mem_get_info()[1]
        phases = [phase for phase in self.working if sum(self.predicted(phase).values()) > total]
        return f"; more than the {total / GIB:.2f} of this GPU: {', '.join(phases)}" if phases else ""

    def _enter(self, phase: Phase) -> None:
        if phase not in NEXT[self.phase]:
            raise RuntimeError(f"phase {phase} after {self.phase}: expected {' or '.join(NEXT[self.phase])}")
        # The engine is asleep here, or about to be woken: the actor's moves never meet it awake.
        self._timed("offload", lambda: self.actor.memory.keep(kept(phase, self.offload)))
        self.phase = phase

    def _awake(self) -> Engine:
        assert self.engine is not None, "no engine is attached"
        return self.engine

    def _timed(self, name: str, call: Callable[[], None]) -> None:
        begin = time.perf_counter()
        call()
        key = f"time/{name}"
        self.values[key] = self.values.get(key, 0.0) + time.perf_counter() - begin

    @contextmanager
    def _watched(self, phase: Phase) -> Iterator[None]:
        """Enter the phase; what runs out of memory there, or on the way in, says so with the phase and its holders."""
        try:
            self._enter(phase)
            yield
        except RuntimeError as error:
            # The allocator of vLLM's sleep mode has no exception of its own.
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                raise DeviceMemoryError(self._out_of_memory(phase)) from error
            raise
        if torch.cuda.is_available():
            self._look()

    def _look(self) -> None:
        """Caches are emptied between phases, so what is taken at the end of one is about its peak."""
        free, total = torch.cuda.mem_get_info()
        used = (total - free) / GIB
        self.values[f"memory/{self.phase}_gib"] = used
        if self.phase not in self.seen and torch.distributed.get_rank() == 0:
            expected = sum(self.predicted(self.phase).values()) / GIB
            log.info("%s: %.2f GiB on the device, %.2f predicted", self.phase, used, expected)
        self.seen.add(self.phase)

    def _out_of_memory(self, phase: Phase) -> str:
        used = ""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            used = f"; {(total - free) / GIB:.2f} of {total / GIB:.2f} GiB are taken"
        return f"out of device memory in phase {phase}: {_list(self.predicted(phase))} GiB{used}"


def check_allocator(environment: Mapping[str, str], rollout: RolloutConfig) -> None:
    """Raise `ConfigError` for allocator settings that Megatron and vLLM do not both take.

    vLLM turns `expandable_segments` off inside its sleeping pool, but only when PYTORCH_CUDA_ALLOC_CONF has them. The
    buffers of its CUDA graphs lie outside of that pool, and its all-reduce shares them in a way that only ordinary
    memory can be shared (cudaIpcGetMemHandle; vLLM issue 42609): the process would exit without a traceback.
    """
    new, old = environment.get("PYTORCH_ALLOC_CONF", ""), environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" in new:
        raise ConfigError(
            "PYTORCH_ALLOC_CONF: expandable_segments:True is not seen by vLLM's sleep mode, which must turn it off in "
            "its pool; set it in PYTORCH_CUDA_ALLOC_CONF"
        )
    own_all_reduce = rollout.tp > 1 and not rollout.engine.get("disable_custom_all_reduce")
    if "expandable_segments:True" in old and own_all_reduce:
        raise ConfigError(
            f"PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True with rollout.tp: {rollout.tp}, whose all-reduce cannot "
            "share such memory; leave it out, or set rollout.engine.disable_custom_all_reduce: true (NCCL takes over)"
        )
    if "backend:cudaMallocAsync" in new + old:
        raise ConfigError(
            "PYTORCH_CUDA_ALLOC_CONF: backend:cudaMallocAsync has no memory pools; vLLM's sleep mode needs them"
        )


def check_host_memory(config: Config, arch: Architecture, world: int, ranks: int, gpu: bool) -> None:
    """Raise `ConfigError` when the ranks of this node would keep more in host memory than there is.

    ranks: on this node.
    """
    needs = host_memory(config, arch, world, ranks, gpu=gpu)
    needed = sum(needs.values())
    limit = config.memory.host_gib
    allowed = limit * GIB if limit else HOST_SHARE * _available_host_bytes()
    if needed > allowed:
        where = "memory.host_gib" if limit else "memory.offload"
        raise ConfigError(
            f"{where}: {ranks} ranks of this node would need {needed / GIB:.1f} GiB of host memory "
            f"({_list(needs)}), allowed are {allowed / GIB:.1f}"
        )


def working_bytes(config: Config, actor: Actor, capability: tuple[int, int] | None) -> dict[Phase, dict[str, int]]:
    """What comes and goes on this rank's GPU in each phase, by the planner's formulas (plan/memory.py).

    capability: the GPU's; None on a CPU, where no weight is quantised. Micro-batches are taken to be full. "context" is
    assumed: CUDA, NCCL and what is left of a sleeping engine. FP8 weights are given up with the gradients, or stay.
    """
    grid = actor.grid
    always = {"context": CONTEXT_BYTES, "staging": config.rollout.push_staging_mb << 20}
    stage = Stage(actor.layers, grid.pp_rank == 0, grid.pp_rank == grid.pp - 1)
    tokens = config.actor.micro_batch_tokens
    update = update_working(config.actor, actor.arch, stage, grid.pp_rank, tokens, capability or (0, 0))
    if update["FP8 weights"] and "gradients" not in config.memory.offloaded(capability is not None):
        always["FP8 weights"] = update["FP8 weights"]
    plain = plain_copies(config.actor, actor.arch, stage)
    return {
        Phase.PUSH: always | ({"plain copies": plain} if plain else {}),
        Phase.ROLLOUT: always | {"CUDA graphs": GRAPH_BYTES},
        Phase.TRAIN: always | {name: size for name, size in update.items() if size},
    }


def local_ranks() -> int:
    """Processes of this job on this node, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available_host_bytes() -> int:
    """Of the node, or of this container or Slurm job where it is allowed less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    own = next((line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")), "")
    return min([free, *cgroup_free_bytes(CGROUP, own)])


def cgroup_free_bytes(root: Path, own: str) -> Iterator[int]:
    """What each limit on a process of the control group `own` (version 2) leaves, its own first, then those above."""
    for folder in (root / own, *(root / own).parents):
        limit = folder / "memory.max"
        if folder.is_relative_to(root) and limit.is_file() and limit.read_text().strip() != "max":
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that are cached count as used, although they give way.
            used = int((folder / "memory.current").read_text()) - int(counts["inactive_file"])
            yield int(limit.read_text()) - used


def _list(held: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
