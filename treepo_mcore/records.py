"""What flows through a step: trees from the rollout, packed sequences into the actor, the step as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from treepo_mcore.tree.tree import Tree

if TYPE_CHECKING:  # the commands that only read trees start without torch
    import torch
    from torch import Tensor


@dataclass
class Counts:
    """What one engine did; summed over engines."""

    steps: int = 0
    decoded_tokens: int = 0  # physical
    context_tokens: int = 0  # sent to the engine, over all requests
    cached_tokens: int = 0  # of these, served by the prefix cache
    requests: int = 0
    live_sum: int = 0  # live paths summed over steps: occupancy is live_sum / steps
    preemptions: int = 0  # requests that lost their cache blocks and were recomputed
    drawn_prompts: int = 0
    failed_prompts: int = 0
    rewards: int = 0  # calls that were answered
    failed_rewards: int = 0  # of these, the function raised, died or ran too long
    unfinished_prompts: int = 0  # given up in the tail, or put off
    resumed_prompts: int = 0  # that an earlier step left unfinished, under rollout.unfinished: resume
    resumed_tokens: int = 0  # decoded for these in that step
    resting_prompts: int = 0  # that the data would pass over now
    stopped_prompts: int = 0  # with their first answers, which agreed
    restarted_prompts: int = 0  # of these, those that went on behind a remembered answer
    discarded_tokens: int = 0  # decoded for failed and unfinished prompts
    tail_steps: int = 0  # engine steps with room for another prompt and none to draw
    idle_seconds: float = 0.0  # nothing to run, and the phase not over

    def add(self, other: Counts) -> None:
        """Sum in place."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# Outlines that each data-parallel rank trains on, and this rank's index among them -> its own trees, whole.
Deliver = Callable[[Sequence[Sequence[Tree]], int], list[Tree]]


def all_are_here(shares: Sequence[Sequence[Tree]], mine: int) -> list[Tree]:
    """Where every rank has whole trees."""
    return list(shares[mine])


@dataclass
class Batch:
    """What one rollout gave, the same on every rank, but for `own`.

    Trees are complete and scored; on all ranks they are outlines (`Tree.outline`). A whole one is on the rank that
    leads the engine that sampled it, and `deliver` brings it to those that train on it.
    """

    trees: list[Tree]  # in the order of their prompts
    policy_version: int  # of the weights that they were sampled with: steps whose updates are in them
    counts: Counts
    # Behind remembered answers, for prompts whose tree in `trees` is all alike.
    restarts: list[Tree] = field(default_factory=list)
    own: list[Tree] = field(default_factory=list)  # whole, of the engine that this rank leads; restarts at the end
    deliver: Deliver = all_are_here  # collective


class Advantage(Protocol):
    """What a tree's tokens are worth."""

    @property
    def weights(self) -> np.ndarray:
        """Of each leaf's loss, float64[leaves]."""

    def scaled(self, factors: np.ndarray) -> Advantage:
        """The same, with each leaf's values but not its weight multiplied by a factor >= 0; float64[leaves]."""

    def node_sums(self, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
        """(A+, A-) of any token of each node, float64[nodes]: sums over the leaves below of max(A, 0) and min(A, 0).

        Two scalars per unique token give the clipped loss of all leaves through it (docs/algorithm.md 5.3).
        """

    def along(self, tree: Tree, leaf: int) -> np.ndarray:
        """A of leaf number `leaf` on each node of its path, prompt included, float64[path]."""


@dataclass
class PackedSequence:
    """S tokens and E edges; torch tensors on the CPU."""

    tokens: torch.Tensor  # int64[S]
    positions: torch.Tensor  # int64[S], from the start of the prompt
    parent: torch.Tensor  # int64[S], packed index of the predecessor, -1 for a prompt's first token
    subtree_end: torch.Tensor  # int64[S], one past the last packed index that sees this token
    source: torch.Tensor  # int64[E], packed index whose output predicts the target
    target: torch.Tensor  # int64[E], token id
    multiplicity: torch.Tensor  # int64[E], leaves through the edge
    adv_pos: torch.Tensor  # float32[E], sum over these leaves of max(A, 0)
    adv_neg: torch.Tensor  # float32[E], sum over these leaves of min(A, 0)
    weight: torch.Tensor  # float32[E], sum over these leaves of the weight of their loss (A+ and A- contain it)
    behaviour_logprob: torch.Tensor  # float32[E], of the engine
    edge_key: torch.Tensor  # int64[E, 3]: index of the tree in the list given, node id, offset of the target in it
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)  # [S, ...], the nodes' arrays by name


@dataclass(frozen=True)
class EdgeValues:
    """What an objective sees of a micro-batch: its sequence, and float32 [E] values of its edges on the device."""

    sequence: PackedSequence
    logp: Tensor  # of the policy as it is, with gradients
    entropy: Tensor  # with gradients where the objective asks for them
    old_logp: Tensor | None  # of the policy that ratios are taken against
    reference_logp: Tensor | None


class Objective(Protocol):
    """What an update minimises, and what it measures on the way."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of what is measured and adds up over micro-batches and ranks."""

    @property
    def maxima(self) -> tuple[str, ...]:
        """Names of what is measured and is the largest over micro-batches and ranks."""

    @property
    def entropy_grad(self) -> bool:
        """Whether the entropy takes part in the loss."""

    def __call__(self, edges: EdgeValues, normaliser: float) -> tuple[Tensor, Tensor]:
        """The loss, summed over the edges and divided by the normaliser; and what is measured, float64: `sums`, then
        `maxima`."""

    def means(self, totals: Tensor) -> dict[str, float]:
        """Metrics of a mini-batch, from the totals of what was measured."""


@dataclass
class Step:
    """One rollout and the updates on its trees."""

    number: int  # from 0
    batch: Batch
    kept: list[Tree] = field(default_factory=list)  # behind the filter: what was trained on
    advantages: list[Advantage] = field(default_factory=list)  # of each tree kept
    mini_batches: list[int] = field(default_factory=list)  # trees in each, in the order of `kept`
    updates: list[dict[str, float]] = field(default_factory=list)  # metrics of each optimizer step, equal on all ranks
    values: dict[str, Any] = field(default_factory=dict)  # a line of metrics.jsonl
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by part, see `observe.metrics.Clock`
