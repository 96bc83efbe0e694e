"""Two layouts -> who sends which box to whom. Pure: every rank computes the same plan from the same layouts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

from treepo_mcore.model.facts import FP8_BLOCK as BLOCK
from treepo_mcore.weights.layout import Piece

Layouts = list[list[Piece]]  # pieces of every rank, by rank
Box = tuple[tuple[int, ...], tuple[int, ...]]  # first index and shape, in the HF tensor
# How a box travels. plain: in the rollout's dtype. blocks: whole FP8 blocks of the target, quantised by the source, and
# a float32 scale each. cut: in the rollout's dtype, parts of FP8 blocks that the target then quantises.
Form = Literal["plain", "blocks", "cut"]


class PlanError(ValueError):
    """The source cannot fill the target; the message names the tensor."""


class Transfer(NamedTuple):
    """One box of one HF tensor, from a local tensor of `source` into a local tensor of `target`."""

    tensor: str
    shape: tuple[int, ...]
    source: int  # rank
    source_local: str
    source_start: tuple[int, ...]
    target: int  # rank
    target_local: str
    target_start: tuple[int, ...]
    form: Form = "plain"

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        """Float32 numbers that go with it: one for each of its FP8 blocks."""
        return math.prod(-(-size // BLOCK) for size in self.shape) if self.form == "blocks" else 0

    def bytes(self, itemsize: int) -> int:
        """On the wire. itemsize: bytes of an element of the rollout's dtype."""
        return self.numel + 4 * self.scales if self.form == "blocks" else self.numel * itemsize

    @property
    def local(self) -> bool:
        """Whether it stays on its rank."""
        return self.source == self.target


def make_plan(sources: Layouts, targets: Layouts, nodes: list[int] | None = None) -> list[Transfer]:
    """Transfers that fill every target piece exactly once, in the order of the targets' tensors.

    A rank takes what it has from itself; otherwise from a replica in its own node where there is one; among several
    from the one that has the fewest elements to send so far over that kind of link. nodes: of every rank, by default
    one for all. Raises `PlanError` when part of a target has no source, or when source boxes overlap without being
    equal (then two ranks would both claim to own the same elements).
    """
    owners = _owners(sources)
    wanted: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
    for rank, pieces in enumerate(targets):
        for piece in pieces:
            wanted[piece.tensor].append((rank, piece))
    senders = _Senders(nodes or [0] * len(sources))
    plan: list[Transfer] = []
    for tensor, requests in wanted.items():
        held = owners.get(tensor, {})
        _check_disjoint(tensor, list(held))
        parts: dict[Piece, list[_Part]] = {}  # the same piece is wanted by a rank of every engine
        for rank, piece in requests:
            if piece not in parts:
                parts[piece] = _parts(rank, piece, held)
            plan += _fill(rank, piece, parts[piece], senders)
    return plan


class _Part(NamedTuple):
    """What a piece shares with a box that some ranks hold."""

    replicas: dict[int, Piece]
    shape: tuple[int, ...]
    source_start: dict[Piece, tuple[int, ...]]  # replicas keep a box in local tensors that may differ
    target_start: tuple[int, ...]


class _Senders:
    """Who has how much to send, apart for links within a node and across nodes."""

    def __init__(self, nodes: list[int]) -> None:
        self.nodes = nodes
        self.load: dict[tuple[int, bool], int] = defaultdict(int)  # (rank, leaves its node) -> elements

    def choose(self, target: int, replicas: Iterable[int]) -> int:
        def cost(source: int) -> tuple[bool, int, int]:
            leaves = self.nodes[source] != self.nodes[target]
            return leaves, self.load[source, leaves], source

        return min(replicas, key=cost)

    def add(self, transfer: Transfer) -> None:
        self.load[transfer.source, self.nodes[transfer.source] != self.nodes[transfer.target]] += transfer.numel


def _owners(sources: Layouts) -> dict[str, dict[Box, dict[int, Piece]]]:
    """HF tensor -> box -> rank -> its piece. A rank that holds a box twice (tied embeddings) offers the first."""
    owners: dict[str, dict[Box, dict[int, Piece]]] = defaultdict(dict)
    for rank, pieces in enumerate(sources):
        for piece in pieces:
            owners[piece.tensor].setdefault((piece.start, piece.shape), {}).setdefault(rank, piece)
    return owners


def _check_disjoint(tensor: str, boxes: list[Box]) -> None:
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            if _intersect(one, other) is not None:
                raise PlanError(f"{tensor}: sources disagree, boxes {_show(one)} and {_show(other)} overlap")


def _parts(rank: int, piece: Piece, held: dict[Box, dict[int, Piece]]) -> list[_Part]:
    """All sources of a piece. rank: one that wants it, for the message of the error where some of it has none."""
    parts, missing = [], piece.numel
    for box, replicas in held.items():
        shared = _intersect(box, (piece.start, piece.shape))
        if shared is None:
            continue
        start, shape = shared
        sources = {own: _translate(start, own) for own in set(replicas.values())}
        parts.append(_Part(replicas, shape, sources, _translate(start, piece)))
        missing -= math.prod(shape)
    if missing:
        raise PlanError(
            f"{piece.tensor}: {missing} of the {piece.numel} elements that {piece.local} on rank {rank} needs "
            "have no source"
        )
    return parts


def _fill(rank: int, piece: Piece, parts: list[_Part], senders: _Senders) -> list[Transfer]:
    transfers = []
    for part in parts:
        source = rank if rank in part.replicas else senders.choose(rank, part.replicas)
        held = part.replicas[source]
        start = part.source_start[held]
        transfer = Transfer(piece.tensor, part.shape, source, held.local, start, rank, piece.local, part.target_start)
        if not transfer.local:
            senders.add(transfer)
        transfers.append(transfer)
    return transfers


def _translate(start: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    """An index of the HF tensor as an index of the piece's local tensor."""
    slab = len(piece.local_start) - len(piece.shape)
    inside = piece.local_start[slab:]
    return piece.local_start[:slab] + tuple(i - a + b for i, a, b in zip(start, piece.start, inside, strict=True))


def _intersect(one: Box, other: Box) -> Box | None:
    start = tuple(map(max, one[0], other[0]))
    shape = tuple(
        min(a + n, b + m) - s for a, n, b, m, s in zip(one[0], one[1], other[0], other[1], start, strict=True)
    )
    return (start, shape) if min(shape) > 0 else None


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(*box, strict=True)) + "]"


def make_rounds(plan: list[Transfer], limit: int, itemsize: int = 1) -> list[list[Transfer]]:
    """What crosses ranks, cut into rounds in which no rank sends or receives more than `limit` bytes.

    Each transfer goes into the earliest round that its sender and its receiver both still have room in. Those between
    ranks equally far apart come first together: each rank is in few of them, so that all send side by side, where in
    the order of the layers many receivers would wait for the same stage. Between two ranks the plan's order stays.
    Parts of FP8 blocks are the exception: a receiver gets them parameter by parameter, whichever ranks send them, so
    that only one parameter has incomplete blocks at a time. Boxes larger than a round are cut by rows; raises
    `PlanError` where one row (of blocks, in FP8) is larger than `limit`. itemsize: bytes of an element of the rollout's
    dtype.
    """
    rounds: list[list[Transfer]] = []
    sent: dict[int, dict[int, int]] = defaultdict(dict)  # rank -> round -> bytes
    received: dict[int, dict[int, int]] = defaultdict(dict)
    latest: dict[tuple[int, int | None], int] = defaultdict(int)  # target, source (None: cuts) -> their last round
    for transfer in _by_distance(plan):
        lane = transfer.target, None if transfer.form == "cut" else transfer.source
        out, into, number = sent[transfer.source], received[transfer.target], latest[lane]
        for part in _cut(transfer, limit, itemsize):
            size = part.bytes(itemsize)
            room = limit - size
            while out.get(number, 0) > room or into.get(number, 0) > room:
                number += 1
            out[number] = out.get(number, 0) + size
            into[number] = into.get(number, 0) + size
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(part)
        latest[lane] = number
    return rounds


def _by_distance(plan: list[Transfer]) -> list[Transfer]:
    """What crosses ranks, by the distance from sender to receiver; for cuts the least of any into their parameter."""
    world = 1 + max((max(transfer.source, transfer.target) for transfer in plan), default=0)
    distances = [((transfer.source - transfer.target) % world, transfer) for transfer in plan if not transfer.local]
    nearest: dict[tuple[int, str], int] = defaultdict(lambda: world)
    for distance, transfer in distances:
        if transfer.form == "cut":
            parameter = transfer.target, transfer.target_local
            nearest[parameter] = min(nearest[parameter], distance)

    def turn(item: tuple[int, Transfer]) -> int:
        distance, transfer = item
        return nearest[transfer.target, transfer.target_local] if transfer.form == "cut" else distance

    return [transfer for _, transfer in sorted(distances, key=turn)]


def _cut(transfer: Transfer, limit: int, itemsize: int) -> list[Transfer]:
    if transfer.bytes(itemsize) <= limit:
        return [transfer]
    height = transfer.shape[0]
    unit = min(BLOCK if transfer.form == "blocks" else 1, height)
    least = part_of(transfer, 0, unit).bytes(itemsize)
    count = limit // least * unit
    if count == 0:
        raise PlanError(
            f"{transfer.tensor}: {least} bytes of {transfer.target_local} cannot be sent in parts, and a quarter of "
            f"rollout.push_staging_mb has room for {limit}"
        )
    return [part_of(transfer, first, min(count, height - first)) for first in range(0, height, count)]


def part_of(transfer: Transfer, first: int, count: int, dim: int = 0) -> Transfer:
    """`count` rows of the box (columns with dim 1), from the row `first` of it on."""

    def moved(start: tuple[int, ...]) -> tuple[int, ...]:
        at = len(start) - len(transfer.shape) + dim  # behind the indices of a slab
        return (*start[:at], start[at] + first, *start[at + 1 :])

    return transfer._replace(
        shape=(*transfer.shape[:dim], count, *transfer.shape[dim + 1 :]),
        source_start=moved(transfer.source_start),
        target_start=moved(transfer.target_start),
    )
