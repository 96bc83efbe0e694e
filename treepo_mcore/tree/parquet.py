"""Trees as rows of a parquet file: numbers stay numbers, so that a tree of 40,000 tokens is written in a millisecond.

Columns `node_*` have an entry for each node but the prompt, `leaf_*` one for each leaf; `tokens` and `logprobs` are
those of all nodes, one after the other, `node_tokens` of them each. Tokens that the policy did not sample have NaN as
their log-prob. `meta`, `leaf_components` and `arrays` (what nodes have beside tokens, by node) are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from treepo_mcore.tree.tree import POLICY, PROMPT, Leaf, Node, Tree, arrays_to_json

SUFFIX = ".parquet"
ROWS = 32  # of a row group: so many trees are in memory twice

INT, FLOAT, BOOL, TEXT = pa.int32(), pa.float32(), pa.bool_(), pa.string()
OF_NODES: dict[str, tuple[pa.DataType, Callable[[Node], Any]]] = {
    "parent": (INT, lambda node: node.parent),
    "depth": (INT, lambda node: node.depth),
    "from_fallback": (BOOL, lambda node: node.from_fallback),
    "source": (TEXT, lambda node: node.source),
    "trained": (BOOL, lambda node: node.trained),
    "tokens": (INT, lambda node: len(node.tokens)),
}
OF_LEAVES: dict[str, tuple[pa.DataType, Callable[[Leaf], Any]]] = {
    "node": (INT, lambda leaf: leaf.node),
    "reason": (TEXT, lambda leaf: leaf.reason),
    "reward": (pa.float64(), lambda leaf: leaf.reward),
    "score": (pa.float64(), lambda leaf: leaf.score),
    "correct": (BOOL, lambda leaf: leaf.correct),
    "text": (TEXT, lambda leaf: None if leaf.text is None else _utf8(leaf.text)),
    "failed": (BOOL, lambda leaf: leaf.failed),
    "components": (TEXT, lambda leaf: json.dumps(leaf.components) if leaf.components else None),
}
SCHEMA = pa.schema(
    [("prompt_id", TEXT), ("meta", TEXT), ("prompt", pa.list_(INT))]
    + [(f"node_{name}", pa.list_(kind)) for name, (kind, _) in OF_NODES.items()]
    + [("tokens", pa.list_(INT)), ("logprobs", pa.list_(FLOAT)), ("arrays", TEXT)]
    + [(f"leaf_{name}", pa.list_(kind)) for name, (kind, _) in OF_LEAVES.items()]
)


def write(path: Path, trees: Iterable[Tree]) -> None:
    """One row a tree. Half a surrogate pair in a text, which no tokenizer gives, becomes a question mark."""
    with pq.ParquetWriter(path, SCHEMA, use_dictionary=False, write_statistics=False) as file:
        for part in batched(trees, ROWS):
            file.write_table(_table([tree.canonical() for tree in part]))


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """What `Tree.to_json` gives of every row, with the row's number from 1. Raises ValueError for another file."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in SCHEMA.names if name not in file.schema_arrow.names]:
                raise ValueError(f"{path}: expected columns of saved trees, missing {', '.join(missing)}")
            number = 0
            for batch in file.iter_batches(ROWS, columns=SCHEMA.names):
                for row in batch.cast(SCHEMA).to_pylist():
                    number += 1
                    yield number, _object(row, f"{path}:{number}: ")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not valid parquet: {error}") from error


def _table(trees: Sequence[Tree]) -> pa.Table:
    prompts = [np.frombuffer(tree.nodes[PROMPT].tokens, np.int32) for tree in trees]
    nodes, leaves = [tree.nodes[1:] for tree in trees], [tree.leaves for tree in trees]
    tokens = [_joined([np.frombuffer(node.tokens, np.int32) for node in own], np.int32) for own in nodes]
    logprobs = [_joined([_logprobs(node) for node in own], np.float32) for own in nodes]
    columns = {
        "prompt_id": pa.array([_utf8(tree.prompt_id) for tree in trees], TEXT),
        "meta": pa.array([json.dumps(tree.meta) for tree in trees], TEXT),
        "prompt": _lists(prompts, INT),
        "tokens": _lists(tokens, INT),
        "logprobs": _lists(logprobs, FLOAT),
        "arrays": pa.array([_arrays(tree) for tree in trees], TEXT),
    }
    for name, (kind, of_node) in OF_NODES.items():
        columns[f"node_{name}"] = pa.array([[of_node(node) for node in row] for row in nodes], pa.list_(kind))
    for name, (kind, of_leaf) in OF_LEAVES.items():
        columns[f"leaf_{name}"] = pa.array([[of_leaf(leaf) for leaf in row] for row in leaves], pa.list_(kind))
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _object(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The JSON form of a row."""
    for name in set(SCHEMA.names) - {"arrays"}:
        if row[name] is None:
            raise ValueError(f"{where}{name}: found null")
    counts = row["node_tokens"]
    if sum(counts) != len(row["tokens"]) or len(row["logprobs"]) != len(row["tokens"]):
        raise ValueError(f"{where}{sum(counts)} tokens in nodes, {len(row['tokens'])} tokens in all")
    arrays, begin = json.loads(row["arrays"] or "{}"), 0
    nodes = []
    for number, count in enumerate(counts):
        node = {name: row[f"node_{name}"][number] for name in OF_NODES} | arrays.get(str(number + 1), {})
        logprobs = row["logprobs"][begin : begin + count]
        node["tokens"] = row["tokens"][begin : begin + count]
        node["logprobs"] = logprobs if node["source"] == POLICY else []
        nodes.append(node)
        begin += count
    leaves = [{name: row[f"leaf_{name}"][number] for name in OF_LEAVES} for number in range(len(row["leaf_node"]))]
    for leaf in leaves:
        leaf["components"] = json.loads(leaf["components"] or "{}")
    top = {"prompt_id": row["prompt_id"], "meta": json.loads(row["meta"]), "prompt": row["prompt"]}
    return top | arrays.get(str(PROMPT), {}) | {"nodes": nodes, "leaves": leaves}


def _logprobs(node: Node) -> np.ndarray:
    if node.source != POLICY:
        return np.full(len(node.tokens), np.nan, np.float32)
    return np.frombuffer(node.logprobs, np.float32)


def _arrays(tree: Tree) -> str | None:
    found = {number: arrays_to_json(node) for number, node in enumerate(tree.nodes) if node.arrays}
    return json.dumps(found) if found else None


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.empty(0, kind), *parts])


def _lists(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(rows), kind))


def _utf8(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
