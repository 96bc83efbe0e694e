"""Engine and trainer disagree a little on the policy they share: importance weights and masks for it.

rho = p(actor) / p(engine) of the old policy at a sampled token. The names follow verl's rollout correction: truncated
importance sampling (tis) caps rho, a mask drops what lies outside [1 / threshold, threshold]; token level looks at each
token, sequence level at the product along each leaf's response. Either way only the clipped loss is scaled; entropy, KL
and the normaliser stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from treepo_mcore.config import ActorConfig
from treepo_mcore.records import PackedSequence
from treepo_mcore.registry import resolve
from treepo_mcore.tree.tree import Tree

Factors = Callable[[Tensor, float], Tensor]  # (log rho of any shape, actor.correction_threshold) -> factors


def truncated(log_rho: Tensor, threshold: float) -> Tensor:
    """Truncated importance sampling."""
    return log_rho.clamp(max=math.log(threshold)).exp()


def masked(log_rho: Tensor, threshold: float) -> Tensor:
    """1 inside the bounds, 0 outside."""
    return (log_rho.abs() <= math.log(threshold)).to(log_rho.dtype)


@dataclass(frozen=True)
class Correction:
    """What multiplies losses, and of what rho is the ratio."""

    level: Literal["none", "token", "sequence"]
    factors: Factors | None = None


CORRECTIONS = {
    "none": Correction("none"),
    "token_tis": Correction("token", truncated),
    "token_mask": Correction("token", masked),
    "sequence_tis": Correction("sequence", truncated),
    "sequence_mask": Correction("sequence", masked),
}


def find_correction(name: str) -> Correction:
    """Of `CORRECTIONS`, or a function of the user's, of each token. Raises `ConfigError` where there is none."""
    own = partial(Correction, "token")
    return resolve("actor.correction", name, CORRECTIONS, own, ("log_rho", "threshold"))


def token_factors(own: Tensor, behaviour: Tensor, config: ActorConfig) -> Tensor | None:
    """Of each edge, float32 [E], from two sets of log-probs; None without a token-level correction."""
    correction = find_correction(config.correction)
    if correction.level != "token" or correction.factors is None:
        return None
    return correction.factors(own - behaviour, config.correction_threshold)


def leaf_factors(
    trees: Sequence[Tree], sequences: Sequence[PackedSequence], own: Sequence[Tensor], config: ActorConfig
) -> list[np.ndarray]:
    """Of each leaf of each tree, float64[leaves], for a sequence-level correction.

    sequences: all that the trees were packed into; own: float32 [E] log-probs for each of them.
    """
    factors = find_correction(config.correction).factors
    assert factors is not None
    gaps = [[np.zeros(len(node.tokens)) for node in tree.nodes] for tree in trees]
    for sequence, logp in zip(sequences, own, strict=True):
        gap = (logp.cpu() - sequence.behaviour_logprob).double().numpy()
        # A node's edges lie together and begin with offset 0. A flat packing writes equal values repeatedly.
        keys = sequence.edge_key.numpy()
        starts = np.flatnonzero(keys[:, 2] == 0)
        for begin, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            tree, node = keys[begin, :2]
            gaps[tree][node][:] = gap[begin:end]
    return [
        _leaf_factors(tree, nodes, factors, config.correction_threshold)
        for tree, nodes in zip(trees, gaps, strict=True)
    ]


def _leaf_factors(tree: Tree, gaps: list[np.ndarray], factors: Factors, threshold: float) -> np.ndarray:
    sums = np.array([gap.sum() for gap in gaps])
    log_rho = torch.tensor([sums[tree.path(leaf.node)].sum() for leaf in tree.leaves], dtype=torch.float64)
    return factors(log_rho, threshold).numpy()
