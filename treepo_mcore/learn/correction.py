"""Engine and trainer disagree a little on the policy they share: importance weights and masks for it.

rho = p(actor) / p(engine) of the old policy at a sampled token. The names follow verl's rollout correction: truncated
importance sampling (tis) caps rho, a mask drops what lies outside [1 / threshold, threshold]; token level looks at each
token, sequence level at the product along each leaf's response. Either way only the clipped loss is scaled; entropy, KL
and the normaliser stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treepo_mcore.config import ActorConfig
from treepo_mcore.records import PackedSequence
from treepo_mcore.tree.tree import Tree


def correction_factors(log_rho: Tensor, kind: str, threshold: float) -> Tensor:
    """Factors of the loss, any shape; kind: ``tis`` or ``mask``."""
    bound = math.log(threshold)
    if kind == "tis":
        return log_rho.clamp(max=bound).exp()
    return (log_rho.abs() <= bound).to(log_rho.dtype)


def token_factors(own: Tensor, behaviour: Tensor, config: ActorConfig) -> Tensor | None:
    """Of each edge, float32 [E], from two sets of log-probs; None without a token-level correction."""
    level, _, kind = config.correction.partition("_")
    if level != "token":
        return None
    return correction_factors(own - behaviour, kind, config.correction_threshold)


def leaf_factors(
    trees: Sequence[Tree], sequences: Sequence[PackedSequence], own: Sequence[Tensor], config: ActorConfig
) -> list[np.ndarray]:
    """Of each leaf of each tree, float64[leaves], for a sequence-level correction.

    sequences: all that the trees were packed into; own: float32 [E] log-probs for each of them.
    """
    kind = config.correction.partition("_")[2]
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
        _leaf_factors(tree, nodes, kind, config.correction_threshold) for tree, nodes in zip(trees, gaps, strict=True)
    ]


def _leaf_factors(tree: Tree, gaps: list[np.ndarray], kind: str, threshold: float) -> np.ndarray:
    sums = np.array([gap.sum() for gap in gaps])
    log_rho = torch.tensor([sums[tree.path(leaf.node)].sum() for leaf in tree.leaves], dtype=torch.float64)
    return correction_factors(log_rho, kind, threshold).numpy()
