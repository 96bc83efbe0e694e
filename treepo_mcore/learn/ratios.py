"""Ratios and divergences of two policies at sampled tokens, with bounded exponents."""

from __future__ import annotations

from torch import Tensor

BOUND = 20.0  # nats, of differences of log-probs before they are exponentiated, as in verl


def likelihood_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """p(new) / p(old) at each sampled token, float32 [E]; bounded, as an infinite one times a zero gradient is NaN."""
    return (logp - old_logp).clamp(-BOUND, BOUND).exp()


def reference_kl(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) at each sampled token: >= 0, unbiased on the policy's own samples.

    float32 [E]; http://joschu.net/blog/kl-approx.html. The difference is bounded, so that one token the policy has
    given up cannot make the loss infinite.
    """
    difference = (reference_logp - logp).clamp(-BOUND, BOUND)
    return difference.exp() - 1 - difference
