"""Pruning rules."""

import pytest

from treepo_mcore.config import PruningConfig
from treepo_mcore.grow.pruning import PathView, make_pruner
from treepo_mcore.tree.tree import Tree


def two_segments() -> PathView:
    tree = Tree("p", [1, 2])
    for parent, tokens, logprobs in ((0, [3, 4], [-1.0, -2.0]), (1, [5], [-6.0])):
        node = tree.nodes[tree.add_node(parent, parent + 1)]
        node.tokens.extend(tokens)
        node.logprobs.extend(logprobs)
    return PathView(tree, 2)


def ends_in_five(view: PathView) -> bool:
    return view.response()[-1] == 5


def test_a_view_shows_the_whole_path():
    assert two_segments().response() == [3, 4, 5]
    assert two_segments().mean_logprob() == pytest.approx(-3.0)


def test_no_rules_no_pruner():
    assert make_pruner(PruningConfig()) is None


@pytest.mark.parametrize(("minimum", "expected"), [(-2.9, True), (-3.1, False)])
def test_mean_logprob(minimum, expected):
    prune = make_pruner(PruningConfig(min_mean_logprob=minimum))
    assert prune is not None
    assert prune(two_segments()) is expected


def test_a_function_of_the_user():
    prune = make_pruner(PruningConfig(min_mean_logprob=-9.0, function=f"{__name__}:ends_in_five"))
    assert prune is not None
    assert prune(two_segments())


@pytest.mark.parametrize("name", ["no.such.module:f", f"{__name__}:missing", "json", f"{__name__}:__doc__"])
def test_a_function_that_is_not_there(name):
    with pytest.raises(ValueError, match=r"rollout.tree.pruning.function: .*" + name):
        make_pruner(PruningConfig(function=name))
