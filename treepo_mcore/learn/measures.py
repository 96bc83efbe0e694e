"""What an update measures on its edges: sums that add up over micro-batches and ranks, and the means they make."""

from __future__ import annotations

import torch
from torch import Tensor

from treepo_mcore.config import LossConfig
from treepo_mcore.learn.ratios import likelihood_ratio
from treepo_mcore.records import EdgeValues

# Sums over edges, each edge counted once per leaf; `loss` is already a mean. The last one is a maximum.
NAMES = (
    "tokens",
    "loss",
    "entropy",
    "approx_kl",  # of new to old policy, k3
    "clipped",
    "ratio",
    "correction",
    "reference_kl",
    "mismatch/logprob_abs_mean",
    "mismatch/kl",  # of actor to engine, k3 on the engine's samples
    "rho",
    "rho_squared",
    "mismatch/logprob_abs_max",
)


def edge_sums(
    edges: EdgeValues,
    loss: Tensor,
    old: Tensor,
    own: Tensor,
    correction: Tensor | None,
    reference_kl: Tensor | None,
    limits: LossConfig,
) -> Tensor:
    """float64 [len(NAMES)] of one micro-batch, without gradients. All but the loss are float32 [E].

    own: log-probs of the policy that the engine should have sampled from, as the actor computes them.
    """
    sequence, logp = edges.sequence, edges.logp.detach()
    ratio = likelihood_ratio(logp, old)
    clipped = (ratio > 1 + limits.clip_high) & (sequence.adv_pos > 0)
    clipped |= (ratio < 1 - limits.clip_low) & (sequence.adv_neg < 0)
    gap = own - sequence.behaviour_logprob
    rho = gap.exp()
    one, zero = torch.ones_like(logp), torch.zeros_like(logp)
    columns = [
        one,
        zero,
        edges.entropy.detach(),
        ratio - 1 - (logp - old),
        clipped,
        ratio,
        one if correction is None else correction,
        zero if reference_kl is None else reference_kl.detach(),
        gap.abs(),
        rho - 1 - gap,
        rho,
        rho.square(),
    ]
    sums = torch.stack([column.double() for column in columns]) @ sequence.multiplicity.double()
    sums[1] = loss.detach()
    counted = gap.abs().masked_fill(sequence.multiplicity == 0, 0.0)
    return torch.cat([sums, counted.max()[None].double()])


def edge_means(sums: Tensor) -> dict[str, float]:
    """Means over the logical tokens of a whole mini-batch, from the totals of `edge_sums`."""
    values = dict(zip(NAMES, sums.tolist(), strict=True))
    tokens = max(values["tokens"], 1.0)
    kept = ("tokens", "loss", NAMES[-1])
    values = {name: value if name in kept else value / tokens for name, value in values.items()}
    rho, squared = values.pop("rho"), values.pop("rho_squared")
    # Of importance weights rho, as a share of the tokens (Kish): 1 when engine and actor agree.
    return values | {"mismatch/effective_samples": rho * rho / squared if squared else 1.0}
