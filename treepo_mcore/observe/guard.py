"""The mismatch guard: engine and actor share a policy, and their log-probs must say so."""

from __future__ import annotations

from treepo_mcore.config import ActorConfig
from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step


class MismatchError(RuntimeError):
    """Engine and actor are further apart than `actor.max_mismatch` allows."""


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
