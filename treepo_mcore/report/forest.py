"""Saved trees as the page opens them: nodes with their words, what each was worth, why paths ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treepo_mcore.config import Config, ConfigError
from treepo_mcore.data.tokenizer import Tokenizer, load_tokenizer
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.report.run import Run
from treepo_mcore.tree.files import read_trees
from treepo_mcore.tree.stats import informative
from treepo_mcore.tree.tree import PROMPT, Node, Tree

ANCHOR = "a"  # before tokens in the midst of others: SentencePiece leaves out spaces at the start of a text


def saved_trees(folder: Path) -> list[Tree]:
    """All of a step. Raises `ConfigError`."""
    try:
        return list(read_trees(folder))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def forest(run: Run, folder: Path, trees: Sequence[Tree], most: int) -> dict[str, Any]:
    """Trees of a step, JSON values: those that teach something first, at most so many."""
    worth = _worth(trees, run.config)
    order = sorted(range(len(trees)), key=lambda index: (not informative(trees[index]), index))[:most]
    words = _words(run)
    return {
        "step": int(folder.name.rpartition("_")[2]),
        "saved": len(trees),
        "trees": [_tree(trees[index], worth[index], words) for index in sorted(order)],
    }


def _tree(tree: Tree, worth: np.ndarray | None, words: Callable[[Node], list[str]]) -> dict[str, Any]:
    below = tree.leaf_counts()
    return {
        "id": tree.prompt_id,
        "prompt": str(tree.meta.get("prompt", "")),
        "answer": str(tree.meta.get("answer", "")),
        "nodes": [
            {
                "parent": node.parent,
                "depth": node.depth,
                "start": node.start,
                "leaves": int(below[number]),
                "fallback": node.from_fallback,
                "advantage": None if worth is None else round(float(worth[number]), 4),
                "words": words(node) if number != PROMPT else [],
                "size": len(node.tokens),
                "logp": [round(float(value), 2) for value in node.logprobs],
            }
            for number, node in enumerate(tree.nodes)
        ],
        "leaves": [
            {
                "node": leaf.node,
                "reason": leaf.reason,
                "reward": leaf.reward,
                "score": leaf.score,
                "correct": leaf.correct,
                "failed": leaf.failed,
                "components": leaf.components,
            }
            for leaf in tree.leaves
        ],
    }


def _worth(trees: Sequence[Tree], config: Config) -> list[np.ndarray | None]:
    """Mean advantage of each node's tokens over the leaves below; None for trees that the step did not train on."""
    kept = [index for index, tree in enumerate(trees) if informative(tree) or not config.filter.enabled]
    found: list[np.ndarray | None] = [None] * len(trees)
    values = advantages([trees[index] for index in kept], config.advantage) if kept else []
    for index, value in zip(kept, values, strict=True):
        positive, negative = value.node_sums(trees[index])
        found[index] = (positive + negative) / np.maximum(trees[index].leaf_counts(), 1)
    return found


def _words(run: Run) -> Callable[[Node], list[str]]:
    """Of a node, token by token; ids where the tokenizer is gone."""
    tokenizer = _tokenizer(run)
    if tokenizer is None:
        return lambda node: [f"⟨{token}⟩" for token in node.tokens]
    anchor = tokenizer.encode(ANCHOR)
    before = len(tokenizer.decode(anchor))
    known: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in known:
            known[token] = tokenizer.decode([*anchor, token])[before:]
        return known[token]

    return lambda node: [word(token) for token in node.tokens]


def _tokenizer(run: Run) -> Tokenizer | None:
    for place in (run.folder / "policy", Path(run.config.model.path)):
        if place.is_dir():
            return load_tokenizer(place)
    return None
