"""`treepo-mcore trees`: advantages and statistics of saved trees, without an engine or a trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from treepo_mcore.config import AdvantageConfig, ConfigError, parse_section
from treepo_mcore.learn import advantage
from treepo_mcore.report.curve import curve_picture, curve_row
from treepo_mcore.rewards.math import boxed_answer
from treepo_mcore.tree.curve import CurveSums
from treepo_mcore.tree.files import read_trees
from treepo_mcore.tree.stats import informative, tree_stats
from treepo_mcore.tree.tree import Tree

app = typer.Typer(no_args_is_help=True, help="Advantages, statistics and the decidedness curve of saved trees.")

SAVED = "saved trees: a step's folder under run.dir/trees, parquet or JSONL"
File = Annotated[Path, typer.Argument(help=f"{SAVED}; or JSONL with one prompt a line in the plain form")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]


@app.command()
def advantages(
    file: File,
    estimator: Annotated[
        str, typer.Option(help=f"{', '.join(advantage.ESTIMATORS)} or package.module:name")
    ] = "treepo",
    aggregation: Annotated[Literal["average", "group_size"], typer.Option(help="weight of the levels")] = "average",
    reject_uniform_subgroups: Annotated[bool, typer.Option("--reject-uniform-subgroups")] = False,
    include_root: Annotated[bool, typer.Option(help="use the whole prompt's group")] = True,
    leave_one_out: Annotated[bool, typer.Option("--leave-one-out")] = False,
    distinct_groups: Annotated[bool, typer.Option("--distinct-groups")] = False,
    mass_baseline: Annotated[bool, typer.Option("--mass-baseline")] = False,
    baseline: Annotated[str, typer.Option(help="of subtree: mean, kin, sibling or blup")] = "mean",
    mass_loss_weight: Annotated[bool | None, typer.Option("--mass-loss-weight/--no-mass-loss-weight")] = None,
    max_levels: Annotated[int | None, typer.Option(min=1)] = None,
    whiten: Annotated[Literal["batch", "none"], typer.Option()] = "batch",
    whiten_shift: Annotated[bool | None, typer.Option(help="subtract the batch mean as well")] = None,
    only_informative: Annotated[
        bool, typer.Option("--informative", help="leave out what filter.enabled does: all leaves with the same score")
    ] = False,
    as_json: Json = False,
) -> None:
    """Advantages of every leaf. All lines of the file are one training batch.

    A run saves what it sampled; with filter.enabled it trained on the part that --informative leaves.

    One line a prompt: `raw` is the estimator alone, `advantage` after whitening and times the leaf's weight in the
    loss. A segment estimator gives a leaf one value per node of its path, the prompt left out. The plain form does not
    tell how long inner nodes are: there `segment` is whitened as if a path's tokens were all in its last node.
    """
    options = {
        "estimator": estimator,
        "aggregation": aggregation,
        "reject_uniform_subgroups": reject_uniform_subgroups,
        "include_root": include_root,
        "leave_one_out": leave_one_out,
        "distinct_groups": distinct_groups,
        "mass_baseline": mass_baseline,
        "baseline": baseline,
        "mass_loss_weight": mass_loss_weight,
        "max_levels": max_levels,
        "whiten": whiten,
        "whiten_shift": whiten_shift,
    }
    config = parse_section(AdvantageConfig, options)
    trees = _read(file, "reward", *(["score"] if only_informative else []))
    if only_informative:
        trees = [tree for tree in trees if informative(tree)]
    for row in advantage_rows(trees, config):
        print(json.dumps(row) if as_json else _advantage_line(row))


@app.command()
def stats(file: File, as_json: Json = False) -> None:
    """Sharing by depth, tokens, how leaves ended, distinct answers, rewards; null where the file does not say.

    Prefix-hit and recomputed tokens are the engine's and come with saved trees. The plain form does not tell how long
    inner nodes are, so sharing and physical tokens are unknown.
    """
    row = stats_row(_read(file))
    if as_json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:18} {_cell(value)}")


@app.command()
def curve(
    files: Annotated[list[Path], typer.Argument(help=f"{SAVED}; those of several steps count together")],
    picture: Annotated[Path | None, typer.Option(help="draw it: a name that ends in .svg")] = None,
    as_json: Json = False,
) -> None:
    """When outcomes are decided: the share of a prompt's reward variance that is settled by a depth, with a 90 %
    interval.

    Depths are shares of the file's mean response length; a row is the forks around one eighth of it. `monotone` is the
    rising curve nearest to the estimates, and what the picture draws as a line. Leaves behind a fallback and those
    whose reward call failed are left out.
    """
    if picture is not None:
        _check_picture(picture)
    sums = CurveSums()
    for file in files:
        trees = _read(file, plain=False)
        try:
            sums += CurveSums.of(trees)
        except ValueError as error:  # a leaf without a reward
            raise ConfigError(f"{file}: {error}") from error
    row = curve_row(sums)
    if not row["points"]:
        raise ConfigError(
            f"{', '.join(map(str, files))}: no curve in {sums.trees} trees: expected two paths from the prompt, a fork "
            "behind it and rewards that differ in one of them, restarts apart"
        )
    if picture is not None:
        picture.write_text(curve_picture(row))
    print(json.dumps(row) if as_json else _curve_table(row))


def _check_picture(file: Path) -> None:
    if file.suffix != ".svg":
        raise ConfigError(f"--picture: expected a name that ends in .svg, found {file}")
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--picture: {file}: expected a file in a directory that exists")


def _curve_table(row: dict[str, Any]) -> str:
    titles = ("share", "tokens", "decided", "90 % interval", "monotone", "trees", "pairs")
    lines = ["".join(f"{title:>15}" for title in titles)]
    for point in row["points"]:
        interval = "-" if point["low"] is None else f"{point['low']:.3f} to {point['high']:.3f}"
        cells = [f"{point[name]:.3f}" for name in ("share", "tokens", "decided")] + [interval]
        cells += [f"{point['monotone']:.3f}", str(point["trees"]), str(point["pairs"])]
        lines.append("".join(f"{cell:>15}" for cell in cells))
    half = "-" if row["decided_at_half"] is None else f"{row['decided_at_half']:.3f}"
    lines.append(f"{row['trees']} trees, answers of {row['mean_response_tokens']:.1f} tokens, decided at half: {half}")
    return "\n".join(lines)


def stats_row(trees: Sequence[Tree]) -> dict[str, Any]:
    """`TreeStats` of all trees with the engine's counts; None for what is not known."""
    texts = any(leaf.text is not None for tree in trees for leaf in tree.leaves)
    row = asdict(tree_stats(trees, boxed_answer if texts else None))
    if any(not node.tokens for tree in trees for node in tree.nodes):
        row["physical_tokens"] = row["sharing"] = None
    for name in ("prefix_hit_tokens", "recomputed_tokens"):
        known = all(isinstance(tree.meta.get(name), int) for tree in trees)
        row[name] = sum(tree.meta[name] for tree in trees) if known else None
    return row


def advantage_rows(trees: Sequence[Tree], config: AdvantageConfig) -> list[dict[str, Any]]:
    """One mapping a tree with `prompt_id`, `raw` and `advantage`, both in the order of the file's leaves."""
    whitened = advantage.advantages(trees, config)
    alone = {"whiten": "none", "mass_loss_weight": False}
    raw = advantage.advantages(trees, config.model_copy(update=alone))
    per_node = advantage.find_estimator(config.estimator).per_node

    def values(of: advantage.Advantage, tree: Tree) -> list[Any]:
        paths = [of.along(tree, leaf) for leaf in range(len(tree.leaves))]
        return [path[1:].tolist() if per_node else float(path[0]) for path in paths]

    return [
        {"prompt_id": tree.prompt_id, "raw": values(before, tree), "advantage": values(after, tree)}
        for tree, before, after in zip(trees, raw, whitened, strict=True)
    ]


def _read(file: Path, *needed: str, plain: bool = True) -> list[Tree]:
    """Trees of either form, or of the saved one alone. needed: what no leaf may lack.

    Raises `ConfigError` with the line's number.
    """
    if not file.exists():
        raise ConfigError(f"{file}: no such file")
    try:
        trees = list(read_trees(file, partial(_tree, needed=needed, plain=plain)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not trees:
        raise ConfigError(f"{file}: no trees in it")
    return trees


def _tree(data: dict[str, Any], needed: Sequence[str], plain: bool) -> Tree:
    if not plain and "nodes" not in data and "leaves" in data:
        raise ValueError("expected a saved tree, found the plain form, which does not tell how deep forks are")
    tree = Tree.from_json(data) if "nodes" in data else advantage.tree_from_plain(data)
    if not tree.leaves:
        raise ValueError(f"prompt {tree.prompt_id}: no leaves")
    for name in needed:
        for index, leaf in enumerate(tree.leaves):
            if getattr(leaf, name) is None:
                lacks = "" if "nodes" in data else ", which only saved trees have"
                raise ValueError(f"prompt {tree.prompt_id}: leaf {index} has no {name}{lacks}")
    return tree


def _advantage_line(row: dict[str, Any]) -> str:
    pairs = zip(row["raw"], row["advantage"], strict=True)
    return f"{row['prompt_id']}\n" + "\n".join(f"  {_cell(raw):>28}  {_cell(adv):>28}" for raw, adv in pairs)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "  ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "  ".join(map(_cell, value))
    return str(value)
