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
    patience: int = Field(10, ge=0)  # steps in a row without an informative prompt, then the run stops; 0: never


class AdvantageConfig(Section):
    """Estimators over a tree's sub-groups (docs/algorithm.md 4; paper equations 5 to 7)."""

    # treepo, segment, spo, grpo, rloo, reinforce_pp_baseline, or package.module:name (docs/extending.md).
    estimator: str = "treepo"
    # The seven up to max_levels are of treepo, and refused under other estimators.
    aggregation: Literal["average", "group_size"] = "average"  # weight of the levels
    reject_uniform_subgroups: bool = False  # drop levels >= 1 whose leaves all agree (hurts: docs/algorithm.md 4.2)
    include_root: bool = True
    leave_one_out: bool = False
    distinct_groups: bool = False  # count each distinct set of leaves once
    mass_baseline: bool = False  # sub-group means weighted by path mass
    max_levels: int | None = Field(None, ge=1)  # levels used, the root's included; default: all
    mass_loss_weight: bool = False  # loss of leaf i times W m_i, in a mean with the same weights
    whiten: Literal["batch", "none"] = "batch"  # treepo, segment and reinforce_pp_baseline; the others never are
    whiten_shift: bool = True  # subtract the batch mean as well

    @model_validator(mode="after")
    def _options_of_the_estimator(self) -> AdvantageConfig:
        """An option that would change nothing is not accepted in silence."""
        for name in OF_TREEPO if self.estimator != "treepo" else ():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name}: {value} is of estimator: treepo, found estimator: {self.estimator}")
        return self


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
