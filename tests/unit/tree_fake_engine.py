"""A token engine for the sampler's tests: no model, any speed, any order, every token a function of its place."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from treepo_mcore.config import TreeConfig
from treepo_mcore.grow.sampler import Actions, Request, TreeSampler, stable_seed
from treepo_mcore.grow.stopping import BoxDetector, RuleStopper
from treepo_mcore.tree.tree import Tree

EOS_TOKEN = 0
PIECES = ["<eos>", "\\bo", "xed{", "}", "{", "a", "b", "c", "\\boxed{d}", "e} "]

# (name of the node, offset in it) -> (token, log-prob)
Draw = Callable[[tuple[int, ...], int], tuple[int, float]]


def decode(tokens: list[int]) -> str:
    return "".join(PIECES[token] if token < len(PIECES) else f"<{token}>" for token in tokens)


def keyed_draw(seed: int, hazard: float = 0.05, vocabulary: int = len(PIECES)) -> Draw:
    """EOS with probability `hazard`, else any other token."""

    def draw(name: tuple[int, ...], offset: int) -> tuple[int, float]:
        rng = random.Random(stable_seed(seed, name, offset))
        token = EOS_TOKEN if rng.random() < hazard else rng.randrange(1, vocabulary)
        return token, -rng.random() * 5

    return draw


@dataclass
class _Running:
    request: Request
    name: tuple[int, ...]  # of the node that its first token would be in if it had never been suspended
    sent: int = 0  # tokens since the start of that node
    most: int = 0


class FakeEngine:
    """Delivers chunks of random size to random requests. A continuation is its node's first child."""

    def __init__(self, sampler: TreeSampler, draw: Draw, segment: int, order: random.Random, chunk: int = 3) -> None:
        self.sampler = sampler
        self.suspends = 0.0  # how likely all requests are ended and begun again before a delivery
        self.suspended = 0
        self.draw = draw
        self.segment = segment
        self.order = order
        self.chunk = chunk
        self.running: dict[str, _Running] = {}
        self.aborted: list[_Running] = []
        self.seeds: list[int] = []
        self.leaves: list[int] = []

    def run(self) -> Tree:
        self.obey(self.sampler.start())
        while not self.sampler.done:
            if self.sampler.waits:
                self.obey(self.sampler.go_on())
                continue
            if self.order.random() < self.suspends:
                self.obey(self.sampler.suspend())
                assert not self.running
                assert not self.sampler.live
                self.obey(self.sampler.resume(), resumed=True)
                self.suspended += 1
            late = self.aborted and self.order.random() < 0.2
            chosen = self.aborted.pop() if late else self.running[self.order.choice(sorted(self.running))]
            self.obey(self.deliver(chosen))
            assert self.sampler.live == len(self.running)
        assert not self.running
        return self.sampler.tree

    def deliver(self, running: _Running) -> Actions:
        tokens, logprobs, finish = [], [], None
        for _ in range(self.order.randint(1, self.chunk)):
            name = running.name + (0,) * (running.sent // self.segment)
            token, logprob = self.draw(name, running.sent % self.segment)
            tokens.append(token)
            logprobs.append(logprob)
            running.sent += 1
            if token == EOS_TOKEN:
                finish = "stop"
            elif running.sent == running.most:
                finish = "length"
            if finish:
                self.running.pop(running.request.id, None)
                break
        return self.sampler.on_tokens(running.request.id, tokens, logprobs, finish)

    def obey(self, actions: Actions, resumed: bool = False) -> None:
        tree = self.sampler.tree
        self.leaves += actions.leaves
        for request in actions.submit:
            node = tree.nodes[request.node]
            begun = len(node.tokens) if resumed else 0
            assert request.context == tree.context(request.node if resumed else node.parent)  # algorithm.md 1.1
            assert len(request.context) == node.start + begun
            assert request.id not in self.running
            assert request.max_tokens > 0
            assert 0 <= request.seed < 2**63
            self.seeds.append(request.seed)
            self.running[request.id] = _Running(request, tree.key(request.node), begun, begun + request.max_tokens)
        for request_id in actions.abort:
            self.aborted.append(self.running.pop(request_id))


def grow(
    config: TreeConfig, draw: Draw, order: int = 0, chunk: int = 3, seed: int = 0, suspends: float = 0.0
) -> tuple[Tree, FakeEngine]:
    """A whole tree under the rules of `config`, delivered in the order of seed `order`."""
    stopper = RuleStopper(config.stopping, BoxDetector(decode))
    sampler = TreeSampler(Tree("p", [7, 8, 9]), config, stopper, (seed, 1, 2))
    engine = FakeEngine(sampler, draw, config.segment_tokens, random.Random(order), chunk)
    engine.suspends = suspends
    return engine.run(), engine
