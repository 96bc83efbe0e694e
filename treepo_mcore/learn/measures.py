"""What an update measures on its edges: sums that add up over micro-batches and ranks, and the means they make."""

from __future__ import annotations

import torch
from torch import Tensor

from treepo_mcore.config import LossConfig
from treepo_mcore.learn.ratios import likelihood_ratio
from treepo_mcore.records import EdgeValues

# What is summed over edges, each edge once for each leaf; `loss` comes as a mean already.
SUMS = (
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
)
MAXIMA = ("mismatch/logprob_abs_max",)  # what is the largest over edges


def edge_sums(
    edges: EdgeValues,
    loss: Tensor,
    old: Tensor,
    own: Tensor,
    correction: Tensor | None,
    reference_kl: Tensor | None,
    limits: LossConfig,
) -> Tensor:
    """`SUMS` and then `MAXIMA` of one micro-batch, float64 and without gradients. All but the loss are float32 [E].

    old: log-probs that ratios are taken against. own: log-probs, as the actor computes them, of the policy that the
    engine should have sampled from: the old ones, but for `old_logprobs: engine`, where the actor's own are new.
    """
    sequence, logp = edges.sequence, edges.logp.detach()
    ratio = likelihood_ratio(logp, old)
    clipped = (ratio > 1 + limits.clip_high) & (sequence.adv_pos > 0)
    clipped |= (ratio < 1 - limits.clip_low) & (sequence.adv_neg < 0)
    gap = own - sequence.behaviour_logprob
    rho = gap.exp()
    one, zero = torch.ones_like(logp), torch.zeros_like(logp)
    columns = {
        "tokens": one,
        "loss": zero,  # is no sum over edges; put in below
        "entropy": edges.entropy.detach(),
        "approx_kl": ratio - 1 - (logp - old),
        "clipped": clipped,
        "ratio": ratio,
        "correction": one if correction is None else correction,
        "reference_kl": zero if reference_kl is None else reference_kl.detach(),
        "mismatch/logprob_abs_mean": gap.abs(),
        "mismatch/kl": rho - 1 - gap,
        "rho": rho,
        "rho_squared": rho.square(),
    }
    sums = torch.stack([columns[name].double() for name in SUMS]) @ sequence.multiplicity.double()
    sums[SUMS.index("loss")] = loss.detach()
    counted = gap.abs().masked_fill(sequence.multiplicity == 0, 0.0)
    maxima = {"mismatch/logprob_abs_max": counted.max().double()}
    return torch.cat([sums, torch.stack([maxima[name] for name in MAXIMA])])


def edge_means(totals: Tensor) -> dict[str, float]:
    """Means over the logical tokens of a whole mini-batch, from the totals of `edge_sums`."""
    values = dict(zip(SUMS + MAXIMA, totals.tolist(), strict=True))
    tokens = max(values["tokens"], 1.0)
    as_they_are = ("tokens", "loss", *MAXIMA)
    values = {name: value if name in as_they_are else value / tokens for name, value in values.items()}
    rho, squared = values.pop("rho"), values.pop("rho_squared")
    # Of importance weights rho, as a share of the tokens (Kish): 1 when engine and actor agree.
    return values | {"mismatch/effective_samples": rho * rho / squared if squared else 1.0}
