"""The node table: growing, splitting, reading, JSONL."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tree_fake_engine import grow, keyed_draw
from trees import random_tree, with_turns

from treepo_mcore.config import AdvantageConfig, TreeConfig
from treepo_mcore.learn.advantage import ESTIMATORS, advantages
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.observe.metrics import rollout_metrics
from treepo_mcore.records import Batch, Counts
from treepo_mcore.tree.files import read_trees, write_trees
from treepo_mcore.tree.stats import tree_stats
from treepo_mcore.tree.tree import EOS, Tree


def fork() -> Tree:
    """Prompt [1, 2]; node 1 [10..13] with children 2 [20, 21] and 3 [30]."""
    tree = Tree("p", [1, 2], {"answer": "x"})
    for parent, tokens in ((0, [10, 11, 12, 13]), (1, [20, 21]), (1, [30])):
        node = tree.nodes[tree.add_node(parent, tree.nodes[parent].depth + 1)]
        node.tokens.extend(tokens)
        node.logprobs.extend(-token / 7 for token in tokens)
    tree.add_leaf(2, EOS)
    tree.add_leaf(3, EOS)
    return tree


def test_reading_paths():
    tree = fork()
    assert tree.path(3) == [0, 1, 3]
    assert tree.key(3) == (0, 1)
    assert tree.context(1) == [1, 2, 10, 11, 12, 13]
    assert tree.response(0) == [10, 11, 12, 13, 20, 21]
    assert tree.response_logprobs(1) == pytest.approx([-10 / 7, -11 / 7, -12 / 7, -13 / 7, -30 / 7])
    assert [tree.leaf_tokens(leaf) for leaf in (0, 1)] == [6, 5]
    assert (tree.unique_tokens, tree.logical_tokens) == (7, 11)
    assert tree.leaf_counts().tolist() == [2, 2, 1, 1]
    np.testing.assert_array_equal(tree.masses(), [0.5, 0.5])


def test_split_of_an_inner_node_keeps_every_path():
    tree, before = fork(), fork()
    tail = tree.split(1, 3)
    assert tree.children(1) == [tail]
    assert tree.children(tail) == [2, 3]
    assert (tree.nodes[tail].start, tree.nodes[tail].depth) == (5, 1)
    for leaf in (0, 1):
        assert tree.response(leaf) == before.response(leaf)
        assert tree.response_logprobs(leaf) == before.response_logprobs(leaf)
    np.testing.assert_array_equal(tree.masses(), before.masses())


def test_split_of_a_leaf_moves_the_leaf():
    tree = fork()
    tail = tree.split(2, 1)
    assert tree.leaves[0].node == tail
    assert tree.leaf_at(2) is None
    assert tree.leaf_at(tail) == 0
    assert tree.response(0) == fork().response(0)


@pytest.mark.parametrize(("node", "offset"), [(1, 0), (1, 4), (0, 1)])
def test_split_at_an_end_is_an_error(node, offset):  # removing nothing must not empty anything
    with pytest.raises(ValueError, match="cannot split"):
        fork().split(node, offset)


@pytest.mark.parametrize(
    ("position", "context"),
    [(2, [1, 2]), (4, [1, 2, 10, 11]), (6, [1, 2, 10, 11, 12, 13]), (8, [1, 2, 10, 11, 12, 13, 20, 21])],
)
def test_cut_ends_where_it_should(position, context):
    tree = fork()
    node = tree.cut(2, position)
    assert tree.context(node) == context
    assert len(tree.nodes) == (5 if position == 4 else 4)


@pytest.mark.parametrize("position", [1, 9])
def test_cut_outside_the_response_is_an_error(position):
    with pytest.raises(ValueError, match="is not on the response"):
        fork().cut(2, position)


def test_a_leaf_has_no_children():
    tree = fork()
    with pytest.raises(ValueError, match="node 2 is a leaf"):
        tree.add_node(2, 3)
    with pytest.raises(ValueError, match="node 1 is an inner node"):
        tree.add_leaf(1, EOS)
    with pytest.raises(ValueError, match="already a leaf"):
        tree.add_leaf(2, EOS)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        Tree("p", [])


def test_canonical_is_depth_first_and_keeps_results():
    tree = Tree("p", [1])
    for parent, token in ((0, 5), (0, 6), (1, 7)):
        node = tree.nodes[tree.add_node(parent, tree.nodes[parent].depth + 1)]
        node.tokens.append(token)
        node.logprobs.append(-1.0)
    tree.leaves[tree.add_leaf(2, EOS)].reward = 2.0
    tree.leaves[tree.add_leaf(3, EOS)].reward = 3.0
    canonical = tree.canonical()
    assert [list(node.tokens) for node in canonical.nodes] == [[1], [5], [7], [6]]
    assert [(leaf.node, leaf.reward) for leaf in canonical.leaves] == [(2, 3.0), (3, 2.0)]
    assert canonical.to_json() == tree.to_json()


def test_jsonl_round_trip_is_exact(tmp_path):
    config = TreeConfig.model_validate({"width": 8, "segment_tokens": 3, "fallback": {"cut": "min_logprob_token"}})
    trees = [fork()] + [grow(config, keyed_draw(seed, 0.3), order=seed)[0] for seed in range(10)]
    leaf = trees[1].leaves[0]
    leaf.reward, leaf.score, leaf.correct, leaf.text = 0.5, 0.75, True, "ä\n\ud83d"  # half a surrogate pair, too
    file = tmp_path / "trees.jsonl"
    write_trees(file, trees)
    for tree, back in zip(trees, read_trees(file), strict=True):
        assert back.to_json() == tree.to_json()
        for one, other in zip(tree.canonical().nodes, back.nodes, strict=True):
            assert one == other
        assert tree.canonical().leaves == back.leaves


def test_parquet_round_trip_is_exact(tmp_path):
    """Also trees with turns, arrays and no leaf; more than a row group."""
    config = TreeConfig.model_validate({"width": 8, "segment_tokens": 3, "fallback": {"cut": "min_logprob_token"}})
    trees = [fork(), with_turns()] + [grow(config, keyed_draw(seed, 0.3), order=seed)[0] for seed in range(40)]
    leaf = trees[2].leaves[0]
    leaf.reward, leaf.score, leaf.correct, leaf.text, leaf.failed = 0.5, 0.75, True, "ä\n", True
    trees[3].leaves[0].components = {"format": 0.5}
    trees[3].meta = {"row": {"text": "\ud83d", "list": [1, None]}}
    for node in trees[1].nodes:
        node.arrays = {"experts": np.arange(2 * len(node.tokens), dtype=np.int16).reshape(-1, 2)}
    file = tmp_path / "trees.parquet"
    write_trees(file, trees)
    for tree, back in zip(trees, read_trees(file), strict=True):
        assert back.to_json() == tree.to_json()
        for one, other in zip(tree.canonical().nodes, back.nodes, strict=True):
            assert one.logprobs == other.logprobs
        assert tree.canonical().leaves == back.leaves
    write_trees(file, [])
    assert list(read_trees(file)) == []


def test_a_row_that_is_no_tree_is_named(tmp_path):
    file = tmp_path / "trees.parquet"
    write_trees(file, [fork(), fork()])
    columns = pyarrow.parquet.read_table(file).to_pydict()
    schema = pyarrow.parquet.read_schema(file)
    for name, value, message in [
        ("node_parent", [0, 2, 1], r":2: node 2: expected a parent in 0..1, found 2"),
        ("node_tokens", [1, 1, 1], r":2: 3 tokens in nodes, "),
        ("meta", None, r":2: meta: found null"),
    ]:
        bad = columns | {name: [columns[name][0], value]}
        pyarrow.parquet.write_table(pyarrow.table(bad, schema=schema), file)
        trees = read_trees(file)
        with pytest.raises(ValueError, match=message):
            list(trees)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"]}), file)
    with pytest.raises(ValueError, match="expected columns of saved trees, missing prompt_id, meta, "):
        list(read_trees(file))
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"trees\.parquet: not valid parquet"):
        list(read_trees(file))


def test_an_outline_is_small_and_has_the_shape():
    config = TreeConfig.model_validate({"width": 8, "segment_tokens": 30})
    tree = grow(config, keyed_draw(0, 0.01))[0]
    tree.meta = {"prompt": "long", "answer": "7", "number": 3}
    for index, leaf in enumerate(tree.leaves):
        leaf.reward, leaf.score, leaf.correct, leaf.text = float(index % 2), float(index % 2), index % 2 == 1, "text"
    outline = tree.outline()
    assert outline.meta == {"number": 3}
    assert tree_stats([outline]) == tree_stats([tree])
    for one, other in zip(advantages([outline], AdvantageConfig()), advantages([tree], AdvantageConfig()), strict=True):
        assert one.along(outline, 0).tolist() == other.along(tree, 0).tolist()
    assert [leaf.text for leaf in outline.leaves] == [None] * 8
    assert len(pickle.dumps(outline)) < len(pickle.dumps(tree)) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("leaves"), "missing field 'leaves'"),
        (lambda data: data["nodes"][1].update(parent=2), r"node 2: expected a parent in 0..1, found 2"),
        (lambda data: data["nodes"][1].update(logprobs=[]), "2 tokens but 0 log-probs"),
        (lambda data: data["nodes"][1].update(tokens=["a"]), "node 2: tokens: "),
        (lambda data: data["nodes"][1].update(tokens=[3 * 10**9, 1]), "node 2: tokens: signed integer is greater"),
        (lambda data: data["nodes"][1].update(tokens="ab"), "node 2: tokens: expected a list, found 'ab'"),
        (lambda data: data["nodes"][1].update(logprobs=[None, 1]), "node 2: logprobs: "),
        (lambda data: data["nodes"][1].update(depth="x"), "node 2: depth: expected an integer, found 'x'"),
        (lambda data: data["nodes"][1].update(depth=0), "node 2: depth: expected 1 or more, found 0"),
        (lambda data: data["nodes"][1].update(from_fallback=1), "node 2: from_fallback: expected true or false"),
        (lambda data: data["nodes"].append(data["nodes"][1]), "node 4: has no children and is no leaf"),
        (lambda data: data["nodes"].append(7), "node 4: expected an object, found int"),
        (
            lambda data: [node.update(tokens=[], logprobs=[]) for node in data["nodes"]],
            "leaf 0: its path has no tokens",
        ),
        (lambda data: data.update(meta=None), "meta: expected an object, found None"),
        (lambda data: data["leaves"][1].update(reward="x"), "leaf 1: reward: expected a finite number, found 'x'"),
        (lambda data: data["leaves"][1].update(reward=float("nan")), "NaN is no JSON"),
        (lambda data: data["leaves"][1].update(score=True), "leaf 1: score: expected a finite number, found True"),
        (lambda data: data["leaves"][1].update(correct=1), "leaf 1: correct: expected true or false, found 1"),
        (lambda data: data["leaves"][1].update(text=[]), r"leaf 1: text: expected a string, found \[\]"),
        (lambda data: data["leaves"][0].update(node=1), "node 1 is an inner node"),
        (lambda data: data["leaves"][0].update(node=0), "expected a node in 1..3"),
        (lambda data: data["leaves"][0].update(reason="tired"), "found 'tired'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, change, message):
    good, bad = fork().to_json(), fork().to_json()
    change(bad)
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    trees = read_trees(file)
    next(trees)
    with pytest.raises(ValueError, match=rf"trees.jsonl:2: .*{message}"):
        next(trees)


@pytest.mark.parametrize("line", ["{", "[]", "3"])
def test_a_line_that_is_no_tree_is_named(tmp_path, line):
    file = tmp_path / "trees.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"trees.jsonl:1: "):
        list(read_trees(file))


def test_what_the_environment_wrote_is_not_trained():
    tree = with_turns()
    assert [node.trained for node in tree.nodes] == [False, True, False, True, True]
    assert [tree.leaf_tokens(leaf) for leaf in range(2)] == [8, 9]
    assert [tree.trained_tokens(leaf) for leaf in range(2)] == [5, 6]
    assert tree.response_logprobs(0) == [-0.5] * 5


def test_arrays_are_split_and_saved_with_their_tokens():
    tree = with_turns()
    tail = tree.split(1, 3)
    assert tree.nodes[1].arrays["experts"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert tree.nodes[tail].arrays["experts"].tolist() == [[6, 7]]
    assert tree.nodes[tail].arrays["version"].tolist() == [1]
    again = Tree.from_json(json.loads(json.dumps(tree.to_json())))
    assert again.to_json() == tree.to_json()
    for one, other in zip(tree.canonical().nodes, again.nodes, strict=True):
        assert (one.source, one.trained) == (other.source, other.trained)
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
        assert all(one.arrays[name].dtype == other.arrays[name].dtype for name in one.arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "teacher"}, "node 1: source: expected policy or environment, found 'teacher'"),
        ({"source": "environment"}, "node 1: 4 tokens but 4 log-probs"),
        (
            {"arrays": {"v": {"dtype": "int64", "shape": [3], "values": [1, 2, 3]}}},
            "arrays.v: expected a row",
        ),
        ({"arrays": {"v": {"dtype": "object", "shape": [4], "values": [1, 2, 3, 4]}}}, "arrays.v: dtype: expected"),
        ({"arrays": {"v": {"dtype": "int64", "shape": [4], "values": [1, 2, 3]}}}, "arrays.v: cannot reshape"),
    ],
)
def test_turns_that_do_not_fit_are_named(change, message):
    data = with_turns().to_json()
    data["nodes"][0] |= change
    with pytest.raises(ValueError, match=message):
        Tree.from_json(data)


def without(data, leaf):
    """The saved tree without a leaf, and without the nodes that led to it alone."""
    nodes, leaves = data["nodes"], [dict(item) for i, item in enumerate(data["leaves"]) if i != leaf]
    needed = set()
    for item in leaves:
        node = item["node"]
        while node:
            needed.add(node)
            node = nodes[node - 1]["parent"]
    number = {0: 0} | {old: new for new, old in enumerate(sorted(needed), 1)}
    kept = [nodes[old - 1] | {"parent": number[nodes[old - 1]["parent"]]} for old in sorted(needed)]
    return data | {"nodes": kept, "leaves": [item | {"node": number[item["node"]]} for item in leaves]}


@pytest.mark.parametrize("seed", range(6))
def test_a_dropped_leaf_was_never_there(seed):
    """In the tables, and so in every advantage, in whitening and in packed sequences."""
    tree = random_tree(seed, leaves=7)
    for leaf in range(len(tree.leaves)):
        left = Tree.from_json(without(tree.to_json(), leaf))
        found = tree.canonical({leaf})
        assert found.to_json() == left.to_json()
        for estimator in ESTIMATORS:
            config = AdvantageConfig(estimator=estimator)
            mine, theirs = advantages([found], config), advantages([left], config)
            (one,), (other,) = pack_trees([found], mine, 10**6), pack_trees([left], theirs, 10**6)
            for name in ("tokens", "adv_pos", "adv_neg", "weight", "multiplicity", "subtree_end"):
                assert torch.equal(getattr(one, name), getattr(other, name))


def test_components_of_a_reward_are_saved():
    tree = Tree("p", [1])
    node = tree.add_node(0, 1)
    tree.nodes[node].tokens.append(2)
    tree.nodes[node].logprobs.append(-1.0)
    leaf = tree.leaves[tree.add_leaf(node, "eos")]
    leaf.reward, leaf.components = 1.0, {"format": 1.0}
    assert Tree.from_json(tree.to_json()).leaves[0].components == {"format": 1.0}
    assert rollout_metrics(Batch([tree], 0, Counts()), 1.0)["reward/format/mean"] == 1.0
