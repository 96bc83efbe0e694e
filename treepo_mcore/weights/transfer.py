"""Runs a plan: local copies straight into the engine's parameters, the rest point to point through a fixed buffer.

Every round packs what a rank sends into one message per receiver, in the engine's dtype or as FP8 blocks and their
scales; while a round is on the wire, the one before it is unpacked. No tensor is ever put together anywhere but in its
parameter, and parameters keep their addresses. The staging buffer is allocated once. Beside it a push needs, in FP8,
what quantising takes for `fp8.CHUNK` elements (or a row of blocks) and the blocks of one parameter that several ranks
have parts of, until the last part is there (`PushReport.waiting_bytes`); and checksums, eight bytes a box.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mcore.model.facts import FP8_BLOCK as BLOCK
from treepo_mcore.weights.fp8 import (
    FP8,
    SCALE,
    CutBlocks,
    block_plan,
    check_whole_columns,
    fp8_parameters,
    quantise_into,
    quantisers,
    scale_shape,
)
from treepo_mcore.weights.layout import Piece, box
from treepo_mcore.weights.plan import Transfer, make_plan, make_rounds

STAGING_BYTES = 256 << 20
HALVES = 2  # double buffering
ALIGNMENT = 8  # bytes, of a message in the staging buffer
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> integers of that size


class TransferError(RuntimeError):
    """What arrived is not what was sent; the message names the tensor and both ranks."""


@dataclass(frozen=True)
class PushReport:
    """One push, this rank's share."""

    sent_bytes: int
    received_bytes: int
    local_bytes: int
    staging_bytes: int
    waiting_bytes: int  # most that incomplete FP8 blocks took at a time, beside the staging buffer
    seconds: float
    # Of `seconds`, spent on checksums. On a GPU kernels are only queued here; compare pushes with and without.
    checksum_seconds: float


@dataclass
class _Part:
    """One transfer of a message: this rank's view of the box and the slot of it in the staging buffer."""

    transfer: Transfer
    view: Tensor
    scale: Tensor | None = None  # of FP8 blocks: the view in the receiver's scales
    slot: Tensor = field(init=False)
    scale_slot: Tensor | None = None


@dataclass
class _Message:
    """What goes between this rank and one other in one round: bytes [first, first + size) of a staging half.

    Scales come first, then what is in the rollout's dtype, then FP8 values: each begins at a multiple of its size.
    """

    peer: int
    first: int = 0
    size: int = 0
    parts: list[_Part] = field(default_factory=list)


@dataclass(frozen=True)
class _Round:
    sends: list[_Message]
    receives: list[_Message]
    cuts: list[_Part]  # for cut FP8 blocks, parameter by parameter: what arrives, and before it this rank's own parts


def gather_layouts(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces of every rank. Collective; metadata only."""
    everyone: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, pieces)
    return everyone


def plan_push(sources: list[Piece], targets: list[Piece]) -> list[Transfer]:
    """The plan of all ranks, the same on every one of them. Collective."""
    world = dist.get_world_size()
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # of torchrun, and of our Slurm script
    nodes = [rank // on_node for rank in range(world)]
    return make_plan(gather_layouts(sources), gather_layouts(targets), nodes)


def round_limit(staging_bytes: int, world: int) -> int:
    """Bytes that a rank may send or receive in one round, so that all halves with their alignment fit the buffer."""
    return staging_bytes // (2 * HALVES) - ALIGNMENT * world


class Push:
    """A plan bound to the tensors of this rank. Make it once, call `run` whenever the weights have changed."""

    def __init__(
        self,
        plan: list[Transfer],
        sources: dict[str, Tensor],
        targets: dict[str, Tensor],
        *,
        padding: Iterable[Tensor] = (),
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        """Look up every view and allocate the staging buffer.

        plan: of all ranks. sources, targets: local tensors by name; their storage must stay where it is. Targets share
        one dtype, in which weights travel, but for E4M3 ones with their scales, which get 128 x 128 blocks. padding:
        views of the targets that the plan leaves out; every push writes zeros there. staging_bytes: the most that a
        rank's buffer may take, both directions and both halves together; raises `PlanError` when a single row of a
        tensor does not fit, `ConfigError` when vLLM could not run an FP8 parameter of this shape.
        """
        self.rank = dist.get_rank()
        quantised = fp8_parameters(targets)
        check_whole_columns(quantised)
        plan = block_plan(plan, quantised)
        self.quantisers = quantisers(plan)
        self.dtype = _common_dtype(targets, quantised)
        self.device = next(iter(targets.values())).device
        self.padding = list(padding)
        size = self.dtype.itemsize
        limit = round_limit(staging_bytes, dist.get_world_size())
        bind = _Binder(self.rank, sources, targets, self.dtype)
        self.plan = [t for t in plan if self.rank in (t.source, t.target)]  # the others' is not kept
        mine = [t for t in self.plan if t.local]
        self.local = [(bind.source(t), bind.target(t)) for t in mine if t.form != "cut"]
        for transfer in mine:
            if transfer.form == "cut":
                bind.own_cuts[transfer.target_local].append(bind.own_cut(transfer))
        self.rounds = [bind.round(part) for part in make_rounds(plan, limit, size)]
        self.local_cuts = [part for parts in bind.own_cuts.values() for part in parts]  # of parameters all its own
        # NCCL connects all ranks at their first collective; the rounds may involve only some of them.
        dist.all_reduce(torch.zeros(1, device=self.device))
        self.out = self._staging([r.sends for r in self.rounds])
        self.inbox = self._staging([r.receives for r in self.rounds])
        self.cuts = CutBlocks({name: (targets[name], targets[name + SCALE]) for name in quantised}, self.dtype)
        self.sent_bytes = sum(m.size for r in self.rounds for m in r.sends)
        self.received_bytes = sum(m.size for r in self.rounds for m in r.receives)
        self.local_bytes = sum(t.bytes(size) for t in mine)
        self.staging_bytes = sum(half.nbytes for half in (*self.out, *self.inbox))
        assert self.staging_bytes <= staging_bytes

    @torch.no_grad()
    def run(self, verify: bool = True) -> PushReport:
        """Bring the targets up to date. Collective.

        verify: compare checksums of what was sent with what now stands in the targets; raises `TransferError`.
        """
        begin = time.perf_counter()
        sums = _Checksums(self.device) if verify else None
        self.cuts.peak = 0
        for view in self.padding:
            view.zero_()
        works: list[list[dist.Work]] = []
        for number, current in enumerate(self.rounds):
            works.append(self._start(number, current, sums))
            if number:
                self._finish(number - 1, works[number - 1], sums)
            else:
                self._copy_local()  # while the first round is on the wire
        if self.rounds:
            self._finish(len(self.rounds) - 1, works[-1], sums)
        else:
            self._copy_local()
        assert not self.cuts.waiting, "an FP8 block is incomplete"
        if sums is not None:
            sums.compare(self.rank)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return PushReport(
            self.sent_bytes,
            self.received_bytes,
            self.local_bytes,
            self.staging_bytes,
            self.cuts.peak,
            time.perf_counter() - begin,
            sums.seconds if sums is not None else 0.0,
        )

    def _staging(self, messages: list[list[_Message]]) -> list[Tensor]:
        """Both halves, bytes, each as long as its largest round; with one round the second is empty."""
        halves = []
        for half in range(HALVES):
            mine = [message for part in messages[half::HALVES] for message in part]
            buffer = torch.empty(
                max((m.first + m.size for m in mine), default=0), dtype=torch.uint8, device=self.device
            )
            for message in mine:
                _lay_out(message, buffer, self.dtype)
            halves.append(buffer)
        return halves

    def _copy_local(self) -> None:
        for source, target in self.local:
            if target.scale is not None:
                quantise_into(source.view, target.view, target.scale, self.dtype)
            else:
                target.view.copy_(source.view)
        self._put_cuts(self.local_cuts)

    def _put_cuts(self, parts: list[_Part]) -> None:
        for part in parts:
            self.cuts.put(part.transfer.target_local, part.transfer.target_start, part.slot)

    def _start(self, number: int, current: _Round, sums: _Checksums | None) -> list[dist.Work]:
        out, inbox = self.out[number % HALVES], self.inbox[number % HALVES]
        operations = []
        for message in current.sends:
            for part in message.parts:
                if part.scale_slot is None:
                    part.slot.copy_(part.view)
                else:
                    quantise_into(part.view, part.slot, part.scale_slot, self.dtype)
                if sums is not None:
                    sums.add(part.slot, part.scale_slot)
            operations.append(dist.P2POp(dist.isend, _span(out, message), message.peer))
            if sums is not None:
                operations.append(dist.P2POp(dist.isend, sums.of_sent(), message.peer))
        for message in current.receives:
            operations.append(dist.P2POp(dist.irecv, _span(inbox, message), message.peer))
            if sums is not None:
                operations.append(dist.P2POp(dist.irecv, sums.to_come(message), message.peer))
        return dist.batch_isend_irecv(operations) if operations else []

    def _finish(self, number: int, works: list[dist.Work], sums: _Checksums | None) -> None:
        for work in works:
            work.wait()
        for message in self.rounds[number].receives:
            for part in message.parts:
                is_cut = part.transfer.form == "cut"
                if not is_cut:
                    part.view.copy_(part.slot)
                if part.scale is not None and part.scale_slot is not None:
                    part.scale.copy_(part.scale_slot)
                if sums is not None:  # of what stands in the parameter now; a cut FP8 block does not yet
                    sums.add(part.slot if is_cut else part.view, part.scale)
            if sums is not None:
                sums.arrived(message)
        self._put_cuts(self.rounds[number].cuts)


class _Binder:
    """Views of this rank's tensors for the transfers of a plan."""

    def __init__(self, rank: int, sources: dict[str, Tensor], targets: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.rank, self.sources, self.targets, self.dtype = rank, sources, targets, dtype
        self.own_cuts: dict[str, list[_Part]] = defaultdict(list)  # by parameter, until a round takes them

    def source(self, transfer: Transfer) -> _Part:
        return _Part(transfer, box(self.sources[transfer.source_local], transfer.source_start, transfer.shape))

    def target(self, transfer: Transfer) -> _Part:
        name = transfer.target_local
        part = _Part(transfer, box(self.targets[name], transfer.target_start, transfer.shape))
        if transfer.form == "blocks":
            start = tuple(first // BLOCK for first in transfer.target_start)
            part.scale = box(self.targets[name + SCALE], start, scale_shape(transfer.shape))
        return part

    def own_cut(self, transfer: Transfer) -> _Part:
        """It comes straight from the source, where that of another rank comes from the staging buffer."""
        part = self.target(transfer)
        part.slot = self.source(transfer).view
        return part

    def round(self, transfers: list[Transfer]) -> _Round:
        sends: dict[int, _Message] = {}
        receives: dict[int, _Message] = {}
        cuts: list[_Part] = []
        for transfer in transfers:
            if transfer.source == self.rank:
                message = sends.setdefault(transfer.target, _Message(transfer.target))
                message.parts.append(self.source(transfer))
            elif transfer.target == self.rank:
                message = receives.setdefault(transfer.source, _Message(transfer.source))
                part = self.target(transfer)
                message.parts.append(part)
                if transfer.form == "cut":
                    # Not before: until the others' parts are there, its own would only wait.
                    cuts += [*self.own_cuts.pop(transfer.target_local, []), part]
        return _Round(self._placed(sends), self._placed(receives), cuts)

    def _placed(self, messages: dict[int, _Message]) -> list[_Message]:
        """Messages by peer, one behind the other in the staging half."""
        first = 0
        ordered = [messages[peer] for peer in sorted(messages)]
        for message in ordered:
            message.first = first
            message.size = sum(part.transfer.bytes(self.dtype.itemsize) for part in message.parts)
            first += -(-message.size // ALIGNMENT) * ALIGNMENT
        return ordered


def _lay_out(message: _Message, half: Tensor, dtype: torch.dtype) -> None:
    """Give every part its slots."""
    end = message.first

    def slot(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        nonlocal end
        begin, end = end, end + math.prod(shape) * kind.itemsize
        return half[begin:end].view(kind).view(shape)

    blocks = [part for part in message.parts if part.transfer.form == "blocks"]
    for part in blocks:
        part.scale_slot = slot(scale_shape(part.transfer.shape), torch.float32)
    for part in message.parts:
        if part.transfer.form != "blocks":
            part.slot = slot(part.transfer.shape, dtype)
    for part in blocks:
        part.slot = slot(part.transfer.shape, FP8)
    assert end == message.first + message.size


def _span(half: Tensor, message: _Message) -> Tensor:
    return half[message.first : message.first + message.size]


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the bits of a non-empty tensor, in words of up to 8 bytes along the last dimension; int64 scalar, wraps.

    The order in which words are added does not matter, and where they lie in memory neither: a strided view and its
    packed copy give the same. Any change within a single word changes the sum.
    """
    size = tensor.element_size()
    per_word = 8 // size
    if tensor.shape[-1] % per_word:
        return tensor.view(WORDS[size]).sum(dtype=torch.int64)
    whole = [tensor.storage_offset(), *tensor.stride()[:-1]]
    if tensor.stride(-1) != 1 or any(n % per_word for n in whole):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.int64).sum()


class _Checksums:
    """Per box of every message; the sender's travel behind the message, and nobody waits for them before the end.

    A box is added up right after it was copied, while caches still hold it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.current: list[Tensor] = []  # of the message being packed or unpacked
        self.outgoing: list[Tensor] = []  # alive while they are on the wire
        self.claimed: list[Tensor] = []  # of the messages to this rank, in the order of their rounds
        self.found: list[tuple[_Message, Tensor]] = []

    def add(self, values: Tensor, scale: Tensor | None) -> None:
        """The next box of the message."""
        begin = time.perf_counter()
        self.current.append(checksum(values) if scale is None else checksum(values) + checksum(scale))
        self.seconds += time.perf_counter() - begin

    def of_sent(self) -> Tensor:
        """Those of the message just packed, int64 [parts]."""
        self.outgoing.append(self._taken())
        return self.outgoing[-1]

    def to_come(self, message: _Message) -> Tensor:
        """Where the sender's will stand."""
        self.claimed.append(torch.empty(len(message.parts), dtype=torch.int64, device=self.device))
        return self.claimed[-1]

    def arrived(self, message: _Message) -> None:
        """The message was unpacked."""
        self.found.append((message, self._taken()))

    def _taken(self) -> Tensor:
        sums, self.current = torch.stack(self.current), []
        return sums

    def compare(self, rank: int) -> None:
        begin = time.perf_counter()
        for (message, found), claimed in zip(self.found, self.claimed, strict=True):
            for index in (found != claimed).nonzero().flatten().tolist():
                bad = message.parts[index].transfer
                raise TransferError(
                    f"push: {bad.tensor} from rank {bad.source} arrived damaged in {bad.target_local} on rank {rank}"
                )
        self.seconds += time.perf_counter() - begin


def _common_dtype(targets: dict[str, Tensor], quantised: Iterable[str]) -> torch.dtype:
    """Of the targets that are neither FP8 nor scales; also looks at the scales."""
    scales = {name + SCALE for name in quantised}
    for name in scales:
        if targets[name].dtype != torch.float32:
            raise ValueError(f"push: {name} is {targets[name].dtype}, float32 scales were expected")
    plain = {name: tensor.dtype for name, tensor in targets.items() if name not in scales and tensor.dtype != FP8}
    first, dtype = next(iter(plain.items()))
    for name, found in plain.items():
        if found != dtype:
            raise ValueError(f"push: {name} is {found} and {first} is {dtype}; one dtype was expected")
    return dtype
