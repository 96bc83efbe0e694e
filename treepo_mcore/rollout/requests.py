"""The requests that an engine runs for prompts: who owns them, what they cost, whether there is room for more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from treepo_mcore.config import TreeConfig
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.engine.protocol import Chunk, Engine
from treepo_mcore.grow.sampler import Actions, Request, TreeSampler
from treepo_mcore.records import Counts


@dataclass(slots=True)
class Growing:
    """A prompt whose tree grows, and what that cost so far."""

    number: int
    prompt: Prompt
    sampler: TreeSampler
    unscored: int = 0  # leaves
    decoded: int = 0  # tokens that the engine sampled
    context: int = 0  # tokens of the contexts of all its requests
    cached: int = 0  # of these, served by the prefix cache
    found: int = 0  # of these, prompt tokens that its first request found there, left by another prompt
    restart: bool = False  # behind a remembered answer
    goes_on_elsewhere: bool = False  # in a restart, which is reported in its place


class Requests:
    """All ranks of an engine hold the same."""

    def __init__(self, engine: Engine, config: TreeConfig, temperature: float, counts: Counts) -> None:
        """config: of the trees. counts: what the engine did is added up there."""
        self.engine, self.config, self.temperature, self.counts = engine, config, temperature, counts
        self._owner: dict[str, tuple[Growing, str]] = {}  # the engine's request id -> its prompt, the sampler's id
        self._waiting: dict[str, int] = {}  # the engine's request id -> blocks of a context it has not taken in yet

    def __len__(self) -> int:
        return len(self._owner)

    def room(self, others: int) -> bool:
        """Whether every live path, `others` trees that wait and a new one can grow by a segment in the free blocks.

        Paths end on the way, so a full cache is rare; should it fill up, the engine preempts and recomputes.
        """
        if len(self._owner) >= self.engine.max_requests:
            return False
        segment = math.ceil(self.config.segment_tokens / self.engine.block_tokens) + 1
        growth = (len(self._owner) + (1 + others) * self.config.width) * segment
        return self.engine.free_blocks() - sum(self._waiting.values()) >= growth

    def apply(self, prompt: Growing, actions: Actions) -> None:
        """End and start what a sampler asks for."""
        # A prompt can come twice in a step, and ids must not: the engine sees them with the prompt's number.
        if actions.abort:
            self._abort([f"{prompt.number}:{request}" for request in actions.abort])
        for request in actions.submit:
            self._submit(prompt, request)

    def feed(self, chunk: Chunk) -> tuple[Growing, Actions] | None:
        """New tokens to the sampler of their prompt; None where they were aborted in this very step."""
        owned = self._owner.get(chunk.request)
        if owned is None:
            return None
        prompt, request = owned
        self._waiting.pop(chunk.request, None)
        tokens = len(chunk.tokens)
        self.counts.decoded_tokens += tokens
        if not prompt.decoded:
            prompt.found = chunk.cached_tokens
        prompt.decoded += tokens
        if chunk.cached_tokens:
            self.counts.cached_tokens += chunk.cached_tokens
            prompt.cached += chunk.cached_tokens
        if chunk.finish is not None:
            del self._owner[chunk.request]
        return prompt, prompt.sampler.on_tokens(request, chunk.tokens, chunk.logprobs, chunk.finish)

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self._waiting.pop(name, None)
        self.engine.abort([name for name in names if self._owner.pop(name, None)])

    def _submit(self, prompt: Growing, request: Request) -> None:
        name, tokens = f"{prompt.number}:{request.id}", len(request.context)
        self.engine.submit(replace(request, id=name, temperature=self.temperature))
        self._owner[name] = prompt, request.id
        self.counts.requests += 1
        self.counts.context_tokens += tokens
        prompt.context += tokens
        self._waiting[name] = math.ceil(tokens / self.engine.block_tokens)
