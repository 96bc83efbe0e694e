"""A packed sequence made ready for Megatron: this rank's tokens of it, padded, on the device, with its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from treepo_mcore.actor.attention import Implementation, TreeParams, tree_params
from treepo_mcore.actor.context import Share, cut, share_of, whole
from treepo_mcore.records import PackedSequence

EDGES = (
    "source",
    "target",
    "multiplicity",
    "adv_pos",
    "adv_neg",
    "weight",
    "behaviour_logprob",
    "edge_key",
)  # the fields of a packed sequence with a row for each edge


@dataclass
class MicroBatch:
    """This rank's part of one sequence, and the log-probs that those of its edges are compared with."""

    sequence: PackedSequence  # indices in it count this rank's tokens
    attention: TreeParams
    old_logp: Tensor | None  # float32 [E]; None: no ratios are taken
    reference_logp: Tensor | None  # float32 [E]; None: no reference policy
    edges: Tensor  # int64 [E], which of the whole sequence's; without any there is one that counts zero times


@dataclass(frozen=True)
class Shares:
    """Who has which tokens of the packed sequences: the ranks of a context-parallel group, by equal work."""

    ranks: int
    rank: int
    token_work: float  # see `model/shards.py`

    def of(self, sequence: PackedSequence) -> Share:
        """What this rank has of a sequence."""
        if self.ranks == 1:
            return whole(sequence.subtree_end)
        return share_of(sequence.subtree_end, cut(sequence.positions, self.token_work, self.ranks), self.rank)


def micro_batch(
    sequence: PackedSequence,
    share: Share,
    old_logp: Tensor | None,
    reference_logp: Tensor | None,
    *,
    multiple: int,
    implementation: Implementation,
    device: torch.device,
) -> MicroBatch:
    """Take this rank's share, pad it to a multiple (sequence parallelism splits evenly), move it to the device."""
    own = len(share.own)
    extra = -(-max(own, 1) // multiple) * multiple - own
    mine, edges = _own_part(sequence, share)
    mine = _padded(mine, extra)
    follows = mine.parent == torch.arange(len(mine.tokens)) - 1
    follows[0] = False  # the predecessor of a prompt's first token is -1
    share = share.padded(extra).to(device)
    mine = _to(mine, device)
    attention = tree_params(share, follows.to(device), mine.positions, implementation)
    pick = _picker(edges, device)
    return MicroBatch(mine, attention, pick(old_logp), pick(reference_logp), edges.to(device))


def _own_part(sequence: PackedSequence, share: Share) -> tuple[PackedSequence, Tensor]:
    """The share's tokens and the edges that begin at them, by number; one without tokens keeps a place of its own."""
    own = share.own
    place = torch.full((len(sequence.tokens) + 1,), -1)  # the last is that of no predecessor
    place[own] = torch.arange(len(own))
    edges = (place[sequence.source] >= 0).nonzero()[:, 0]
    rows = {name: getattr(sequence, name)[edges] for name in EDGES}
    if len(edges):
        rows["source"] = place[rows["source"]]
    else:  # the others of the group wait for this rank's backward pass, which needs something to begin at
        rows = {name: values.new_zeros(1, *values.shape[1:]) for name, values in rows.items()}
    part = PackedSequence(
        tokens=sequence.tokens[own],
        positions=sequence.positions[own],
        parent=place[sequence.parent[own]],
        subtree_end=torch.searchsorted(own, sequence.subtree_end[own]),
        arrays={name: values[own] for name, values in sequence.arrays.items()},
        **rows,
    )
    return part, edges


def _picker(edges: Tensor, device: torch.device) -> Callable[[Tensor | None], Tensor | None]:
    """Values of all edges -> those of this rank's, on the device."""

    def pick(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.to(device)[edges.to(device)] if len(edges) else torch.zeros(1, device=device)

    return pick


def empty_sequence() -> PackedSequence:
    """One token and one edge that counts zero times: fills a rank's turn when it has no tree."""
    zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return PackedSequence(
        tokens=zero,
        positions=zero,
        parent=zero - 1,
        subtree_end=zero + 1,
        source=zero,
        target=zero,
        multiplicity=zero,
        adv_pos=nothing,
        adv_neg=nothing,
        weight=nothing,
        behaviour_logprob=nothing,
        edge_key=torch.zeros(1, 3, dtype=torch.int64),
    )


def _padded(sequence: PackedSequence, extra: int) -> PackedSequence:
    """With padding tokens: one-token trees of their own without edges."""
    if not extra:
        return sequence
    size = len(sequence.tokens)
    zeros = torch.zeros(extra, dtype=torch.int64)
    return replace(
        sequence,
        tokens=torch.cat([sequence.tokens, zeros]),
        positions=torch.cat([sequence.positions, zeros]),
        parent=torch.cat([sequence.parent, zeros - 1]),
        subtree_end=torch.cat([sequence.subtree_end, torch.arange(size, size + extra) + 1]),
        arrays={name: _with_zeros(values, extra) for name, values in sequence.arrays.items()},
    )


def _with_zeros(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values.new_zeros(rows, *values.shape[1:])])


def _to(sequence: PackedSequence, device: torch.device) -> PackedSequence:
    tensors = {f.name: getattr(sequence, f.name) for f in fields(sequence) if f.name != "arrays"}
    arrays = {name: values.to(device) for name, values in sequence.arrays.items()}
    return replace(sequence, arrays=arrays, **{name: values.to(device) for name, values in tensors.items()})
