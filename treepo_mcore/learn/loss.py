"""What an update minimises: the clipped policy loss on trees, and the supervised one.

An objective is given to `Actor.update`, which knows nothing of it but `records.Objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from treepo_mcore.config import ActorConfig, LossConfig
from treepo_mcore.learn.correction import token_factors
from treepo_mcore.learn.measures import MAXIMA, SUMS, edge_means, edge_sums
from treepo_mcore.learn.ratios import likelihood_ratio, reference_kl
from treepo_mcore.records import EdgeValues
from treepo_mcore.registry import resolve


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped loss of all leaves below each edge, with entropy, KL and a token-level correction."""

    config: ActorConfig
    sums: tuple[str, ...] = SUMS
    maxima: tuple[str, ...] = MAXIMA

    @property
    def entropy_grad(self) -> bool:
        """See `records.Objective`."""
        return bool(self.config.loss.entropy_coef)

    def __call__(self, edges: EdgeValues, normaliser: float) -> tuple[Tensor, Tensor]:
        """See `records.Objective`."""
        assert edges.old_logp is not None
        s, old = edges.sequence, edges.old_logp
        own = edges.logp.detach() if self.config.old_logprobs == "engine" else old
        correction = token_factors(own, s.behaviour_logprob, self.config)
        factor = 1.0 if correction is None else correction
        kl = None if edges.reference_logp is None else reference_kl(edges.logp, edges.reference_logp)
        good, bad = s.adv_pos * factor, s.adv_neg * factor
        loss = policy_loss(edges.logp, old, good, bad, edges.entropy, s.weight, self.config.loss, kl) / normaliser
        return loss, edge_sums(edges, loss, old, own, correction, kl, self.config.loss)

    def means(self, totals: Tensor) -> dict[str, float]:
        """See `records.Objective`."""
        return edge_means(totals)


@dataclass(frozen=True)
class SupervisedObjective:
    """The negative log-likelihood of what the sequences hold."""

    sums: tuple[str, ...] = SUMS
    maxima: tuple[str, ...] = MAXIMA
    entropy_grad: bool = False

    def __call__(self, edges: EdgeValues, normaliser: float) -> tuple[Tensor, Tensor]:
        """See `records.Objective`."""
        logp = edges.logp.detach()
        loss = nll_loss(edges.logp, edges.sequence.weight) / normaliser
        return loss, edge_sums(edges, loss, logp, logp, None, None, LossConfig())  # no ratio leaves any bounds

    def means(self, totals: Tensor) -> dict[str, float]:
        """See `records.Objective`."""
        return edge_means(totals)


def clipped(logp: Tensor, old_logp: Tensor, adv_pos: Tensor, adv_neg: Tensor, config: LossConfig) -> Tensor:
    """The clip-higher, dual-clip loss of all leaves below each edge (docs/algorithm.md 5.2, 5.3), all float32 [E].

    A token shared by several leaves has one ratio, so its loss needs only the sums of their positive and of their
    negative advantages.
    """
    ratio = likelihood_ratio(logp, old_logp)
    gain = adv_pos * ratio.clamp(max=1 + config.clip_high)
    loss = adv_neg * ratio.clamp(min=1 - config.clip_low).clamp(max=config.dual_clip)
    return -(gain + loss)


Form = Callable[[Tensor, Tensor, Tensor, Tensor, LossConfig], Tensor]  # see `clipped`
LOSSES: dict[str, Form] = {"clip": clipped}


def find_loss(name: str) -> Form:
    """Of `LOSSES`, or a function of the user's. Raises `ConfigError` where there is none."""
    parameters = ("logp", "old_logp", "adv_pos", "adv_neg", "config")
    return resolve("actor.loss.form", name, LOSSES, lambda function: function, parameters)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv_pos: Tensor,
    adv_neg: Tensor,
    entropy: Tensor,
    weight: Tensor,
    config: LossConfig,
    kl: Tensor | None = None,
) -> Tensor:
    """Sum over edges of the configured form, with entropy and KL, all float32 [E].

    Entropy and KL (see `reference_kl`) count with the sum of the leaves' weights.
    """
    total = find_loss(config.form)(logp, old_logp, adv_pos, adv_neg, config).sum()
    if config.entropy_coef:
        total = total - config.entropy_coef * (entropy * weight).sum()
    if kl is not None:
        total = total + config.kl_coef * (kl * weight).sum()
    return total


def nll_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Supervised loss, summed over edges and leaves."""
    return -(logp * weight).sum()
