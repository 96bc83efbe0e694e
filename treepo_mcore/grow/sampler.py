"""The expansion state machine of one prompt: engine events in, requests out; no engine in it (docs/algorithm.md 2).

Paths of equal depth form a wave. When all paths of a wave have reached their boundary or ended, the survivors get
their children and these are the next wave. Boundaries are those of segments, or lie where forks are planned. Under
`fork_behind` a path's request does not stop at a boundary: it is its node's first child, and siblings start from the
recorded prefix whenever the wave is complete. Leaves are counted by wave and every random draw is keyed by the wave, so
the tree does not depend on when tokens arrive: it is the one that the synchronous algorithm (`stop_and_fork`) grows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from treepo_mcore.config import TreeConfig
from treepo_mcore.grow.branching import first_children, make_allocation, total_children
from treepo_mcore.grow.fallback import plan_restarts
from treepo_mcore.grow.pruning import PathView, make_pruner
from treepo_mcore.grow.schedule import Forks
from treepo_mcore.grow.stopping import Stopper, Watch
from treepo_mcore.tree.tree import BOXED, DEPTH, LENGTH, PROMPT, PRUNED, Tree

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence for the engine: continue `context` by at most `max_tokens`."""

    id: str  # unique within the prompt, independent of arrival
    node: int  # the node of its first token
    context: list[int]
    max_tokens: int
    seed: int  # 63 bits
    temperature: float = 1.0  # 0: the most likely tokens


@dataclass(slots=True)
class Actions:
    """What the caller has to do now."""

    submit: list[Request] = field(default_factory=list)
    abort: list[str] = field(default_factory=list)  # request ids; what they still deliver is ignored
    leaves: list[int] = field(default_factory=list)  # indices into tree.leaves, finished now


@dataclass(slots=True)
class _Path:
    """A running request."""

    node: int  # being filled
    room: int  # tokens until its boundary
    watch: Watch


class TreeSampler:
    """Grows one tree to exactly W leaves; without fallback, or given back early, to at most W."""

    def __init__(
        self,
        tree: Tree,
        config: TreeConfig,
        stopper: Stopper,
        seed_key: tuple[int, ...],
        progress: float = 0.0,
        forks: Forks | None = None,
    ) -> None:
        """`tree` holds the prompt only; `seed_key` is (run seed, step, prompt number); `progress` is in [0, 1].

        forks: where they are planned; then a path's depth has no limit but that of its tokens.
        """
        self.tree = tree
        self.done = False  # the tree is complete
        self.failed = False  # a request was lost: the prompt has to be dropped
        self._config = config
        self._forks = forks
        self._deepest = config.response_tokens if forks else config.max_depth
        self._stopper = stopper
        self._seed_key = tuple(int(part) for part in seed_key)
        self._allocate = make_allocation(config.branching, progress)
        self._prune = make_pruner(config.pruning)
        self._runs_on = config.expansion == "fork_behind"
        self._limit = tree.nodes[PROMPT].end + config.response_tokens  # one past the last position of a path
        self._answer = tree.nodes[PROMPT].end - tree.replayed  # where answers begin
        self._paths: dict[str, _Path] = {}
        self._ended: set[str] = set()  # ids of requests that ended or were aborted
        self._parked: list[_Path] = []  # see `suspend`
        self._wave: list[int] = []  # nodes, in the order of their parents
        self._waves = 0  # processed
        self._arrived: set[int] = set()  # nodes that ended or reached their boundary, not yet processed
        self._leaves = 0  # F: leaves of the processed waves
        self._fell_back = False  # then widths are no longer those of the planned forks
        self._first = config.early_stop.leaves  # paths that run before all others; None behind the first look
        self._held = 0  # paths from the prompt that wait for them

    @property
    def live(self) -> int:
        """Requests running."""
        return len(self._paths)

    @property
    def waits(self) -> bool:
        """Whether the first answers are all there is, and `go_on` or `give_back` has to say what follows."""
        return self._first is not None and not self._paths and not self.failed

    def start(self) -> Actions:
        """The first paths."""
        actions = Actions()
        config = self._config
        count = self._forks[0].width if self._forks else first_children(config, self._random("first"))
        begin = count if self._first is None else min(count, self._first)
        self._held = count - begin
        self._wave = self._fork(PROMPT, begin, False, actions)
        return actions

    def go_on(self) -> Actions:
        """After the first answers: everything that waited for them."""
        actions = Actions()
        self._first = None
        self._wave += self._fork(PROMPT, self._held, False, actions)
        self._expand_complete(actions)
        return actions

    def give_back(self) -> None:
        """After the first answers: the tree is complete with them."""
        self._first = None
        self.done = True

    def on_tokens(
        self, request_id: str, tokens: Sequence[int], logprobs: Sequence[float], finish: Finish | None
    ) -> Actions:
        """The next tokens of a request, in order, with their log-probs.

        `finish` tells why the engine ended the request with the last of them, None while it runs. "stop" means that
        the last token is an EOS; it belongs to the path. An "abort" that we did not ask for fails the prompt.
        Raises KeyError on an unknown request and ValueError on tokens that no request can have.
        """
        actions = Actions()
        path = self._paths.get(request_id)
        if path is None:
            if request_id not in self._ended:
                raise KeyError(f"prompt {self.tree.prompt_id}: no request {request_id}")
            return actions
        if finish == "abort":
            self._end(request_id)
            return self.fail()
        if len(tokens) != len(logprobs) or (finish and not tokens):
            raise ValueError(
                f"request {request_id}: {len(tokens)} tokens with {len(logprobs)} log-probs, finish {finish}"
            )
        stop = path.watch.feed(tokens)
        if stop is None and finish is None and len(tokens) < path.room:  # nearly every call
            self._append(path, tokens, logprobs)
            return actions
        self._take(request_id, path, tokens, logprobs, finish, stop, actions)
        if self._first is None:
            self._expand_complete(actions)
        return actions

    def fail(self) -> Actions:
        """Give the prompt up: abort what runs."""
        self.failed = True
        actions = Actions(abort=list(self._paths))
        for request_id in actions.abort:
            self._end(request_id)
        return actions

    def suspend(self) -> Actions:
        """End all requests for now; `resume` starts them again from what they have, in another step and engine call."""
        self._parked = list(self._paths.values())
        actions = Actions(abort=list(self._paths))
        for request_id in actions.abort:
            self._end(request_id)
        return actions

    def resume(self) -> Actions:
        """Behind `suspend`. With the same weights the tree is the one that it would have been."""
        actions = Actions()
        parked, self._parked = self._parked, []
        for path in parked:
            context, done = self.tree.context(path.node), len(self.tree.nodes[path.node].tokens)
            request_id = self._name(path.node, context)
            while request_id in self._ended:  # suspended without a new token
                request_id += "'"
            self._paths[request_id] = path
            most = self._max_tokens(path.node) - done
            actions.submit.append(Request(request_id, path.node, context, most, self._seed(path.node, context)))
        return actions

    # Tokens.

    def _take(
        self,
        request_id: str,
        path: _Path,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        finish: Finish | None,
        stop: tuple[int, str] | None,
        actions: Actions,
    ) -> None:
        """Append a chunk that reaches a boundary or an end."""
        count, running = len(tokens), finish is None
        if stop is not None and stop[0] < count:
            count, finish = stop[0], None  # what the engine sampled behind our stop does not exist
        at = 0
        while at < count:
            take = min(path.room, count - at)
            self._append(path, tokens[at : at + take], logprobs[at : at + take])
            at += take
            reason = self._reason(path, finish, stop) if at == count else None
            if reason is None and path.room == 0 and self._prune and self._prune(PathView(self.tree, path.node)):
                reason = PRUNED
            if reason is not None:
                self._finish(request_id, path.node, reason, running, actions)
                return
            if path.room == 0:
                self._cross(request_id, path)

    def _append(self, path: _Path, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        node = self.tree.nodes[path.node]
        node.tokens.extend(tokens)
        node.logprobs.extend(logprobs)
        path.room -= len(tokens)

    def _reason(self, path: _Path, finish: Finish | None, stop: tuple[int, str] | None) -> str | None:
        """Why the path ends with its newest token, None if it does not: docs/algorithm.md 3.1, in this order."""
        node = self.tree.nodes[path.node]
        # A box, EOS, the response's length, the depth, a repetition, the engine's own limit; else the path lives.
        if stop is not None and stop[1] == BOXED:
            return BOXED
        if finish == "stop":
            return self._stopper.eos_reason(self._response(path.node))
        if node.end >= self._limit:
            return LENGTH
        if path.room == 0 and node.depth >= self._deepest:
            return DEPTH
        if stop is not None:
            return stop[1]
        if finish == "length" and (self._runs_on or path.room):
            # The engine's own limit. Under stop_and_fork a request ends by its length at every boundary, where there is
            # no room left in the segment: that is no end of the path.
            return LENGTH
        return None

    def _finish(self, request_id: str, node: int, reason: str, running: bool, actions: Actions) -> None:
        if running:
            actions.abort.append(request_id)
        self._end(request_id)
        actions.leaves.append(self.tree.add_leaf(node, reason))
        self._arrived.add(node)

    def _cross(self, request_id: str, path: _Path) -> None:
        """A path survived its segment."""
        self._arrived.add(path.node)
        if self._runs_on:
            path.node = self._child(path.node, self.tree.nodes[path.node].from_fallback)
            path.room = self._room(path.node)
        else:
            self._end(request_id)

    def _end(self, request_id: str) -> None:
        del self._paths[request_id]
        self._ended.add(request_id)

    # Waves.

    def _expand_complete(self, actions: Actions) -> None:
        while self._wave and self._arrived.issuperset(self._wave):
            self._expand(actions)

    def _expand(self, actions: Actions) -> None:
        """Process a complete wave (docs/algorithm.md 2.4, 2.7)."""
        self._waves += 1
        self._arrived.difference_update(self._wave)
        survivors = [node for node in self._wave if self.tree.leaf_at(node) is None]
        ended = len(self._wave) - len(survivors)
        self._leaves += ended
        rng = self._random("wave", self._waves)
        if survivors:
            self._wave = self._branch(survivors, ended, rng, actions)
        else:
            self._wave = self._fall_back(rng, actions)
        if not self._wave:
            self.done = True

    def _branch(self, survivors: list[int], ended: int, rng: random.Random, actions: Actions) -> list[int]:
        total = self._children_of_wave(ended, len(survivors), rng)
        counts = self._allocate(self.tree, survivors, total, rng)
        wave: list[int] = []
        for node, count in zip(survivors, counts, strict=True):
            siblings = count
            if self._runs_on:  # the first child runs already
                wave.append(self.tree.children(node)[0])
                siblings -= 1
            wave += self._fork(node, siblings, self.tree.nodes[node].from_fallback, actions)
        return wave

    def _children_of_wave(self, ended: int, survivors: int, rng: random.Random) -> int:
        width = self._config.width
        if self._forks is None:
            factor = rng.randint(*self._config.branching.factor)
            return total_children(width, self._leaves, ended, survivors, factor)
        if self._waves < len(self._forks) and not self._fell_back:
            width = self._forks[self._waves].width
        return max(survivors, width - self._leaves)

    def _fall_back(self, rng: random.Random, actions: Actions) -> list[int]:
        config = self._config
        factor = config.branching.factor
        missing = config.width - self._leaves
        if not missing or config.fallback.candidates == "none":
            return []
        self._fell_back = True
        wave: list[int] = []
        for restart in plan_restarts(
            self.tree, config.fallback, missing, self._deepest, lambda: rng.randint(*factor), rng
        ):
            node = self.tree.cut(self.tree.leaves[restart.leaf].node, restart.position)
            wave += self._fork(node, restart.copies, True, actions)
        return wave

    def _fork(self, parent: int, count: int, from_fallback: bool, actions: Actions) -> list[int]:
        """Start `count` new requests behind `parent`."""
        if not count:
            return []
        context = self.tree.context(parent)
        response = context[self._answer :]
        children = [self._child(parent, from_fallback) for _ in range(count)]
        for node in children:
            request_id = self._name(node, context)
            self._paths[request_id] = _Path(node, self._room(node), self._stopper.watch(response))
            most = self._max_tokens(node)
            actions.submit.append(Request(request_id, node, context, most, self._seed(node, context)))
        return children

    def _name(self, node: int, context: Sequence[int]) -> str:
        """Of a request. Splits rename paths, so that of the path alone could come twice; with the length it cannot."""
        return f"{self.tree.prompt_id}/{'.'.join(map(str, self.tree.key(node)))}@{len(context)}"

    def _seed(self, node: int, context: Sequence[int]) -> int:
        return stable_seed(self._seed_key, "request", self.tree.key(node), len(context))

    def _child(self, parent: int, from_fallback: bool) -> int:
        return self.tree.add_node(parent, self.tree.nodes[parent].depth + 1, from_fallback)

    def _room(self, node: int) -> int:
        """Tokens from the start of a node to its boundary."""
        start = self.tree.nodes[node].start
        if self._forks is None:
            return min(self._config.segment_tokens, self._limit - start)
        done = start - self.tree.nodes[PROMPT].end
        return next((fork.tokens - done for fork in self._forks if fork.tokens > done), self._limit - start)

    def _max_tokens(self, node: int) -> int:
        first = self.tree.nodes[node]
        if not self._runs_on:
            return self._room(node)
        if self._forks:
            return self._limit - first.start
        return min((self._deepest - first.depth + 1) * self._config.segment_tokens, self._limit - first.start)

    def _response(self, node: int) -> list[int]:
        return self.tree.context(node)[self._answer :]

    def _random(self, *key: object) -> random.Random:
        return random.Random(stable_seed(self._seed_key, *key))


def stable_seed(*key: object) -> int:
    """A 63-bit hash of nested tuples of ints and strings, the same in every process and version of Python."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
