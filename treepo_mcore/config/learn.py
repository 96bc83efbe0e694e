"""The algorithm: filter, advantages, loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from treepo_mcore.config.base import Section

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]
OF_TREEPO = (
    "aggregation",
    "reject_uniform_subgroups",
    "include_root",
    "leave_one_out",
    "distinct_groups",
    "mass_baseline",
    "max_levels",
)


class FilterConfig(Section):
    """Dynamic sampling (DAPO): prompts whose leaves all have the same score teach nothing and are replaced."""

    enabled: bool = True
    max_prompts_factor: float = Field(3.0, ge=1)  # draw at most this many times `prompts_per_step`
    # A prompt whose leaves all had the same score is passed over in the next epoch, then, each time that they agree
    # again, in twice as many epochs as before, at most in so many; 0: never (docs/algorithm.md 2.12).
    longest_rest: int = Field(0, ge=0)
    patience: int = Field(10, ge=0)  # steps in a row without an informative prompt, then the run stops; 0: never


BY_MASS = ("subtree", "brownian")


class AdvantageConfig(Section):
    """Estimators over a tree's sub-groups (docs/algorithm.md 4; paper equations 5 to 7)."""

    # treepo, subtree, brownian, segment, spo, grpo, rloo, reinforce_pp_baseline, or package.module:name
    # (docs/extending.md).
    estimator: str = "treepo"
    # The seven up to max_levels are of treepo, and refused under other estimators.
    aggregation: Literal["average", "group_size"] = "average"  # weight of the levels
    reject_uniform_subgroups: bool = False  # drop levels >= 1 whose leaves all agree (hurts: docs/algorithm.md 4.2)
    include_root: bool = True
    leave_one_out: bool = False
    distinct_groups: bool = False  # count each distinct set of leaves once
    mass_baseline: bool = False  # sub-group means weighted by path mass
    max_levels: int | None = Field(None, ge=1)  # levels used, the root's included; default: all
    # Of subtree, what a node's value is compared with, always without the node's own leaves. mean: the plain mean over
    # its forked ancestors; kin: shrunk towards the nearest; sibling: the nearest alone; blup: the best linear
    # prediction if a reward is a sum of independent increments, one a token.
    baseline: Literal["mean", "kin", "sibling", "blup"] = "mean"
    # Loss of leaf i times W m_i, in a mean with the same weights. Default: under subtree and brownian, which are
    # unbiased with these weights only; there leaves behind a fallback have none.
    mass_loss_weight: bool | None = None
    whiten: Literal["batch", "none"] = "batch"  # grpo, rloo and spo never are
    whiten_shift: bool | None = None  # subtract the batch mean as well; default: but under subtree and brownian

    @model_validator(mode="after")
    def _options_of_the_estimator(self) -> AdvantageConfig:
        """An option that would change nothing is not accepted in silence."""
        for name in OF_TREEPO if self.estimator != "treepo" else ():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name}: {value} is of estimator: treepo, found estimator: {self.estimator}")
        if self.baseline != "mean" and self.estimator != "subtree":
            raise ValueError(f"baseline: {self.baseline} is of estimator: subtree, found estimator: {self.estimator}")
        if self.by_mass and self.mass_loss_weight is False:
            raise ValueError(f"mass_loss_weight: estimator: {self.estimator} needs true, found false")
        return self

    @property
    def by_mass(self) -> bool:
        """Whether the estimator counts leaves by their mass without fallback."""
        return self.estimator in BY_MASS

    @property
    def weighted_by_mass(self) -> bool:
        """Whether a leaf's loss is multiplied by W times its mass."""
        return self.by_mass if self.mass_loss_weight is None else self.mass_loss_weight

    @property
    def shifted(self) -> bool:
        """Whether whitening subtracts the mean of the batch."""
        return not self.by_mass if self.whiten_shift is None else self.whiten_shift


class LossConfig(Section):
    """The clipped policy loss (docs/algorithm.md 5)."""

    # What the token losses of a mini-batch are averaged over. token_mean: its tokens, each once per leaf (DAPO);
    # sequence_mean: leaves, of each leaf's mean (GRPO); fixed_length: leaves, of each leaf's sum divided by the
    # longest response allowed (Dr. GRPO).
    aggregation: Aggregation = "token_mean"
    form: str = "clip"  # of a token's loss: clip-higher with dual clip, or package.module:name (docs/extending.md)
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float = Field(10.0, gt=1)
    entropy_coef: float = 0.0
    kl_coef: float = Field(0.0, ge=0)  # of the k3 estimate of the KL divergence to `actor.reference`
