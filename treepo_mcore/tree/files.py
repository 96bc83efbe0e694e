"""Files of trees: JSONL, one tree a line, or parquet, one tree a row, which is what a run writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from treepo_mcore.tree import parquet
from treepo_mcore.tree.tree import Tree


def write_trees(path: str | Path, trees: Iterable[Tree]) -> None:
    """Write a file of the format that its name ends with: parquet or, in all other cases, JSONL.

    Half a surrogate pair, which UTF-8 cannot hold, is written as JSON's own escape and reads back as it was.
    """
    if Path(path).suffix == parquet.SUFFIX:
        parquet.write(Path(path), trees)
        return
    with Path(path).open("w", encoding="utf-8", errors="backslashreplace") as file:
        for tree in trees:
            file.write(json.dumps(tree.to_json(), ensure_ascii=False) + "\n")


def read_trees(path: str | Path, read: Callable[[dict[str, Any]], Tree] = Tree.from_json) -> Iterator[Tree]:
    """Trees of a file, one by one, or of all parquet files in a folder, such as run.dir/trees/step_000000, in the order
    of their prompts in the step. `read` makes a tree of what `Tree.to_json` gives.

    A malformed one raises ValueError that names file and line (parquet: row, from 1).
    """
    path = Path(path)
    if path.is_dir():
        trees = [tree for file in sorted(path.glob(f"*{parquet.SUFFIX}")) for tree in read_trees(file, read)]
        yield from sorted(trees, key=lambda tree: int(tree.meta.get("number", 0)))
        return
    for place, data in parquet.read(path) if path.suffix == parquet.SUFFIX else _lines(path):
        try:
            tree = read(data)
        except ValueError as error:
            raise ValueError(f"{path}:{place}: {error}") from error
        yield tree


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects with the numbers of their lines; empty lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line.decode("utf-8"), parse_constant=_refuse)
                if not isinstance(data, dict):
                    raise ValueError(f"expected an object, found {type(data).__name__}")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            yield number, data


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
