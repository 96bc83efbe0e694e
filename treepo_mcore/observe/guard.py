"""Guards: engine and actor share a policy, and their log-probs must say so; rewards must come from the function."""

from __future__ import annotations

import math

from treepo_mcore.actor.costs import in_fp8
from treepo_mcore.config import Config, FilterConfig, RewardConfig
from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step


class BadNumbersError(RuntimeError):
    """A step has spoilt the weights, or is about to; a checkpoint before it may be good (`trainer.max_rollbacks`)."""


class MismatchError(BadNumbersError):
    """Engine and actor are further apart than `actor.max_mismatch` allows."""


class RewardError(RuntimeError):
    """More calls of the reward function failed than `reward.max_failed` allows."""


class RewardGuard(Observer):
    """Ends the run, on all ranks together and before an update, where too many calls of the reward function failed."""

    def __init__(self, config: RewardConfig) -> None:
        self.bound = config.max_failed

    def sampled(self, step: Step) -> Wish:
        """Raises `RewardError`."""
        counts = step.batch.counts
        if counts.failed_rewards > self.bound * counts.rewards:
            raise RewardError(
                f"step {step.number}: {counts.failed_rewards} of {counts.rewards} calls of reward.function failed (it "
                f"raised, ran too long or ended its process; the log has the first), more than reward.max_failed = "
                f"{self.bound}"
            )
        return Wish.NOTHING


class NothingToLearnError(RuntimeError):
    """No prompt was informative in more steps in a row than `filter.patience` allows."""


class PatienceGuard(Observer):
    """Ends the run, on all ranks together, when the filter has left nothing to train on for too long."""

    def __init__(self, config: FilterConfig) -> None:
        self.patience = config.patience if config.enabled else 0
        self.accuracies: list[float] = []  # of the steps in a row that taught nothing

    def trained(self, step: Step) -> Wish:
        """Raises `NothingToLearnError`."""
        self.accuracies = [] if step.kept else [*self.accuracies, step.values["reward/accuracy"]]
        if self.patience and len(self.accuracies) >= self.patience:
            low, high = min(self.accuracies), max(self.accuracies)
            raise NothingToLearnError(
                f"step {step.number}: no prompt was informative in {len(self.accuracies)} steps in a row "
                f"(filter.patience), with an accuracy of {low:.3f} to {high:.3f}: either the prompts are too hard or "
                "too easy for this model, so that all answers to one get the same score, or the reward function does "
                "not see answers as the model writes them (look at run.dir/trees)"
            )
        return Wish.NOTHING


class SkippedGuard(Observer):
    """Ends the run, on all ranks together, after too many updates in a row whose gradient was not finite.

    Each of them left the weights as they were.
    """

    def __init__(self, most: int) -> None:
        self.most, self.row = most, 0

    def trained(self, step: Step) -> Wish:
        """Raises `BadNumbersError`."""
        for update in step.updates:
            self.row = self.row + 1 if update["skipped"] else 0
            if self.row > self.most:
                row, self.row = self.row, 0
                raise BadNumbersError(
                    f"step {step.number}: the gradient's norm is {update['grad_norm']}, {row} times in a row, more "
                    f"than actor.max_skipped = {self.most}"
                )
        return Wish.NOTHING


class EntropyGuard(Observer):
    """Ends the run, on all ranks together, where the policy has become certain of everything."""

    def __init__(self, least: float) -> None:
        self.least = least

    def trained(self, step: Step) -> Wish:
        """Raises `BadNumbersError`."""
        entropy = step.values.get("actor/entropy", math.inf)  # a step without an informative prompt has none
        if entropy < self.least:
            raise BadNumbersError(
                f"step {step.number}: the policy's entropy is {entropy:.4f} nats a token, less than "
                f"actor.min_entropy = {self.least:g}"
            )
        return Wish.NOTHING


ROUNDING = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}  # nats a token, of the coarser of the two bodies
ROUNDING_FP8 = 0.5
REASONS = (
    "rounding does not explain that. Likely reasons: a key under rollout.engine that changes what is sampled from; a "
    "model whose config.json vLLM and the actor read differently; weights that were not pushed. With "
    "actor.max_mismatch a bound of your own is kept instead, in every step"
)


def rounding_bound(config: Config) -> float:
    """Mean |log rho| that rounding may explain, in nats: several times what was measured of trained models on GPUs.

    A temperature below 1 multiplies differences of logits.
    """
    engine, sharper = config.rollout.engine, max(1.0, 1 / config.rollout.temperature)
    if in_fp8(config.actor) or engine.get("quantization") or str(engine.get("kv_cache_dtype", "")).startswith("fp8"):
        return ROUNDING_FP8 * sharper
    return max(ROUNDING[config.actor.dtype], ROUNDING[config.rollout.dtype]) * sharper


class MismatchGuard(Observer):
    """Ends the run, on all ranks together, where a mini-batch's mean |log rho| passes the bound or is no number.

    Without `actor.max_mismatch` it looks at the first step of the job alone, with `rounding_bound`: what differs there
    is no matter of training. Every rank makes one: what it looks at is the same on all of them.
    """

    def __init__(self, config: Config) -> None:
        self.bound, self.first = config.actor.max_mismatch, rounding_bound(config)
        # With the engine's log-probs as the old ones, the actor's own are known for the first update only.
        self.known = 1 if config.actor.old_logprobs == "engine" else None
        self.looked = False

    def trained(self, step: Step) -> Wish:
        """Raises `MismatchError`."""
        if self.bound is None and self.looked:
            return Wish.NOTHING
        bound = self.first if self.bound is None else self.bound
        for update in step.updates[: self.known]:
            self.looked = True
            mean = update["mismatch/logprob_abs_mean"]
            if not mean <= bound:
                why = REASONS if self.bound is None else "nothing was saved since the last checkpoint"
                than = f"{bound}" if self.bound is None else f"actor.max_mismatch = {bound}"
                raise MismatchError(
                    f"step {step.number}: the log-probs of engine and actor differ by {mean:.4f} nats on average, more "
                    f"than {than}; {why}"
                )
        return Wish.NOTHING
