"""The tree of one prompt: a node table with append-only token and log-prob arenas, leaves, JSONL in and out."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np

# Why a path ended (docs/algorithm.md 3.1).
BOXED = "boxed"  # our own stop: the token that closes a \boxed{...}
FINISHED = "boxed_and_eos"  # the model's own stop, with a box before it
EOS = "eos"  # the model's own stop, without one
LENGTH = "length"
DEPTH = "depth"
REPETITION = "repetition"
PRUNED = "pruned"
REASONS = (BOXED, FINISHED, EOS, LENGTH, DEPTH, REPETITION, PRUNED)

PROMPT = 0  # the node id of the prompt
TEXTS = ("prompt", "answer")  # in `meta`

# Who wrote a node's tokens.
POLICY = "policy"
ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """In the place of tokens that are on another rank: how many."""

    count: int

    def __len__(self) -> int:
        return self.count


@dataclass(slots=True)
class Node:
    """A run of tokens between two boundaries."""

    parent: int  # -1 for the prompt
    tokens: array[int]  # int32; of an outline `Elsewhere`
    # float32, of the sampled tokens under the tempered distribution; empty where the policy did not sample them
    logprobs: array[float]
    start: int  # position of the first token, counted from the start of the prompt
    depth: int  # segment index, 0 for the prompt; both halves of a split node keep it
    from_fallback: bool
    source: str = POLICY  # or ENVIRONMENT, as the prompt's is
    trained: bool = True  # whether the loss counts its tokens
    # Of each token, by name: numpy arrays whose first axis is the tokens (experts chosen, versions of the weights).
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def part(self, begin: int, end: int | None) -> tuple[array[int], array[float], dict[str, np.ndarray]]:
        """Copies of tokens [begin, end), their log-probs and their arrays."""
        arrays = {name: values[begin:end].copy() for name, values in self.arrays.items()}
        return self.tokens[begin:end], self.logprobs[begin:end], arrays

    @property
    def end(self) -> int:
        """One past the position of the last token."""
        return self.start + len(self.tokens)


@dataclass(slots=True)
class Leaf:
    """A finished path. Its node never has children."""

    node: int
    reason: str  # one of REASONS
    from_fallback: bool
    reward: float | None = None  # what the advantage sees
    score: float | None = None  # what the reward functions said, before any penalty
    correct: bool | None = None  # what `reward.function` said is more than 0
    text: str | None = None
    failed: bool = False  # the reward function gave no answer: the score is what `reward.failed` says
    components: dict[str, float] = field(default_factory=dict)  # of the reward, by name


class Tree:
    """All paths sampled for one prompt (docs/algorithm.md 1.1).

    A path is a node id: its tokens are the spans of its ancestors, so no context can disagree with what is stored.
    Children are kept in the order of their creation, which follows logical time; node ids and the order of `leaves`
    follow arrival. `canonical` removes that difference.
    """

    def __init__(self, prompt_id: str, prompt_tokens: Sequence[int], meta: dict[str, Any] | None = None) -> None:
        if not len(prompt_tokens):
            raise ValueError(f"prompt {prompt_id}: expected at least one token, found none")
        self.prompt_id = prompt_id
        self.meta = meta or {}
        self.nodes: list[Node] = [
            Node(-1, array("i", prompt_tokens), array("f"), 0, 0, False, source=ENVIRONMENT, trained=False)
        ]
        self.leaves: list[Leaf] = []
        self._children: list[list[int]] = [[]]
        self._leaf_at: dict[int, int] = {}  # node -> index into leaves

    @property
    def replayed(self) -> int:
        """How many of the prompt's last tokens are an earlier answer's, which this tree's answers go on from."""
        return int(self.meta.get("replayed", 0))

    def answer(self, leaf: int) -> list[int]:
        """All tokens of a leaf's answer, replayed ones included."""
        prompt = self.nodes[PROMPT]
        return [*prompt.tokens[len(prompt.tokens) - self.replayed :], *self.response(leaf)]

    # Growing.

    def add_node(self, parent: int, depth: int, from_fallback: bool = False, source: str = POLICY) -> int:
        """A new empty child of `parent`, starting where it ends now; returns its id.

        What an environment writes (`source`) is not trained.
        """
        if parent in self._leaf_at:
            raise ValueError(f"prompt {self.prompt_id}: node {parent} is a leaf and cannot have children")
        node = len(self.nodes)
        start, trained = self.nodes[parent].end, source == POLICY
        self.nodes.append(Node(parent, array("i"), array("f"), start, depth, from_fallback, source, trained))
        self._children.append([])
        self._children[parent].append(node)
        return node

    def add_leaf(self, node: int, reason: str) -> int:
        """End the path at `node`; returns the index into `leaves`."""
        if self._children[node] or node in self._leaf_at:
            raise ValueError(f"prompt {self.prompt_id}: node {node} is an inner node or already a leaf")
        self._leaf_at[node] = len(self.leaves)
        self.leaves.append(Leaf(node, reason, self.nodes[node].from_fallback))
        return self._leaf_at[node]

    def split(self, node: int, offset: int) -> int:
        """Make a boundary before token `offset` of `node`, which keeps the head; returns the new child, the tail."""
        head = self.nodes[node]
        if node == PROMPT or not 0 < offset < len(head.tokens):
            raise ValueError(f"prompt {self.prompt_id}: cannot split node {node} at {offset} of {len(head.tokens)}")
        tail = len(self.nodes)
        tokens, logprobs, arrays = head.part(offset, None)
        start = head.start + offset
        self.nodes.append(
            Node(node, tokens, logprobs, start, head.depth, head.from_fallback, head.source, head.trained, arrays)
        )
        head.tokens, head.logprobs, head.arrays = head.part(0, offset)
        self._children.append(self._children[node])
        self._children[node] = [tail]
        for child in self._children[tail]:
            self.nodes[child].parent = tail
        if node in self._leaf_at:
            index = self._leaf_at[tail] = self._leaf_at.pop(node)
            self.leaves[index].node = tail
        return tail

    def cut(self, node: int, position: int) -> int:
        """The node on the path to `node` that ends at `position` (from the start of the prompt), split if need be."""
        if not self.nodes[PROMPT].end <= position <= self.nodes[node].end:
            raise ValueError(f"prompt {self.prompt_id}: position {position} is not on the response to node {node}")
        while self.nodes[node].start >= position:
            node = self.nodes[node].parent
        if position < self.nodes[node].end:
            self.split(node, position - self.nodes[node].start)
        return node

    # Reading.

    def children(self, node: int) -> list[int]:
        """Child ids in order of creation. The list is the tree's own: read only."""
        return self._children[node]

    def leaf_at(self, node: int) -> int | None:
        """The index into `leaves` of the leaf that ends at `node`, if one does."""
        return self._leaf_at.get(node)

    def path(self, node: int) -> list[int]:
        """Node ids from the prompt to `node`, both included."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def key(self, node: int) -> tuple[int, ...]:
        """Child indices from the prompt to `node`: a name that does not depend on arrival order."""
        path = self.path(node)
        return tuple(self._children[a].index(b) for a, b in pairwise(path))

    def context(self, node: int) -> list[int]:
        """Token ids from the start of the prompt to the end of `node`."""
        return self._joined(self.path(node)).tolist()

    def response(self, leaf: int) -> list[int]:
        """Token ids of leaf number `leaf`, without the prompt."""
        return self._joined(self.path(self.leaves[leaf].node)[1:]).tolist()

    def response_logprobs(self, leaf: int) -> list[float]:
        """Log-probs of the tokens of `response` that the policy sampled, one by one."""
        joined = array("f")
        for node in self.path(self.leaves[leaf].node)[1:]:
            joined.extend(self.nodes[node].logprobs)
        return joined.tolist()

    def leaf_tokens(self, leaf: int) -> int:
        """Response length of leaf number `leaf`."""
        return self.nodes[self.leaves[leaf].node].end - self.nodes[PROMPT].end

    def trained_tokens(self, leaf: int) -> int:
        """Tokens of leaf number `leaf` that the loss counts."""
        path = [self.nodes[node] for node in self.path(self.leaves[leaf].node)]
        return sum(len(node.tokens) for node in path if node.trained)

    @property
    def unique_tokens(self) -> int:
        """Physical response tokens: each stored token once."""
        return sum(len(node.tokens) for node in self.nodes[1:])

    @property
    def logical_tokens(self) -> int:
        """Response tokens counted once per leaf."""
        return sum(self.leaf_tokens(leaf) for leaf in range(len(self.leaves)))

    def leaf_counts(self) -> np.ndarray:
        """Leaves at or below each node, int64[nodes]."""
        counts = np.zeros(len(self.nodes), dtype=np.int64)
        for leaf in self.leaves:
            counts[self.path(leaf.node)] += 1
        return counts

    def sums_below(self, values: np.ndarray) -> np.ndarray:
        """Sum of a leaf value over the leaves at or below each node, float64[nodes]."""
        sums = np.zeros(len(self.nodes))
        for leaf, value in zip(self.leaves, values, strict=True):
            sums[self.path(leaf.node)] += value
        return sums

    def masses(self, fallback: bool = True) -> np.ndarray:
        """Path mass of each leaf, the product of 1/children over its ancestors: float64[leaves], docs/algorithm.md 1.4.

        Sums to 1 once every path has ended. Without `fallback`, restarted paths have none and leave the others' as it
        was before: as restarts depend on how paths ended, only then is the mass-weighted mean over leaves an unbiased
        estimate of the mean over independent answers.
        """
        masses = np.ones(len(self.leaves))
        for index, leaf in enumerate(self.leaves):
            if leaf.from_fallback and not fallback:
                masses[index] = 0
                continue
            for node in self.path(leaf.node)[:-1]:
                children = self._children[node]
                masses[index] /= len(children) if fallback else self._grown(children)
        return masses

    def mass_of(self, node: int) -> float:
        """Product of 1/children over the ancestors of a node, restarts counted: of a leaf's, its `masses`."""
        mass = 1.0
        for above in self.path(node)[:-1]:
            mass /= len(self._children[above])
        return mass

    def _grown(self, nodes: Sequence[int]) -> int:
        """How many of them were not restarted."""
        return sum(not self.nodes[node].from_fallback for node in nodes)

    def depth_first(self) -> list[int]:
        """Node ids in depth-first order, children in order of creation."""
        order, stack = [], [PROMPT]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(self._children[node]))
        return order

    def canonical(self, without: Set[int] = frozenset()) -> Tree:
        """The same tree with nodes and leaves numbered depth first: equal trees become equal tables.

        without: leaves that are left out, and with them the nodes that lead to no other leaf. One must remain.
        """
        gone = {node for leaf in without for node in self.path(self.leaves[leaf].node)}
        gone -= {node for i, leaf in enumerate(self.leaves) if i not in without for node in self.path(leaf.node)}
        order = [node for node in self.depth_first() if node not in gone]
        number = {old: new for new, old in enumerate(order)}
        tree = Tree(self.prompt_id, self.nodes[PROMPT].tokens, self.meta)
        tree.nodes[PROMPT].arrays = self.nodes[PROMPT].arrays
        for old in order[1:]:
            node = self.nodes[old]
            new = tree.nodes[tree.add_node(number[node.parent], node.depth, node.from_fallback, node.source)]
            new.tokens, new.logprobs, new.arrays = node.part(0, None)
            new.trained = node.trained
        left = [leaf for index, leaf in enumerate(self.leaves) if index not in without]
        for leaf in sorted(left, key=lambda leaf: number[leaf.node]):
            added = tree.leaves[tree.add_leaf(number[leaf.node], leaf.reason)]
            added.reward, added.score, added.correct, added.text = leaf.reward, leaf.score, leaf.correct, leaf.text
            added.failed, added.components = leaf.failed, leaf.components
        return tree

    def outline(self) -> Tree:
        """The same tree, a few kilobytes small: without tokens, but for their numbers, log-probs, arrays and texts.

        It has everything that filter, estimators and metrics look at.
        """
        kept = {name: value for name, value in self.meta.items() if name not in TEXTS}
        tree = Tree(self.prompt_id, [0], kept)
        tree.nodes = [
            replace(node, tokens=cast("array[int]", Elsewhere(len(node.tokens))), logprobs=array("f"), arrays={})
            for node in self.nodes
        ]
        tree.leaves = [replace(leaf, text=None) for leaf in self.leaves]
        tree._children, tree._leaf_at = self._children, self._leaf_at
        return tree

    def _joined(self, path: Iterable[int]) -> array[int]:
        joined = array("i")
        for node in path:
            joined.extend(self.nodes[node].tokens)
        return joined

    # JSON.

    def to_json(self) -> dict[str, Any]:
        """The canonical tree as a mapping that `json.dumps` takes and `from_json` reads back exactly."""
        tree = self.canonical()
        return {
            "prompt_id": self.prompt_id,
            "prompt": tree.nodes[PROMPT].tokens.tolist(),
            **arrays_to_json(tree.nodes[PROMPT]),
            "meta": self.meta,
            "nodes": [
                {
                    "parent": node.parent,
                    "depth": node.depth,
                    "from_fallback": node.from_fallback,
                    "tokens": node.tokens.tolist(),
                    "logprobs": _shortest(node.logprobs),
                    **({} if node.source == POLICY else {"source": node.source}),
                    **({} if node.trained == (node.source == POLICY) else {"trained": node.trained}),
                    **arrays_to_json(node),
                }
                for node in tree.nodes[1:]
            ],
            "leaves": [
                {
                    "node": leaf.node,
                    "reason": leaf.reason,
                    "reward": leaf.reward,
                    "score": leaf.score,
                    "correct": leaf.correct,
                    "text": leaf.text,
                    **({"failed": True} if leaf.failed else {}),
                    **({"components": leaf.components} if leaf.components else {}),
                }
                for leaf in tree.leaves
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tree:
        """The inverse of `to_json`. Raises ValueError on a missing or wrong field and on a table that is no tree."""
        name, meta = get(data, "prompt_id", str), get(data, "meta", dict)
        tree = cls(name, _numbers("i", data, "prompt", ""), meta)
        tree.nodes[PROMPT].arrays = _arrays(data, len(tree.nodes[PROMPT].tokens), "prompt: ")
        for node in get(data, "nodes", list):
            tree._read_node(node, f"node {len(tree.nodes)}: ")
        for leaf in get(data, "leaves", list):
            tree._read_leaf(leaf, f"leaf {len(tree.leaves)}: ")
        for number in range(1, len(tree.nodes)):
            if not tree.children(number) and tree.leaf_at(number) is None:
                raise ValueError(f"node {number}: has no children and is no leaf")
        return tree

    def _read_node(self, data: Any, where: str) -> None:
        parent, depth = get(data, "parent", int, where), get(data, "depth", int, where)
        if not 0 <= parent < len(self.nodes):
            raise ValueError(f"{where}expected a parent in 0..{len(self.nodes) - 1}, found {parent}")
        if depth < 1:
            raise ValueError(f"{where}depth: expected 1 or more, found {depth}")
        source = get(data, "source", str, where) if "source" in data else POLICY
        if source not in (POLICY, ENVIRONMENT):
            raise ValueError(f"{where}source: expected {POLICY} or {ENVIRONMENT}, found {source!r}")
        node = self.nodes[self.add_node(parent, depth, get(data, "from_fallback", bool, where), source)]
        if "trained" in data:
            node.trained = get(data, "trained", bool, where)
        node.tokens, node.logprobs = _numbers("i", data, "tokens", where), _numbers("f", data, "logprobs", where)
        expected = len(node.tokens) if source == POLICY else 0
        if len(node.logprobs) != expected:
            raise ValueError(f"{where}{len(node.tokens)} tokens but {len(node.logprobs)} log-probs")
        if node.trained and source != POLICY:
            raise ValueError(f"{where}trained: tokens of the environment have no log-probs to train on")
        node.arrays = _arrays(data, len(node.tokens), where)

    def _read_leaf(self, data: Any, where: str) -> None:
        node, reason = get(data, "node", int, where), get(data, "reason", str, where)
        if not 0 < node < len(self.nodes):
            raise ValueError(f"{where}expected a node in 1..{len(self.nodes) - 1}, found {node}")
        if reason not in REASONS:
            raise ValueError(f"{where}expected a reason of {REASONS}, found {reason!r}")
        if self._children[node]:
            raise ValueError(f"{where}node {node} is an inner node: paths of other leaves go on there")
        if node in self._leaf_at:
            raise ValueError(f"{where}node {node} is the end of leaf {self._leaf_at[node]} already")
        number = self.add_leaf(node, reason)
        if not self.leaf_tokens(number):
            raise ValueError(f"{where}its path has no tokens")
        leaf = self.leaves[number]
        leaf.reward, leaf.score = (get(data, name, float, where, True) for name in ("reward", "score"))
        leaf.correct, leaf.text = get(data, "correct", bool, where, True), get(data, "text", str, where, True)
        leaf.failed = "failed" in data and get(data, "failed", bool, where)
        for name in get(data, "components", dict, where) if "components" in data else ():
            leaf.components[name] = get(data["components"], name, float, f"{where}components: ")


WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def get(data: Any, name: str, kind: type, where: str = "", optional: bool = False) -> Any:
    """Field `name` of a JSON object, which has to be of a type of `WORDS`, or null if `optional`.

    Raises ValueError that says `where`.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}expected an object, found {type(data).__name__}")
    if name not in data:
        raise ValueError(f"{where}missing field '{name}'")
    value = data[name]
    if value is None and optional:
        return None
    fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is float and not abs(value) <= sys.float_info.max):
        raise ValueError(f"{where}{name}: expected {WORDS[kind]}, found {value!r:.40}")
    return value


def _numbers(code: str, data: Any, name: str, where: str) -> Any:
    """A list of JSON numbers as an array of int32 ("i") or float32 ("f")."""
    try:
        return array(code, get(data, name, list, where))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where}{name}: {error}") from error


def arrays_to_json(node: Node) -> dict[str, Any]:
    """{"arrays": {name: {"dtype", "shape", "values"}}}, or nothing where there are none."""
    if not node.arrays:
        return {}
    arrays = {
        name: {"dtype": str(a.dtype), "shape": list(a.shape), "values": a.ravel().tolist()}
        for name, a in node.arrays.items()
    }
    return {"arrays": arrays}


def _arrays(data: Any, tokens: int, where: str) -> dict[str, np.ndarray]:
    """The inverse of `arrays_to_json`: numbers, one row for each token."""
    found = {}
    for name, item in (get(data, "arrays", dict, where) if "arrays" in data else {}).items():
        here = f"{where}arrays.{name}: "
        values, kind, shape = (
            get(item, "values", list, here),
            get(item, "dtype", str, here),
            get(item, "shape", list, here),
        )
        try:
            found[name] = np.array(values, dtype=kind).reshape(shape)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{here}{error}") from error
        if found[name].dtype.kind not in "biuf":
            raise ValueError(f"{here}dtype: expected a kind of number, found {kind}")
        if shape[:1] != [tokens]:
            raise ValueError(f"{here}expected a row for each of {tokens} tokens, found the shape {shape}")
    return found


def _shortest(values: array[float]) -> list[float]:
    # The shortest decimals that read back to the same float32: a third of the file size of float64 digits.
    return [float(text) for text in np.asarray(values, dtype=np.float32).astype(str)]
