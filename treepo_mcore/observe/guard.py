"""Guards: engine and actor share a policy, and their log-probs must say so; rewards must come from the function."""

from __future__ import annotations

from treepo_mcore.config import ActorConfig, FilterConfig, RewardConfig
from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step


class MismatchError(RuntimeError):
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


class MismatchGuard(Observer):
    """Ends the run, on all ranks together, where a mini-batch's mean |log rho| passes the bound or is no number.

    Every rank makes one: what it looks at is the same on all of them.
    """

    def __init__(self, config: ActorConfig) -> None:
        self.bound = config.max_mismatch
        # With the engine's log-probs as the old ones, the actor's own are known for the first update only.
        self.known = 1 if config.old_logprobs == "engine" else None

    def trained(self, step: Step) -> Wish:
        """Raises `MismatchError`."""
        for update in step.updates[: self.known]:
            mean = update["mismatch/logprob_abs_mean"]
            if self.bound is not None and not mean <= self.bound:
                raise MismatchError(
                    f"step {step.number}: the log-probs of engine and actor differ by {mean:.4f} nats on average, more "
                    f"than actor.max_mismatch = {self.bound}; nothing was saved since the last checkpoint"
                )
        return Wish.NOTHING
