"""`treepo-mcore trees` through the command line, on both forms of a file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from treepo_mcore.cli.app import app
from treepo_mcore.config import ConfigError
from treepo_mcore.learn.advantage import ESTIMATORS, tree_from_plain
from treepo_mcore.tree.files import write_trees
from treepo_mcore.tree.tree import EOS, Tree

CASES = json.loads((Path(__file__).parent / "data" / "advantage_cases.json").read_text())


def command(*arguments: str | Path, status: int = 0) -> str:
    """What the command prints, in this process; `main` makes a line and status 2 of a `ConfigError`."""
    done = CliRunner().invoke(app, ["trees", *map(str, arguments)])
    if isinstance(done.exception, ConfigError):
        assert status == 2, done.exception
        return f"error: {done.exception}\n"
    assert done.exit_code == status, done.output
    return done.stdout if status == 0 else done.stderr


def plain(path: Path, *cases: str) -> Path:
    lines = [json.dumps({"prompt_id": case, "leaves": CASES[case]["leaves"]}) for case in cases]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("flags", "raw", "whitened"),
    [
        (["--aggregation", "average"], "average", "average"),
        (["--aggregation", "group_size"], "group_size", "group_size"),
        (["--aggregation", "average", "--no-include-root"], "average_no_root", None),
    ],
)
def test_advantages_of_the_plain_form(tmp_path, case, flags, raw, whitened):
    out = command("advantages", plain(tmp_path / "a.jsonl", case), *flags, "--json")
    row = json.loads(out)
    assert row["prompt_id"] == case
    np.testing.assert_allclose(row["raw"], CASES[case]["raw"][raw], atol=2e-6)
    if whitened:
        np.testing.assert_allclose(row["advantage"], CASES[case]["whitened"][whitened], atol=2e-6)


def test_every_switch_reaches_its_estimator(tmp_path):
    file = plain(tmp_path / "a.jsonl", "C")
    for flag, name in (
        ("--reject-uniform-subgroups", "average_reject"),
        ("--leave-one-out", "average_loo"),
        ("--distinct-groups", "average_distinct_groups"),
        ("--mass-baseline", "average_mass_baseline"),
    ):
        row = json.loads(command("advantages", file, flag, "--json"))
        np.testing.assert_allclose(row["raw"], CASES["C"]["raw"][name], atol=2e-6)


def test_whitening_without_a_shift_and_leaf_weights(tmp_path):
    file = plain(tmp_path / "a.jsonl", "C")
    shifted, scaled, weighted = (
        json.loads(command("advantages", file, "--json", *flags))
        for flags in ([], ["--no-whiten-shift"], ["--whiten", "none", "--mass-loss-weight"])
    )
    steps = np.array(shifted["advantage"]) - scaled["advantage"]
    assert abs(steps[0]) > 0.01
    np.testing.assert_allclose(steps, steps[0], atol=1e-6)
    tree = tree_from_plain({"leaves": CASES["C"]["leaves"]})
    assert weighted["raw"] == shifted["raw"]
    np.testing.assert_allclose(weighted["advantage"], shifted["raw"] * tree.masses() * len(tree.leaves))
    assert set(tree.masses()) != {1 / len(tree.leaves)}


def test_all_lines_are_one_batch(tmp_path):
    rows = [
        json.loads(line) for line in command("advantages", plain(tmp_path / "a.jsonl", "A", "C"), "--json").splitlines()
    ]
    assert [row["prompt_id"] for row in rows] == ["A", "C"]
    values = np.concatenate([row["advantage"] for row in rows])
    tokens = [leaf["n_tokens"] for case in ("A", "C") for leaf in CASES[case]["leaves"]]
    assert np.average(values, weights=tokens) == pytest.approx(0, abs=1e-6)
    assert rows[0]["advantage"][0] != pytest.approx(CASES["A"]["whitened"]["average"][0], abs=1e-3)


def saved(path: Path) -> Path:
    tree = Tree("p", [1, 2, 3], {"prefix_hit_tokens": 32, "recomputed_tokens": 5})
    for parent, length in ((0, 4), (1, 2), (1, 4)):
        node = tree.nodes[tree.add_node(parent, tree.nodes[parent].depth + 1)]
        node.tokens.extend([9] * length)
        node.logprobs.extend([-1.0] * length)
    for node, text, score in ((2, r"\boxed{1}", 1.0), (3, r"it is \boxed{ 1}", 0.25)):
        leaf = tree.leaves[tree.add_leaf(node, EOS)]
        leaf.text, leaf.reward, leaf.score, leaf.correct = text, score - 0.25, score, True
    write_trees(path, [tree])
    return path


def test_saved_trees(tmp_path):
    file = saved(tmp_path / "t.jsonl")
    assert json.loads(command("advantages", file, "--json"))["raw"] == [0.375, -0.375]
    segments = json.loads(command("advantages", file, "--estimator", "spo", "--json"))["raw"]
    assert [len(path) for path in segments] == [2, 2]
    row = json.loads(command("stats", file, "--json"))
    assert row["sharing"] == [2.0, 1.0]
    assert (row["physical_tokens"], row["logical_tokens"]) == (10, 14)
    assert (row["prefix_hit_tokens"], row["recomputed_tokens"]) == (32, 5)
    assert row["reasons"] == {"eos": 2}
    assert row["distinct_answers"] == 1.0
    assert (row["mean_reward"], row["mean_score"], row["accuracy"], row["informative"]) == (0.375, 0.625, 1.0, 1.0)
    assert "sharing            2  1" in command("stats", file)


def test_stats_of_the_plain_form_say_what_they_do_not_know(tmp_path):
    row = json.loads(command("stats", plain(tmp_path / "a.jsonl", "A"), "--json"))
    assert row["leaves"] == 8
    assert row["logical_tokens"] == 40
    assert row["physical_tokens"] is row["sharing"] is row["prefix_hit_tokens"] is None
    assert row["mean_score"] is row["accuracy"] is row["informative"] is None
    assert row["mean_reward"] == np.mean([leaf["reward"] for leaf in CASES["A"]["leaves"]])


def leaf_of(**fields) -> str:
    """A line of the plain form; a field that is ... is left out."""
    leaf = {"path": ["a"], "reward": 0.5, "n_tokens": 3} | fields
    leaf = {name: value for name, value in leaf.items() if value is not ...}
    return json.dumps({"prompt_id": "x", "leaves": [leaf]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2: Expecting"),
        ("[]", "2: expected an object, found list"),
        ('{"prompt_id": "x", "leaves": []}', "2: prompt x: no leaves"),
        ('{"prompt_id": "x"}', "2: missing field 'leaves'"),
        (leaf_of(n_tokens=...), "2: prompt x: leaf 0: missing field 'n_tokens'"),
        (leaf_of(n_tokens=0), "2: prompt x: leaf 0: n_tokens: expected 1..10000000, found 0"),
        (leaf_of(n_tokens=-3), "2: prompt x: leaf 0: n_tokens: expected 1..10000000, found -3"),
        (leaf_of(n_tokens=1.5), "2: prompt x: leaf 0: n_tokens: expected an integer, found 1.5"),
        (leaf_of(n_tokens=10**12), "2: prompt x: leaf 0: n_tokens: expected 1..10000000, found 1000000000000"),
        (leaf_of(path="abc"), "2: prompt x: leaf 0: path: expected a list, found 'abc'"),
        (leaf_of(path=[]), "2: prompt x: leaf 0: path: expected at least one node id, found none"),
        (leaf_of(reward="x"), "2: prompt x: leaf 0: reward: expected a finite number, found 'x'"),
        (leaf_of(reward=float("nan")), "2: NaN is no JSON"),
        (leaf_of(reward=10**400), "2: prompt x: leaf 0: reward: expected a finite number, found 1000"),
        (leaf_of().replace("0.5", "1e999"), "2: prompt x: leaf 0: reward: expected a finite number, found inf"),
        ("\udcff\udcfe", "2: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ('{"nodes": [], "prompt_id": "x", "meta": {}}', "2: missing field 'prompt'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = plain(tmp_path / "a.jsonl", "A")
    file.write_text(file.read_text() + line + "\n", encoding="utf-8", errors="surrogateescape")
    error = command("advantages", file, status=2)
    assert error.startswith(f"error: {file}:{message}")
    assert error.count("\n") == 1


def test_any_text_can_be_shown(tmp_path):
    file = plain(tmp_path / "a.jsonl", "A")
    file.write_text(json.dumps(json.loads(file.read_text().splitlines()[0]) | {"prompt_id": "half \ud83d"}))
    shown = subprocess.run(
        [sys.executable, "-m", "treepo_mcore", "trees", "advantages", file], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, "half \\ud83d" in shown.stdout) == (0, True), shown.stderr


def test_what_the_filter_leaves(tmp_path):
    """Of two trees with the same rewards one has them for length alone."""
    file = saved(tmp_path / "t.jsonl")
    uniform = json.loads(file.read_text()) | {"prompt_id": "long"}
    uniform["leaves"] = [leaf | {"score": 1.0} for leaf in uniform["leaves"]]
    file.write_text(file.read_text() + json.dumps(uniform) + "\n")
    assert json.loads(command("stats", file, "--json"))["informative"] == 0.5
    rows = [json.loads(line) for line in command("advantages", file, "--json", "--informative").splitlines()]
    assert [row["prompt_id"] for row in rows] == ["p"]
    assert len(command("advantages", file, "--json").splitlines()) == 2
    error = command("advantages", plain(tmp_path / "a.jsonl", "A"), "--informative", status=2)
    assert f"{tmp_path / 'a.jsonl'}:1: prompt A: leaf 0 has no score" in error


def test_a_leaf_without_a_reward_is_named(tmp_path):
    tree = tree_from_plain({"prompt_id": "A", "leaves": CASES["A"]["leaves"]})
    tree.leaves[3].reward = None
    write_trees(tmp_path / "t.jsonl", [tree])
    error = command("advantages", tmp_path / "t.jsonl", status=2)
    assert f"{tmp_path / 't.jsonl'}:1: prompt A: leaf 3 has no reward" in error


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_a_leaf_inside_another_leafs_path(tmp_path, order):
    """Groups as the released code forms them: leaves whose first j nodes are this leaf's."""
    leaves = [(["a"], 1.0), (["a", "b"], -1.0), (["a", "b", "c"], 1.0), (["d"], -1.0)]
    everyone, of_a, of_b = 0.0, 1 / 3, 0.0  # means
    expected = [
        np.mean([1 - everyone, 1 - of_a]),
        np.mean([-1 - everyone, -1 - of_a, -1 - of_b]),
        np.mean([1 - everyone, 1 - of_a, 1 - of_b]),
        -1 - everyone,
    ]
    rows = [{"path": leaves[i][0], "reward": leaves[i][1], "n_tokens": 3} for i in order]
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt_id": "x", "leaves": rows}) + "\n")
    row = json.loads(command("advantages", tmp_path / "t.jsonl", "--json"))
    np.testing.assert_allclose(row["raw"], [expected[i] for i in order])
    for name in ESTIMATORS:
        row = json.loads(command("advantages", tmp_path / "t.jsonl", "--json", "--estimator", name))
        assert np.isfinite(np.concatenate([np.ravel(value) for value in row["raw"]])).all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"node": 1}, "leaf 1: node 1 is an inner node: paths of other leaves go on there"),
        ({"node": 2}, "leaf 1: node 2 is the end of leaf 0 already"),
    ],
)
def test_a_leaf_of_a_saved_tree_that_is_none_is_named(tmp_path, edit, message):
    file = saved(tmp_path / "t.jsonl")
    tree = json.loads(file.read_text())
    tree["leaves"][1] |= edit
    file.write_text(json.dumps(tree) + "\n")
    assert command("advantages", file, status=2) == f"error: {file}:1: {message}\n"


def test_two_leaves_with_the_same_path(tmp_path):
    leaves = [{"path": path, "reward": 1.0, "n_tokens": 3} for path in (["a"], ["b"], ["a"])]
    file = plain(tmp_path / "a.jsonl", "A")
    file.write_text(file.read_text() + json.dumps({"prompt_id": "x", "leaves": leaves}) + "\n")
    message = "prompt x: leaf 2: path: the same as that of leaf 0: ['a']"
    assert command("advantages", file, status=2) == f"error: {file}:2: {message}\n"


def test_starts_without_heavy_libraries():
    code = "import sys, treepo_mcore.cli.app; print([m for m in ('torch', 'vllm', 'megatron') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_option_of_another_estimator(tmp_path):
    file = plain(tmp_path / "a.jsonl", "C")
    text = command("advantages", file, "--estimator", "grpo", "--max-levels", "2", status=2)
    assert text.strip() == "error: max_levels: 2 is of estimator: treepo, found estimator: grpo"
