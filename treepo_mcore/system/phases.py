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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

import torch

from treepo_mcore.config import Holder, MemoryConfig

log = logging.getLogger(__name__)

GIB = 2**30


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


def on_device(phase: Phase, offload: set[Holder]) -> set[Holder]:
    """Parts of the actor that are on the device in a phase."""
    return NEEDED[phase] | (NEEDED[Phase.TRAIN] - offload)


class ActorMemory(Protocol):
    """What moves the actor's parts: `actor.memory.ActorMemory`."""

    bytes: dict[Holder, int]

    def keep(self, holders: set[Holder]) -> None:
        """Have exactly these on the device."""


class Sleeper(Protocol):
    """What sleeps and wakes: `engine.protocol.Engine`."""

    def sleep(self) -> None:
        """Give up weights and cache."""

    def wake_weights(self) -> None:
        """Memory for the weights, without values."""

    def wake_cache(self) -> None:
        """Ready to generate."""


class Phases:
    """Moves actor and engine in and out. Make it between building the two: the actor then makes room."""

    def __init__(self, config: MemoryConfig, actor: ActorMemory, working: Mapping[Phase, dict[str, int]]) -> None:
        """working: bytes by name that come and go on top of what actor and engine hold, for the prediction."""
        self.actor, self.working = actor, working
        self.engine: Sleeper | None = None
        self.offload = config.offloaded(torch.cuda.is_available())
        self.phase = Phase.IDLE
        self.engine_bytes = {"engine weights": 0, "engine": 0}
        self.values: dict[str, float] = {}
        self.before_training: Callable[[], None] = lambda: None  # waits for who reads what training changes
        self.seen: set[Phase] = set()
        self.actor.keep(on_device(Phase.IDLE, self.offload))

    def attach(self, engine: Sleeper, weights: int, reserved: int) -> None:
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
        self._timed("save_wait", self.before_training)
        with self._watched(Phase.TRAIN):
            yield
        self._enter(Phase.IDLE)

    def metrics(self) -> dict[str, float]:
        """Seconds of the moves and GiB on the device at the end of each phase, since the last call."""
        values, self.values = self.values, {}
        return values

    def predicted(self, phase: Phase) -> dict[str, int]:
        """Bytes by holder at the height of a phase, largest first."""
        held: dict[str, int] = {name: self.actor.bytes[name] for name in on_device(phase, self.offload)}
        held |= {name: self.engine_bytes[name] for name in ENGINE.get(phase, ())}
        held |= self.working[phase]
        return dict(sorted(held.items(), key=lambda item: -item[1]))

    def describe(self) -> str:
        """The prediction, on one line."""
        parts = []
        for phase in (Phase.PUSH, Phase.ROLLOUT, Phase.TRAIN):
            held = self.predicted(phase)
            parts.append(f"{phase} {sum(held.values()) / GIB:.2f} ({in_gib(held)})")
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
        self._timed("offload", lambda: self.actor.keep(on_device(phase, self.offload)))
        self.phase = phase

    def _awake(self) -> Sleeper:
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
        return f"out of device memory in phase {phase}: {in_gib(self.predicted(phase))} GiB{used}"


def in_gib(held: Mapping[str, int]) -> str:
    """Sizes by name, for people."""
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
