"""The curve of decidedness on trees whose curve is known."""

import json
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from treepo_mcore.cli.trees import curve
from treepo_mcore.config import ConfigError
from treepo_mcore.observe.metrics import rollout_metrics
from treepo_mcore.records import Batch, Counts
from treepo_mcore.tree.curve import REPLICATES, CurveSums, Point, decided_at, monotone
from treepo_mcore.tree.files import write_trees
from treepo_mcore.tree.tree import EOS, PROMPT, Tree

DECISIVE = (1, 4, 7)  # tokens that all have to be right, of 8
FORKS = {0: 4, 2: 2, 5: 2}  # depth, where some answers end -> children of a living path
EASE = (0.6, 0.9)  # probability that a decisive token is right, prompt by prompt


def sampled(name, ease, stops, rng):
    """A scored tree. stops: an answer ends with its first wrong token, so lengths go with rewards."""
    tree = Tree(name, [9, 9])

    def grow(parent, right):
        begin = tree.nodes[parent].end - 2
        end = min([depth for depth in FORKS if depth > begin], default=8)
        for _ in range(FORKS[begin]):
            node, still = tree.add_node(parent, tree.nodes[parent].depth + 1), right
            for position in range(begin, end):
                still = still and (position not in DECISIVE or rng.random() < ease)
                tree.nodes[node].tokens.append(int(still))
                tree.nodes[node].logprobs.append(-1.0)
                if stops and not still:
                    break
            if end < 8 and (still or not stops):
                grow(node, still)
            else:
                leaf = tree.leaves[tree.add_leaf(node, EOS)]
                leaf.reward = leaf.score = float(still)

    grow(PROMPT, True)
    return tree


def batch(seed, stops=False, prompts=64):
    rng = random.Random(seed)
    return [sampled(f"{seed}/{number}", EASE[number % 2], stops, rng) for number in range(prompts)]


def exact(depth):
    """Of the mean square of values behind `depth` tokens, with as many prompts of either ease."""
    known, all_of_them = sum(position < depth for position in DECISIVE), len(DECISIVE)
    square = sum(ease ** (2 * all_of_them - known) - ease ** (2 * all_of_them) for ease in EASE)
    return square / sum(ease**all_of_them - ease ** (2 * all_of_them) for ease in EASE)


@pytest.mark.parametrize("stops", [pytest.param(False, marks=pytest.mark.long), True])
def test_it_agrees_with_the_exact_curve(stops):
    inside, estimates = [], defaultdict(list)
    for seed in range(25):
        sums = CurveSums.of(batch(seed, stops))
        for point, depth in zip(sums.points(), (2, 5), strict=True):
            assert point.share * sums.mean_length == pytest.approx(depth)
            assert point.trees == 64  # those whose answers have all ended, too
            inside.append(point.low < exact(depth) < point.high)
            estimates[depth].append(point.decided)
    assert 0.8 < np.mean(inside) <= 1  # 90 % are meant
    for depth, found in estimates.items():
        assert abs(np.mean(found) - exact(depth)) < 3 * np.std(found) / np.sqrt(len(found))
        assert np.std(found) < 0.1


def by_hand(rewards, lengths=((2, (2, 2)), (2, (2, 2)))):
    """Two or more paths from the prompt, each a head and the lengths of its tails."""
    tree, rewards = Tree("p", [1, 2, 3]), iter(rewards)

    def node(parent, length):
        number = tree.add_node(parent, tree.nodes[parent].depth + 1)
        tree.nodes[number].tokens.extend([5] * length)
        tree.nodes[number].logprobs.extend([-1.0] * length)
        return number

    for head, tails in lengths:
        above = node(PROMPT, head)
        for end in [node(above, tail) for tail in tails] or [above]:
            leaf = tree.leaves[tree.add_leaf(end, EOS)]
            leaf.reward = leaf.score = float(next(rewards))
    return tree


@pytest.mark.parametrize(
    ("tree", "decided"),
    [
        # Mean square 3/4, of leaves that part at the prompt 1 * 1/2, at the fork (1 + 0) / 2.
        (by_hand([1, 1, 1, 0]), 0.0),
        (by_hand([1, 1, 0, 0]), 1.0),
        # 1/2 in all, at the prompt 1/4, at the fork 0.
        (by_hand([1, 0, 1, 0]), -1.0),
        # A chain in front of the fork changes nothing: 2/3 in all, 1/3 at the prompt, 1 at the only fork.
        (by_hand([1, 1, 0, 1], ((2, (2, 2)), (4, ()), (4, ()))), 2.0),
        # The same with answers that end before the fork, which settles them: 1/3 of the leaves live on.
        (by_hand([1, 1, 0, 1], ((2, (2, 2)), (1, ()), (2, ()))), 1.0),
    ],
)
def test_four_leaves_by_hand(tree, decided):
    (point,) = CurveSums.of([tree]).points()
    assert point.decided == pytest.approx(decided)
    assert point.share == pytest.approx(2 / CurveSums.of([tree]).mean_length)
    assert (point.low, point.high, point.trees) == (None, None, 1)


def test_trees_that_have_ended_count_as_often_as_those_that_can_fork():
    """A variance of 1/4 of which 0 is settled, one of two trees that live; one of 1/2 that is settled, by half."""
    full, ended = by_hand([1, 0], ((4, ()), (4, ()))), by_hand([1, 0], ((1, ()), (2, ())))
    (point,) = CurveSums.of([by_hand([1, 1, 1, 0]), full, ended]).points()
    assert (point.decided, point.trees) == (pytest.approx(0.5), 2)


def test_chains_restarts_and_failed_rewards_do_not_count():
    tree = by_hand([1, 1, 1, 0])
    (plain,) = CurveSums.of([tree]).points()
    tree.split(1, 1)
    for node in (1, PROMPT):
        restarted = tree.nodes[tree.add_node(node, 2, from_fallback=True)]
        restarted.tokens.extend([5] * 9)
        restarted.logprobs.extend([-1.0] * 9)
        tree.leaves[tree.add_leaf(len(tree.nodes) - 1, EOS)].reward = 0.0
    assert CurveSums.of([tree]).points() == [plain]
    tree.leaves[3].failed = True
    assert CurveSums.of([tree]).points() == []  # no two rewards differ any more


def test_nothing_depends_on_an_order_and_sums_stay_small():
    trees = batch(1, stops=True)
    shuffled = []
    for tree in trees:
        tree = Tree.from_json(tree.to_json())
        random.Random(0).shuffle(tree.leaves)
        tree._leaf_at = {leaf.node: index for index, leaf in enumerate(tree.leaves)}
        shuffled.insert(0, tree)
    for one, other in zip(CurveSums.of(trees).points(), CurveSums.of(shuffled).points(), strict=True):
        assert vars(one) == pytest.approx(vars(other))
    many = sum((CurveSums.of(batch(seed)) for seed in range(5)), CurveSums())
    widths = [sums.points()[0].high - sums.points()[0].low for sums in (CurveSums.of(batch(0)), many)]
    assert (many.trees, many.points()[0].pairs) == (320, 320 * 4 * 4)
    assert widths[1] < 0.7 * widths[0]  # 1 / sqrt(5)
    assert sum(array.nbytes for array in vars(many).values() if isinstance(array, np.ndarray)) < 400 * REPLICATES


def test_the_filter_changes_nothing():
    """A prompt whose rewards are all equal adds 0 to both sums."""
    trees = batch(2)
    kept = [tree for tree in trees if len({leaf.reward for leaf in tree.leaves}) > 1]
    assert len(kept) < len(trees)
    everything, some = (CurveSums.of(chosen).points() for chosen in (trees, kept))
    assert [point.decided for point in everything] == pytest.approx([point.decided for point in some])


def points(*pairs):
    return [Point(share, decided, None, None, 1, 1) for share, decided in pairs]


def test_between_points():
    four = points((0.25, 0.2), (0.5, 0.8), (0.75, 0.6), (0.9, 1.2))
    assert [point.decided for point in monotone(four)] == pytest.approx([0.2, 0.7, 0.7, 1.0])
    assert decided_at(four, 0.375) == pytest.approx(0.5)
    assert decided_at(four, 0.1) == pytest.approx(0.08)
    assert decided_at(points((0.5, 0.6)), 0.75) == pytest.approx(0.8)  # towards 1 at the mean length
    assert decided_at(points((1.5, 0.9)), 1.4) == pytest.approx(0.84)
    assert decided_at(points((0.94, 0.9)), 0.5) is None
    assert decided_at([], 0.5) is None
    assert monotone([]) == []


def test_the_metric_is_there_where_paths_fork_near_the_half():
    metrics = rollout_metrics(Batch(batch(0), 0, Counts()), 1.0)
    assert metrics["tree/decided"] == pytest.approx(decided_at(CurveSums.of(batch(0)).points(), 0.5))
    flat = by_hand([1, 0], ((4, ()), (4, ())))
    assert "tree/decided" not in rollout_metrics(Batch([flat], 0, Counts()), 1.0)


def command(*arguments, status=0):
    line = [sys.executable, "-m", "treepo_mcore", "trees", "curve", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_the_command(tmp_path, capsys):
    files = [tmp_path / f"{seed}.jsonl" for seed in (0, 1)]
    for seed, file in enumerate(files):
        write_trees(file, batch(seed))
    row = json.loads(command(*files, "--json", "--picture", tmp_path / "curve.svg"))
    assert len(row["points"]) == 2
    sums = CurveSums.of(batch(0)) + CurveSums.of(batch(1))
    assert (row["trees"], row["mean_response_tokens"]) == (128, 8.0)
    assert row["decided_at_half"] == pytest.approx(decided_at(sums.points(), 0.5))
    for found, point in zip(row["points"], sums.points(), strict=True):
        assert found["tokens"] == pytest.approx(8 * point.share)
        assert {name: found[name] for name in vars(point)} == pytest.approx(vars(point))
    picture = (tmp_path / "curve.svg").read_text()
    assert picture.count("<circle") == 2
    curve(files[:1])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert rows[1].split()[:2] == ["0.250", "2.000"]


def spoilt(path: Path, kind: str):
    """A file that no curve comes from."""
    tree = by_hand([1, 0, 1, 0])
    if kind == "no reward":
        tree.leaves[2].reward = None
    if kind == "no lengths":
        row = {"path": ["a", "b"], "reward": 1.0, "n_tokens": 4}
        leaves = [row, row | {"path": ["a", "c"]}, row | {"path": ["d"], "reward": 0.0}]
        path.write_text(json.dumps({"prompt_id": "p", "leaves": leaves}) + "\n")
        return
    if kind == "no forks":
        tree = by_hand([1, 0], ((4, ()), (4, ())))
    if kind == "all right":
        tree = by_hand([1, 1, 1, 1])
    if kind == "one path":
        tree = by_hand([1, 0], ((2, (2, 2)),))
    write_trees(path, [tree])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no reward", "{file}: prompt p: leaf 2 has no reward"),
        ("no lengths", "{file}:1: expected a saved tree, found the plain form, which does not tell how deep"),
        (
            "no forks",
            "{file}: no curve in 1 trees: expected two paths from the prompt, a fork behind it and rewards that",
        ),
        ("all right", "{file}: no curve in 1 trees: expected"),
        ("one path", "{file}: no curve in 1 trees: expected"),
    ],
)
def test_files_without_a_curve(tmp_path, kind, message):
    file = tmp_path / "t.jsonl"
    spoilt(file, kind)
    with pytest.raises(ConfigError) as error:
        curve([file])
    assert str(error.value).startswith(message.format(file=file))
    assert "\n" not in str(error.value)


def test_files_and_pictures_that_cannot_be(tmp_path):
    write_trees(tmp_path / "t.jsonl", batch(0, prompts=4))
    trees, gone, nowhere = tmp_path / "t.jsonl", tmp_path / "gone.jsonl", tmp_path / "no" / "c.svg"
    assert command(trees, gone, status=2) == f"error: {gone}: no such file\n"
    for picture, told in (
        (tmp_path / "c.png", f"--picture: expected a name that ends in .svg, found {tmp_path / 'c.png'}"),
        (nowhere, f"--picture: {nowhere}: expected a file in a directory that exists"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            curve([trees], picture)
