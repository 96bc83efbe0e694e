"""Trees between ranks: outlines to all, whole trees to those that train on them.

An engine's first rank holds what the engine sampled. A whole tree of 40,000 tokens is half a megabyte, its outline some
kilobytes; everything that is decided about a step (filter, advantages, who trains what) is decided on outlines, by
every rank alike, so that each knows who sends what to whom.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mcore.records import Deliver
from treepo_mcore.rollout.collection import Collection
from treepo_mcore.system.placement import Placement
from treepo_mcore.tree.tree import Tree

Key = tuple[bool, int]  # whether it grew behind a remembered answer, the number of its prompt in the step


def key_of(tree: Tree) -> Key:
    """Of a tree among those of a step."""
    return tree.replayed > 0, int(tree.meta["number"])


class Exchange:
    """Every rank makes one; all methods are collective."""

    def __init__(self, placement: Placement, leaders: dist.ProcessGroup, engine: dist.ProcessGroup | None) -> None:
        """leaders: the first ranks of all engines; engine: this engine's ranks, None where it is one."""
        self.placement, self.leaders, self.engine = placement, leaders, engine

    def of_all_engines[T](self, mine: T) -> list[T]:
        """What every engine has, on every rank: from first rank to first rank, from there to the engine's others."""
        everyone: list[Any] = [None] * len(self.placement.engines)
        if self.placement.leads_engine:
            dist.all_gather_object(everyone, mine, group=self.leaders)
        if self.engine is not None:
            dist.broadcast_object_list(everyone, self.placement.leader, group=self.engine)
        return everyone

    def meet(self, mine: Collection) -> tuple[Collection, Deliver]:
        """All engines' results with outlines of their trees, and the way to whole ones."""
        begin = time.perf_counter()
        dist.barrier()
        mine.counts.idle_seconds += time.perf_counter() - begin  # until the slowest engine is done
        trees, restarts = ([tree.outline() for tree in some] for some in (mine.trees, mine.restarts))
        total = Collection()
        sampled_by: dict[Key, int] = {}
        for engine, part in enumerate(self.of_all_engines(replace(mine, trees=trees, restarts=restarts))):
            sampled_by |= {key_of(tree): engine for tree in [*part.trees, *part.restarts]}
            total.add(part)
        whole = {key_of(tree): tree for tree in [*mine.trees, *mine.restarts]}

        def deliver(shares: Sequence[Sequence[Tree]], index: int) -> list[Tree]:
            return self._deliver(shares, index, sampled_by, whole)

        return total, deliver

    def _deliver(
        self, shares: Sequence[Sequence[Tree]], index: int, sampled_by: dict[Key, int], whole: dict[Key, Tree]
    ) -> list[Tree]:
        """Whole trees of share number `index`, in its order, with rewards as they are in the outlines."""
        rank = self.placement.rank
        needs = _of_all_ranks(index)  # of every rank the number of its share
        sends: dict[int, Tensor] = {}
        if self.placement.leads_engine:
            others = [other for other in range(len(needs)) if other != rank]
            packed = {share: self._packed(shares[share], sampled_by, whole) for share in {needs[o] for o in others}}
            sends = {other: message for other in others if (message := packed[needs[other]]) is not None}
        engines = {sampled_by[key_of(tree)] for tree in shares[index]}
        sources = [self.placement.leaders[engine] for engine in sorted(engines)]
        sizes = {source: torch.zeros(1, dtype=torch.int64) for source in sources if source != rank}
        _pass({other: torch.tensor([len(message)]) for other, message in sends.items()}, sizes)
        received = {source: torch.empty(int(size), dtype=torch.uint8) for source, size in sizes.items()}
        _pass(sends, received)
        found = dict(whole) if self.placement.leads_engine else {}
        for message in received.values():
            found |= pickle.loads(message.numpy().tobytes())
        return [_with_leaves(found[key_of(tree)], tree) for tree in shares[index]]

    def _packed(self, share: Sequence[Tree], sampled_by: dict[Key, int], whole: dict[Key, Tree]) -> Tensor | None:
        """What this engine sampled of a share, without texts, which nobody trains on; None where that is nothing."""
        mine = [key for tree in share if sampled_by[key := key_of(tree)] == self.placement.engine]
        bare = {key: _with_leaves(whole[key], whole[key]) for key in mine}
        if not bare:
            return None
        return torch.frombuffer(bytearray(pickle.dumps(bare, protocol=5)), dtype=torch.uint8)


def _of_all_ranks(number: int) -> list[int]:
    everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor([number]))
    return [int(other) for other in everyone]


def _with_leaves(tree: Tree, outline: Tree) -> Tree:
    """The tree with the outline's leaves; their texts are left out."""
    other = Tree(tree.prompt_id, tree.nodes[0].tokens, outline.meta)
    other.nodes, other._children, other._leaf_at = tree.nodes, tree._children, tree._leaf_at
    other.leaves = [replace(leaf, text=None) for leaf in outline.leaves]
    return other


def _pass(sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
    """Tensors to other ranks and from them, by rank, side by side."""
    works = [dist.irecv(tensor, source) for source, tensor in received.items()]
    works += [dist.isend(tensor, target) for target, tensor in sent.items()]
    for work in works:
        assert work is not None
        work.wait()
