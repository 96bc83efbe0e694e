"""Runs a plan: local copies straight into the engine's parameters, the rest point to point through a fixed buffer.

Every round packs what a rank sends into one message per receiver, in the engine's dtype; while a round is on the
wire, the one before it is unpacked. The staging buffer is allocated once and is all the memory a push needs: no
tensor is ever put together anywhere but in its parameter, and parameters keep their addresses.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mcore.weights.layout import Piece, box
from treepo_mcore.weights.plan import Transfer, make_plan, make_rounds

STAGING_BYTES = 256 << 20
HALVES = 2  # double buffering
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
    seconds: float
    # Of `seconds`, spent on checksums. On a GPU kernels are only queued here; compare pushes with and without.
    checksum_seconds: float


@dataclass
class _Message:
    """What goes between this rank and one other in one round, in a slice of the staging buffer."""

    peer: int
    first: int = 0  # element of the staging half
    numel: int = 0
    parts: list[tuple[Transfer, Tensor]] = field(default_factory=list)  # with the view in the local tensor


@dataclass(frozen=True)
class _Round:
    sends: list[_Message]
    receives: list[_Message]


def gather_layouts(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces of every rank. Collective; metadata only."""
    everyone: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, pieces)
    return everyone


def plan_push(sources: list[Piece], targets: list[Piece]) -> list[Transfer]:
    """The plan of all ranks, the same on every one of them. Collective."""
    nodes = [0] * dist.get_world_size()
    dist.all_gather_object(nodes, int(os.environ.get("GROUP_RANK", "0")))  # torchrun's number of this node
    return make_plan(gather_layouts(sources), gather_layouts(targets), nodes)


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

        plan: of all ranks. sources, targets: local tensors by name; their storage must stay where it is. All targets
        share one dtype, in which weights travel. padding: views of the targets that the plan leaves out; every push
        writes zeros there. staging_bytes: the most that a rank's buffer may take, both directions and both halves
        together; raises `PlanError` when a single row of a tensor does not fit.
        """
        self.rank = dist.get_rank()
        self.dtype = _common_dtype(targets)
        self.padding = list(padding)
        size = self.dtype.itemsize
        limit = staging_bytes // (2 * HALVES * size)
        self.local = [
            (_target_view(t, targets), _source_view(t, sources)) for t in plan if t.local and t.target == self.rank
        ]
        self.rounds = [_bind(part, self.rank, sources, targets) for part in make_rounds(plan, limit)]
        device = next(iter(targets.values())).device
        # NCCL connects all ranks at their first collective; the rounds may involve only some of them.
        dist.all_reduce(torch.zeros(1, device=device))
        self.out = self._staging(limit, [r.sends for r in self.rounds], device)
        self.inbox = self._staging(limit, [r.receives for r in self.rounds], device)
        self.sent_bytes = size * sum(m.numel for r in self.rounds for m in r.sends)
        self.received_bytes = size * sum(m.numel for r in self.rounds for m in r.receives)
        self.local_bytes = size * sum(view.numel() for view, _ in self.local)
        self.staging_bytes = size * (self.out.numel() + self.inbox.numel())
        assert self.staging_bytes <= staging_bytes

    @torch.no_grad()
    def run(self, verify: bool = True) -> PushReport:
        """Bring the targets up to date. Collective.

        verify: compare checksums of what was sent with what now stands in the targets; raises `TransferError`.
        """
        begin = time.perf_counter()
        sums = _Checksums() if verify else None
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
        if sums is not None:
            sums.compare(self.rank)
        if self.inbox.is_cuda:
            torch.cuda.synchronize()
        return PushReport(
            self.sent_bytes,
            self.received_bytes,
            self.local_bytes,
            self.staging_bytes,
            time.perf_counter() - begin,
            sums.seconds if sums is not None else 0.0,
        )

    def _staging(self, limit: int, messages: list[list[_Message]], device: torch.device) -> Tensor:
        """[HALVES, elements of this rank's largest round]."""
        largest = max((sum(m.numel for m in part) for part in messages), default=0)
        assert largest <= limit
        return torch.empty(HALVES, largest, dtype=self.dtype, device=device)

    def _copy_local(self) -> None:
        for target, source in self.local:
            target.copy_(source)

    def _start(self, number: int, current: _Round, sums: _Checksums | None) -> list[dist.Work]:
        out, inbox = self.out[number % HALVES], self.inbox[number % HALVES]
        operations = []
        for message in current.sends:
            for (transfer, view), slot in zip(message.parts, _slots(out, message), strict=True):
                slot.copy_(view)
                if sums is not None:
                    sums.sent(transfer, slot)
            operations.append(dist.P2POp(dist.isend, _span(out, message), message.peer))
        operations += [dist.P2POp(dist.irecv, _span(inbox, m), m.peer) for m in current.receives]
        return dist.batch_isend_irecv(operations) if operations else []

    def _finish(self, number: int, works: list[dist.Work], sums: _Checksums | None) -> None:
        for work in works:
            work.wait()
        inbox = self.inbox[number % HALVES]
        for message in self.rounds[number].receives:
            for (transfer, view), slot in zip(message.parts, _slots(inbox, message), strict=True):
                view.copy_(slot)
                if sums is not None:
                    sums.arrived(transfer, view)


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
    """Per box and peer, in the plan's order; exchanged once, after the last round."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.outgoing: dict[int, list[Tensor]] = defaultdict(list)
        self.incoming: dict[int, list[tuple[Transfer, Tensor]]] = defaultdict(list)

    def sent(self, transfer: Transfer, packed: Tensor) -> None:
        begin = time.perf_counter()
        self.outgoing[transfer.target].append(checksum(packed))
        self.seconds += time.perf_counter() - begin

    def arrived(self, transfer: Transfer, view: Tensor) -> None:
        begin = time.perf_counter()
        self.incoming[transfer.source].append((transfer, checksum(view)))
        self.seconds += time.perf_counter() - begin

    def compare(self, rank: int) -> None:
        begin = time.perf_counter()
        found = {peer: torch.stack([value for _, value in items]) for peer, items in self.incoming.items()}
        claimed = {peer: torch.empty_like(values) for peer, values in found.items()}
        operations = [dist.P2POp(dist.isend, torch.stack(v), p) for p, v in sorted(self.outgoing.items())]
        operations += [dist.P2POp(dist.irecv, values, peer) for peer, values in sorted(claimed.items())]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        self.seconds += time.perf_counter() - begin
        for peer, items in sorted(self.incoming.items()):
            for index in (found[peer] != claimed[peer]).nonzero().flatten().tolist():
                bad = items[index][0]
                raise TransferError(
                    f"push: {bad.tensor} from rank {peer} arrived damaged in {bad.target_local} on rank {rank}"
                )


def _common_dtype(targets: dict[str, Tensor]) -> torch.dtype:
    first, dtype = next((name, tensor.dtype) for name, tensor in targets.items())
    for name, tensor in targets.items():
        if tensor.dtype != dtype:
            raise ValueError(f"push: {name} is {tensor.dtype} and {first} is {dtype}; one dtype was expected")
    return dtype


def _source_view(transfer: Transfer, sources: dict[str, Tensor]) -> Tensor:
    return box(sources[transfer.source_local], transfer.source_start, transfer.shape)


def _target_view(transfer: Transfer, targets: dict[str, Tensor]) -> Tensor:
    return box(targets[transfer.target_local], transfer.target_start, transfer.shape)


def _bind(transfers: list[Transfer], rank: int, sources: dict[str, Tensor], targets: dict[str, Tensor]) -> _Round:
    sends: dict[int, _Message] = {}
    receives: dict[int, _Message] = {}
    for transfer in transfers:
        if transfer.source == rank:
            message = sends.setdefault(transfer.target, _Message(transfer.target))
            message.parts.append((transfer, _source_view(transfer, sources)))
        elif transfer.target == rank:
            message = receives.setdefault(transfer.source, _Message(transfer.source))
            message.parts.append((transfer, _target_view(transfer, targets)))
    return _Round(_placed(sends), _placed(receives))


def _placed(messages: dict[int, _Message]) -> list[_Message]:
    """Messages by peer, one behind the other in the staging half."""
    first = 0
    ordered = [messages[peer] for peer in sorted(messages)]
    for message in ordered:
        message.first = first
        message.numel = sum(transfer.numel for transfer, _ in message.parts)
        first += message.numel
    return ordered


def _span(half: Tensor, message: _Message) -> Tensor:
    return half[message.first : message.first + message.numel]


def _slots(half: Tensor, message: _Message) -> Iterable[Tensor]:
    """The boxes of a message in the staging half, each in its shape."""
    first = message.first
    for transfer, _ in message.parts:
        yield half[first : first + transfer.numel].view(transfer.shape)
        first += transfer.numel
