"""An engine without a model for the collector's tests: one token a step for each request that has blocks."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from treepo_mcore.config import Config, parse_config
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.engine.protocol import Chunk
from treepo_mcore.grow.sampler import Request, stable_seed
from treepo_mcore.rewards.pool import Result

EOS_TOKEN = 0

# (request, tokens so far) -> the next token
Draw = Callable[[Request, int], int]


def hazard_draw(hazard: float) -> Draw:
    def draw(request: Request, position: int) -> int:
        rng = random.Random(stable_seed(request.seed, position))
        return EOS_TOKEN if rng.random() < hazard else rng.randrange(1, 50)

    return draw


@dataclass
class _Running:
    request: Request
    sent: int = 0
    blocks: int = 0  # held; 0 while waiting
    started: bool = False


@dataclass
class FakeEngine:
    """First come, first served; the newest request loses its blocks when there are none left."""

    draw: Draw
    blocks: int = 10**9
    block_tokens: int = 4
    max_requests: int = 10**9
    fail: set[str] = field(default_factory=set)  # requests that the engine aborts by itself
    requests: dict[str, _Running] = field(default_factory=dict)
    submitted: list[Request] = field(default_factory=list)
    lost: int = 0
    peak: int = 0
    held: int = 0

    def submit(self, request: Request) -> None:
        assert request.id not in self.requests
        self.requests[request.id] = _Running(request)
        self.submitted.append(request)

    def abort(self, ids: list[str]) -> None:
        for name in ids:
            running = self.requests.pop(name, None)  # it may have ended by itself in this very step
            self.held -= running.blocks if running else 0

    def free_blocks(self) -> int:
        return self.blocks - self.held

    def preemptions(self) -> int:
        return self.lost

    def step(self) -> list[Chunk]:
        chunks = []
        for running in self._scheduled():
            request, first = running.request, not running.started
            running.started = True
            token = self.draw(request, running.sent)
            running.sent += 1
            finish = "stop" if token == EOS_TOKEN else "length" if running.sent == request.max_tokens else None
            if request.id in self.fail:
                finish = "abort"
            if finish:
                self.abort([request.id])
            cached = len(request.context) // self.block_tokens * self.block_tokens if first else 0
            chunks.append(Chunk(request.id, [token], [-1.0], finish, cached))
        self.peak = max(self.peak, len(chunks))
        return chunks

    def _scheduled(self) -> list[_Running]:
        chosen: list[_Running] = []
        for running in list(self.requests.values()):
            need = -(-(len(running.request.context) + running.sent + 1) // self.block_tokens)
            if len(chosen) >= self.max_requests or not self._find(need - running.blocks, running):
                break
            self.held += need - running.blocks
            running.blocks = need
            chosen.append(running)
        return chosen

    def _find(self, need: int, wanted_by: _Running) -> bool:
        for victim in reversed(self.requests.values()):
            if need <= self.free_blocks() or victim is wanted_by:
                break
            if victim.blocks:
                self.lost += 1
                self.held -= victim.blocks
                victim.blocks = 0
        return need <= self.free_blocks()

    def sleep(self) -> None:
        raise NotImplementedError


class FakeTokenizer:
    vocab_size = 1000

    def encode(self, text: str) -> list[int]:
        return [1]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


class FakeRewards:
    """Verdicts `delay` polls late; `score(text, prompt)` decides, and NaN is a call that fails."""

    def __init__(self, score: Callable[[str, str], float], delay: int = 0) -> None:
        self.score, self.delay = score, delay
        self.pending: list[tuple[int, Result]] = []
        self.polls = 0

    def submit(self, key, response_text: str, answer: str, prompt_text: str, row: dict) -> None:
        score = float(self.score(response_text, prompt_text))
        result = Result(key, score > 0, score, None, 0.0)
        if score != score:
            result = Result(key, False, 0.0, "no answer", 0.0)
        self.pending.append((self.polls + self.delay, result))

    def poll(self) -> list[Result]:
        self.polls += 1
        due = [result for at, result in self.pending if at < self.polls]
        self.pending = [(at, result) for at, result in self.pending if at >= self.polls]
        return due

    def drain(self) -> list[Result]:
        due, self.pending = [result for _, result in self.pending], []
        return due


def make_prompts(count: int, tokens: int = 5) -> list[Prompt]:
    return [Prompt(f"p{i}", [7] * tokens, f"prompt {i}", "1", index=i) for i in range(count)]


def make_config(rollout: dict, **sections) -> Config:
    tree = {"width": 8, "segment_tokens": 4, "max_depth": 5, "stopping": {"boxed": "none", "repetition_count": 0}}
    rollout = rollout | {"tree": tree | rollout.get("tree", {})}
    return parse_config({"model": {"path": "m"}, "data": {"train": "t"}, "rollout": rollout} | sections)
