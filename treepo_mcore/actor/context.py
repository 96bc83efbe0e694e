"""Context parallelism: the tokens of a packed sequence cut over ranks, and the keys that a rank needs of the others.

A packed sequence lists trees depth first, and key k is visible to query q when ``k <= q < subtree_end[k]``. Of a run
[a, b) of that order, a key outside of it that any of its queries sees is an ancestor of token a, since
``k < a <= q < subtree_end[k]``. So a rank needs, besides its own keys and values, those of the paths to the first
tokens of its runs, however large the tree is. They come by one exchange a layer and pass, of exactly these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Runs = list[tuple[int, int]]  # [begin, end) of packed indices, ascending

EVEN = 1.1  # the fullest rank's tokens over the mean, up to which memory is even enough


@dataclass(frozen=True)
class Share:
    """One rank's tokens of a packed sequence, and the keys they see. All indices int64."""

    own: Tensor  # packed indices of its tokens, ascending
    rows: Tensor  # place of every own token among the keys
    end: Tensor  # of every key, in ascending packed order: one past the last key below it
    order: Tensor | None  # keys = concatenated(own, those of the other ranks)[order]; None: the own ones alone
    send: tuple[Tensor, ...] = ()  # for every rank, the own tokens (places in `own`) whose keys it gets
    receive: tuple[int, ...] = ()  # from every rank, how many keys

    @property
    def fetched(self) -> int:
        """Keys that come from other ranks."""
        return sum(self.receive)

    def to(self, device: torch.device) -> Share:
        """The same on a device."""
        own, rows, end = (x.to(device) for x in (self.own, self.rows, self.end))
        order = None if self.order is None else self.order.to(device)
        return replace(self, own=own, rows=rows, end=end, order=order, send=tuple(x.to(device) for x in self.send))

    def padded(self, extra: int) -> Share:
        """With `extra` own tokens behind the last, of which each sees itself only."""
        keys, own = len(self.end), len(self.own)
        more = torch.arange(extra)
        order = self.order
        if order is not None:  # of the ranks' keys, those of the padding come behind the own ones
            order = torch.cat([torch.where(order < own, order, order + extra), own + more])
        return replace(
            self,
            own=torch.cat([self.own, torch.full((extra,), -1)]),
            rows=torch.cat([self.rows, keys + more]),
            end=torch.cat([self.end, keys + more + 1]),
            order=order,
        )


def whole(subtree_end: Tensor) -> Share:
    """Of a rank that has all tokens."""
    index = torch.arange(len(subtree_end))
    return Share(own=index, rows=index, end=subtree_end, order=None)


def cut(positions: Tensor, token_work: float, ranks: int) -> list[Runs]:
    """The runs of every rank: one each, of equal work, or two of equal size, whichever is more even.

    positions: int64 [S] of the tokens in their paths; a token's work is the keys it sees and `token_work`, which stands
    for the linear layers. In a tree its tokens are as deep as one another, mostly, and runs of equal work have about as
    many tokens. In a chain the first rank would have most tokens and memory by far: there rank i has pieces i and
    2 ranks - 1 - i.
    """
    work = positions.double() + 1 + token_work
    total = work.cumsum(0)
    size = len(positions)
    marks = torch.searchsorted(total, total[-1] * torch.arange(1, ranks, dtype=total.dtype) / ranks).tolist()
    one = [[run] for run in pairwise([0, *marks, size])]
    pieces = list(pairwise([number * size // (2 * ranks) for number in range(2 * ranks + 1)]))
    two = [[pieces[rank], pieces[-1 - rank]] for rank in range(ranks)]
    return min(one, two, key=lambda shares: _most(shares, work) * max(1.0, _most(shares, torch.ones_like(work)) / EVEN))


def _most(shares: list[Runs], work: Tensor) -> float:
    """The fullest rank's over the mean."""
    loads = [sum(float(work[begin:end].sum()) for begin, end in runs) for runs in shares]
    return max(loads) * len(loads) / sum(loads)


def share_of(subtree_end: Tensor, shares: Sequence[Runs], rank: int) -> Share:
    """What `rank` has and needs when the ranks of its group have these runs. Nothing is negotiated.

    subtree_end: int64 [S], one past the last token below each.
    """
    owner = torch.empty_like(subtree_end)
    for number, runs in enumerate(shares):
        for begin, end in runs:
            owner[begin:end] = number
    own = (owner == rank).nonzero()[:, 0]
    needed = _needed(subtree_end, owner, shares[rank], rank)
    by_owner = [needed[owner[needed] == other] for other in range(len(shares))]
    keys, order = torch.cat([own, *by_owner]).sort()
    wanted = [_needed(subtree_end, owner, runs, other) for other, runs in enumerate(shares)]
    return Share(
        own=own,
        rows=torch.searchsorted(keys, own),
        end=torch.searchsorted(keys, subtree_end[keys]),
        order=order,
        send=tuple(torch.searchsorted(own, some[owner[some] == rank]) for some in wanted),
        receive=tuple(len(some) for some in by_owner),
    )


def _needed(subtree_end: Tensor, owner: Tensor, runs: Runs, rank: int) -> Tensor:
    """Packed indices of the tokens above the first ones of the runs that `rank` has not, ascending."""
    above = torch.zeros(len(subtree_end), dtype=torch.bool)
    for begin, end in runs:
        if begin < end:
            above[:begin] |= subtree_end[:begin] > begin
    return (above & (owner != rank)).nonzero()[:, 0]


class Exchange(torch.autograd.Function):
    """x [own tokens, ...] -> [keys, ...], with rows of the other ranks of the group. Collective, in both passes.

    Backward, what the others found for a row is added to what this rank found, in the order of the ranks and in
    float32: the same sum each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, group: dist.ProcessGroup) -> Tensor:
        """Returns the rows in the keys' order."""
        ctx.share, ctx.group, ctx.own = share, group, len(x)
        sent = torch.cat([x[rows] for rows in share.send])
        got = x.new_empty(share.fetched, *x.shape[1:])
        dist.all_to_all_single(got, sent, list(share.receive), [len(rows) for rows in share.send], group=group)
        return torch.cat([x, got])[share.order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The reverse."""
        share: Share = ctx.share
        in_turn = torch.empty_like(grad)
        in_turn[share.order] = grad
        counts = [len(rows) for rows in share.send]
        back = grad.new_empty(sum(counts), *grad.shape[1:])
        dist.all_to_all_single(back, in_turn[ctx.own :], counts, list(share.receive), group=ctx.group)
        total = in_turn[: ctx.own].float()
        for rows, part in zip(share.send, back.split(counts), strict=True):
            total.index_add_(0, rows, part.float())
        return total.to(grad.dtype), None, None
