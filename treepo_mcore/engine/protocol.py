"""What the sampler needs of an inference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from treepo_mcore.grow.sampler import Finish, Request


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request."""

    request: str
    tokens: list[int]
    logprobs: list[float]  # of the sampled tokens, natural log, under the tempered distribution
    finish: Finish | None  # None while running, else "stop" (the last token is an EOS id), "length", "abort" (lost)
    cached_tokens: int  # context tokens served by the prefix cache; on a request's first chunk, else 0


class Engine(Protocol):
    """An engine over `rollout.tp` ranks; all of them make the same calls in the same order."""

    def submit(self, request: Request) -> None:
        """Queue a request; it starts with the next step."""

    def abort(self, ids: list[str]) -> None:
        """Stop requests; they give no more chunks."""

    def step(self) -> list[Chunk]:
        """One forward pass over everything that runs."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV-cache block."""

    @property
    def max_requests(self) -> int:
        """Requests that can run at once; more of them wait inside the engine."""

    def free_blocks(self) -> int:
        """KV-cache blocks that no running request holds, cached prefixes of ended ones included."""

    def preemptions(self) -> int:
        """Times that a running request lost its blocks and had to start over, since the engine was built."""

    def sleep(self) -> None:
        """Give the device's memory to the trainer."""

    def wake_weights(self) -> None:
        """Take memory for the weights back, without values: a push writes all of them."""

    def wake_cache(self) -> None:
        """Take the rest back; cached prefixes are dropped."""
