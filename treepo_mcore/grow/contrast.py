"""Remembered answers with the rarer outcome, to start again behind where all answers agree (docs/algorithm.md 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treepo_mcore.config import BranchingConfig, ContrastConfig, EarlyStopConfig, FallbackConfig, TreeConfig
from treepo_mcore.tree.tree import Tree

Rare = tuple[str, bool, list[int]]  # a prompt's id, whether the answer was right, its tokens

RARE = 0.25  # of a tree's leaves at most have the rarer outcome


class RarePaths:
    """The newest rare answer to each of the last prompts that had one. Every rank holds the same."""

    def __init__(self, config: ContrastConfig) -> None:
        self._config = config
        self._paths: dict[str, tuple[bool, list[int]]] = {}  # prompt -> right, response; the newest at the end

    def found_in(self, tree: Tree) -> Rare | None:
        """What a whole tree has to remember."""
        if self._config.paths is None:
            return None
        known = [index for index, leaf in enumerate(tree.leaves) if not leaf.failed]
        right = [index for index in known if tree.leaves[index].correct]
        wrong = [index for index in known if not tree.leaves[index].correct]
        rare = min(right, wrong, key=len)
        if not 0 < len(rare) <= RARE * len(known):
            return None
        return tree.prompt_id, bool(tree.leaves[rare[0]].correct), tree.response(rare[0])

    def look(self, found: Sequence[Rare]) -> None:
        """Take a step's in, in the order of their prompts."""
        for prompt, right, tokens in found:
            self._paths.pop(prompt, None)
            self._paths[prompt] = right, tokens
        for prompt in list(self._paths)[: max(0, len(self._paths) - self._config.memory)]:
            del self._paths[prompt]

    def contradicts(self, prompt_id: str, right: bool) -> bool:
        """Whether an answer is remembered that was not `right` where all answers are, or was where none is."""
        found = self._paths.get(prompt_id)
        return found is not None and found[0] != right and bool(self.replay(prompt_id))

    def replay(self, prompt_id: str) -> list[int]:
        """The first tokens of the answer that is remembered."""
        tokens = self._paths[prompt_id][1]
        return tokens[: int(self._config.cut * len(tokens))]

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"paths": [[prompt, right, tokens] for prompt, (right, tokens) in self._paths.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._paths = {prompt: (right, tokens) for prompt, right, tokens in state["paths"]}


def shape_behind(config: TreeConfig, replayed: int) -> TreeConfig:
    """Independent answers behind the replayed tokens, which count as theirs."""
    paths = config.contrast.paths
    assert paths is not None
    return config.model_copy(
        update={
            "width": paths,
            "branching": BranchingConfig(factor=(1, 1), first=(paths, paths)),
            "max_response_tokens": config.response_tokens - replayed,
            "fallback": FallbackConfig(candidates="none"),
            "early_stop": EarlyStopConfig(),
        }
    )
