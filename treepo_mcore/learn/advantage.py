"""Estimators over a tree's sub-groups (docs/algorithm.md 4; paper equations 5 to 7).

`raw_values` is the estimator alone; `advantages` also whitens over the batch and carries loss weights. A
trajectory estimator gives each leaf one value, a segment estimator each node one.

Paper findings: a plain average over levels beats weights by group size; rejecting uniform sub-groups hurts; leaving
out the root level changes little.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from treepo_mcore.config import AdvantageConfig, Aggregation
from treepo_mcore.learn.subtree import brownian, subtree
from treepo_mcore.records import Advantage
from treepo_mcore.registry import resolve
from treepo_mcore.tree.tree import EOS, PROMPT, Tree, get

LONGEST = 10**7  # tokens of a leaf in the plain form


@dataclass(frozen=True)
class LeafAdvantage:
    """One value per leaf, the same on all its tokens."""

    values: np.ndarray  # float64[leaves]
    weights: np.ndarray  # float64[leaves], of each leaf's loss

    def scaled(self, factors: np.ndarray) -> LeafAdvantage:
        """See `Advantage`."""
        return LeafAdvantage(self.values * factors, self.weights)

    def node_sums(self, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
        """See `Advantage`."""
        weighted = self.values * self.weights
        return tree.sums_below(np.maximum(weighted, 0)), tree.sums_below(np.minimum(weighted, 0))

    def along(self, tree: Tree, leaf: int) -> np.ndarray:
        """See `Advantage`."""
        path = tree.path(tree.leaves[leaf].node)
        return np.full(len(path), self.values[leaf] * self.weights[leaf])


@dataclass(frozen=True)
class NodeAdvantage:
    """One value per node, the same for all leaves below it."""

    values: np.ndarray  # float64[nodes]
    weights: np.ndarray  # float64[leaves], of each leaf's loss
    factors: np.ndarray | float = 1.0  # float64[leaves], of the values as each leaf sees them

    def scaled(self, factors: np.ndarray) -> NodeAdvantage:
        """See `Advantage`."""
        return NodeAdvantage(self.values, self.weights, self.factors * factors)

    def node_sums(self, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
        """See `Advantage`."""
        weighted = self.values * tree.sums_below(self.weights * self.factors)
        return np.maximum(weighted, 0), np.minimum(weighted, 0)

    def along(self, tree: Tree, leaf: int) -> np.ndarray:
        """See `Advantage`."""
        return self.values[tree.path(tree.leaves[leaf].node)] * (self.weights * self.factors)[leaf]


Values = Callable[[Tree, np.ndarray, AdvantageConfig], np.ndarray]  # (tree, rewards float64[leaves], config)


@dataclass(frozen=True)
class Estimator:
    """Values before whitening: float64[leaves], or float64[nodes] where it gives one for each node."""

    values: Values
    per_node: bool = False
    whitened: bool = True  # where advantage.whiten says so; some are defined without


def find_estimator(name: str) -> Estimator:
    """Of `ESTIMATORS`, or a function of the user's, one value a leaf. Raises `ConfigError` where there is none."""
    return resolve("advantage.estimator", name, ESTIMATORS, Estimator, ("tree", "rewards", "config"))


def advantages(
    trees: Sequence[Tree], config: AdvantageConfig, aggregation: Aggregation = "token_mean"
) -> list[Advantage]:
    """The advantages of a whole training batch, tree by tree, with the leaf weights of a loss aggregation.

    Whitening is over all response tokens of the batch, so call this before splitting into mini-batches.
    Raises ValueError when a leaf has no reward.
    """
    estimator = find_estimator(config.estimator)
    raw = [raw_values(tree, config) for tree in trees]
    if config.whiten == "batch" and estimator.whitened and raw:
        tokens = [_node_tokens(tree, config) if estimator.per_node else _response_lengths(tree) for tree in trees]
        raw = whiten(raw, tokens, config.shifted)
    kind = NodeAdvantage if estimator.per_node else LeafAdvantage
    return [kind(values, _loss_weights(tree, config, aggregation)) for tree, values in zip(trees, raw, strict=True)]


def raw_values(tree: Tree, config: AdvantageConfig) -> np.ndarray:
    """The estimator alone, before whitening: float64[leaves] or, of a segment estimator, float64[nodes]."""
    estimator = find_estimator(config.estimator)
    values = np.asarray(estimator.values(tree, _rewards(tree), config), dtype=np.float64)
    expected = (len(tree.nodes) if estimator.per_node else len(tree.leaves),)
    if values.shape != expected:
        raise ValueError(f"advantage.estimator: {config.estimator} gave the shape {values.shape}, expected {expected}")
    return values


def whiten(values: list[np.ndarray], tokens: list[np.ndarray], shift: bool) -> list[np.ndarray]:
    """Divide by the token-weighted std of the batch, after subtracting its mean if `shift` (docs/algorithm.md 4.6)."""
    flat, weights = np.concatenate(values), np.concatenate(tokens).astype(np.float64)
    total = weights.sum()
    mean = (weights * flat).sum() / total
    variance = (weights * (flat - mean) ** 2).sum() / max(total - 1, 1)
    offset = mean if shift else 0.0
    return [(part - offset) / np.sqrt(variance + 1e-8) for part in values]


def _treepo(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    levels = _ancestors(tree)
    if config.max_levels is not None:
        levels = levels[:, : config.max_levels]
    counts = tree.leaf_counts()[levels]
    used = _used_levels(tree, rewards, levels, counts, config)
    masses = tree.masses() if config.mass_baseline else np.ones(len(rewards))
    group_mass = tree.sums_below(masses)[levels]
    means = tree.sums_below(masses * rewards)[levels] / group_mass
    means[counts == 1] = 0.0  # only ever used for a prompt with a single leaf
    differences = rewards[:, None] - means
    if config.leave_one_out:
        # Without its own share, the mean moves away from the leaf by this factor.
        others = np.where(counts > 1, group_mass - masses[:, None], group_mass)
        differences *= group_mass / others
    weights = used * (counts if config.aggregation == "group_size" else 1.0)
    return (weights * differences).sum(axis=1) / weights.sum(axis=1)


def _centred(rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean() if len(rewards) > 1 else rewards  # the mean of a single leaf is taken as 0


def _grpo(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    return _centred(rewards) / ((rewards.std(ddof=1) if len(rewards) > 1 else 1.0) + 1e-6)


def _rloo(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    size = len(rewards)
    return _centred(rewards) * (size / (size - 1) if size > 1 else 1.0)


def _reinforce_pp_baseline(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    return _centred(rewards)


def _segment(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """A leaf is worth the average of (reward - ancestor's mean), weighted by group size, over all prefixes, the prompt
    and the leaf itself included; a node the mean of its children; the prompt 0."""
    return _above_parents(tree, _mean_of_children(tree, _prefix_average(tree, rewards)))


def _spo(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """A leaf is worth its reward; values are z-scored among siblings."""
    return _above_parents(tree, _among_siblings(tree, _mean_of_children(tree, rewards)))


def _above_parents(tree: Tree, values: np.ndarray) -> np.ndarray:
    """A node's value minus its parent's, 0 for the prompt. A chain without forks is one unit, with the value of its
    first node."""
    values[PROMPT] = 0.0
    worth = np.zeros(len(values))
    for node in tree.depth_first()[1:]:
        parent = tree.nodes[node].parent
        if _begins_a_unit(tree, node):
            worth[node] = values[node] - values[parent]
        else:
            values[node], worth[node] = values[parent], worth[parent]
    return worth


def _begins_a_unit(tree: Tree, node: int) -> bool:
    """Whether other leaves are below its parent, or it is the prompt or comes right behind it."""
    parent = tree.nodes[node].parent
    return parent <= PROMPT or len(tree.children(parent)) > 1


def _used_levels(
    tree: Tree, rewards: np.ndarray, levels: np.ndarray, counts: np.ndarray, config: AdvantageConfig
) -> np.ndarray:
    """Which of a leaf's levels enter its average, bool[leaves, levels]. At least one always does."""
    used = (levels != PROMPT) & (counts >= 2)  # level 0 is decided last
    if config.reject_uniform_subgroups:
        used &= _spread_below(tree, rewards)[levels] > 0
    if config.distinct_groups:
        # Groups shrink along a path: an equal count is an equal group.
        used[:, 1:] &= counts[:, 1:] < counts[:, :-1]
    used[:, 0] = True if config.include_root else ~used[:, 1:].any(axis=1)
    return used


def _ancestors(tree: Tree) -> np.ndarray:
    """Node ids from the prompt to each leaf's parent, int64[leaves, levels], padded with the prompt."""
    paths = [tree.path(leaf.node)[:-1] for leaf in tree.leaves]
    table = np.full((len(paths), max(map(len, paths))), PROMPT, dtype=np.int64)
    for row, path in zip(table, paths, strict=True):
        row[: len(path)] = path
    return table


def _spread_below(tree: Tree, rewards: np.ndarray) -> np.ndarray:
    """Largest minus smallest reward at or below each node, float64[nodes]."""
    high, low = np.full(len(tree.nodes), -np.inf), np.full(len(tree.nodes), np.inf)
    for leaf, reward in zip(tree.leaves, rewards, strict=True):
        path = tree.path(leaf.node)
        high[path] = np.maximum(high[path], reward)
        low[path] = np.minimum(low[path], reward)
    return high - low


def _prefix_average(tree: Tree, rewards: np.ndarray) -> np.ndarray:
    counts, sums = tree.leaf_counts(), tree.sums_below(rewards)
    result = np.empty(len(rewards))
    for index, leaf in enumerate(tree.leaves):
        path = [node for node in tree.path(leaf.node) if _begins_a_unit(tree, node)]
        result[index] = (counts[path] * rewards[index] - sums[path]).sum() / counts[path].sum()
    return result


def _mean_of_children(tree: Tree, leaf_values: np.ndarray) -> np.ndarray:
    values = np.zeros(len(tree.nodes))
    for node in reversed(tree.depth_first()):
        leaf = tree.leaf_at(node)
        if leaf is not None:
            values[node] = leaf_values[leaf]
        elif tree.children(node):
            values[node] = values[tree.children(node)].mean()
    return values


def _among_siblings(tree: Tree, values: np.ndarray) -> np.ndarray:
    scored = values.copy()
    for node in range(len(tree.nodes)):
        children = tree.children(node)
        if len(children) > 1:  # an only child keeps its value
            centred = values[children] - values[children].mean()
            spread = values[children].std()
            scored[children] = centred / spread if spread > 0 else centred
    return scored


def _loss_weights(tree: Tree, config: AdvantageConfig, aggregation: Aggregation) -> np.ndarray:
    weights = np.ones(len(tree.leaves))
    if config.weighted_by_mass:
        weights = _masses(tree) if config.by_mass else tree.masses() * len(tree.leaves)
    # A leaf's mean over its tokens is a sum with this weight; the sum of it over the leaf's tokens is the leaf's.
    return weights / _response_lengths(tree) if aggregation == "sequence_mean" else weights


def _rewards(tree: Tree) -> np.ndarray:
    rewards = []
    for index, leaf in enumerate(tree.leaves):
        if leaf.reward is None:
            raise ValueError(f"prompt {tree.prompt_id}: leaf {index} has no reward")
        rewards.append(leaf.reward)
    if not rewards:
        raise ValueError(f"prompt {tree.prompt_id}: no leaves")
    return np.array(rewards, dtype=np.float64)


def _response_lengths(tree: Tree) -> np.ndarray:
    lengths = [tree.trained_tokens(leaf) for leaf in range(len(tree.leaves))]
    return np.maximum(lengths, 1)  # a leaf that nothing is trained of has no say, whatever it is divided by


def _node_tokens(tree: Tree, config: AdvantageConfig) -> np.ndarray:
    """Logical tokens of each node: its length times the leaves below, by their mass where the estimator counts so; 0
    where it is not trained."""
    lengths = np.array([len(node.tokens) if node.trained else 0 for node in tree.nodes])
    return lengths * (tree.sums_below(_masses(tree)) if config.by_mass else tree.leaf_counts())


def _masses(tree: Tree) -> np.ndarray:
    """W times the mass of each leaf without fallback, float64[leaves]."""
    return tree.masses(fallback=False) * len(tree.leaves)


ESTIMATORS = {
    "treepo": Estimator(_treepo),
    "grpo": Estimator(_grpo, whitened=False),
    "rloo": Estimator(_rloo, whitened=False),
    "reinforce_pp_baseline": Estimator(_reinforce_pp_baseline),
    "segment": Estimator(_segment, per_node=True),
    "spo": Estimator(_spo, per_node=True, whitened=False),
    "subtree": Estimator(subtree, per_node=True),
    "brownian": Estimator(brownian, per_node=True),
}


def tree_from_plain(data: dict[str, Any]) -> Tree:
    """A tree from ``{"prompt_id", "leaves": [{"path": [node ids], "reward", "n_tokens"}]}``.

    Two leaves share their first k nodes iff the first k ids of their paths are equal. A path may end inside another
    one, as the released code's fallback leaves them: such a leaf ends in a node of its own behind its path, so that its
    sub-groups are those of all nodes of its path, and a segment estimator gives it one value more. The form does not
    say how long inner nodes are: they become empty and a leaf's last node holds all its tokens (of id 0). So the values
    of a segment estimator are right, but its whitening takes inner nodes to have no tokens.
    Raises ValueError, naming the leaf, on a field that is missing or wrong and on two leaves with the same path.
    """
    tree = Tree(str(data.get("prompt_id", "0")), [0])
    leaves = [_plain_leaf(leaf, _where(tree, index)) for index, leaf in enumerate(get(data, "leaves", list))]
    inner = {leaf.path[:depth] for leaf in leaves for depth in range(1, len(leaf.path))}
    numbers: dict[tuple[str, ...], int] = {(): PROMPT}
    seen: dict[tuple[str, ...], int] = {}
    for index, leaf in enumerate(leaves):
        path = leaf.path
        if seen.setdefault(path, index) != index:
            raise ValueError(f"{_where(tree, index)}path: the same as that of leaf {seen[path]}: {list(path)!r:.80}")
        for depth in range(1, len(path) + 1):
            if path[:depth] not in numbers:
                numbers[path[:depth]] = tree.add_node(numbers[path[: depth - 1]], depth)
        end = tree.add_node(numbers[path], len(path) + 1) if path in inner else numbers[path]
        node = tree.nodes[end]
        node.tokens, node.logprobs = array("i", [0]) * leaf.tokens, array("f", [0.0]) * leaf.tokens
        tree.leaves[tree.add_leaf(end, EOS)].reward = leaf.reward
    return tree


class _PlainLeaf(NamedTuple):
    path: tuple[str, ...]
    reward: float
    tokens: int


def _plain_leaf(leaf: Any, where: str) -> _PlainLeaf:
    path = tuple(str(part) for part in get(leaf, "path", list, where))
    reward, tokens = get(leaf, "reward", float, where), get(leaf, "n_tokens", int, where)
    if not path:
        raise ValueError(f"{where}path: expected at least one node id, found none")
    if not 1 <= tokens <= LONGEST:
        raise ValueError(f"{where}n_tokens: expected 1..{LONGEST}, found {tokens}")
    return _PlainLeaf(path, float(reward), tokens)


def _where(tree: Tree, leaf: int) -> str:
    return f"prompt {tree.prompt_id}: leaf {leaf}: "
