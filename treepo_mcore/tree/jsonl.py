"""Files of trees: JSONL, one tree a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from treepo_mcore.tree.tree import Tree


def write_trees(path: str | Path, trees: Iterable[Tree]) -> None:
    """Write a JSONL file, one tree a line.

    Half a surrogate pair, which UTF-8 cannot hold, is written as JSON's own escape and reads back as it was.
    """
    with Path(path).open("w", encoding="utf-8", errors="backslashreplace") as file:
        for tree in trees:
            file.write(json.dumps(tree.to_json(), ensure_ascii=False) + "\n")


def read_trees(path: str | Path, read: Callable[[dict[str, Any]], Tree] = Tree.from_json) -> Iterator[Tree]:
    """Trees of a JSONL file, one by one, empty lines passed over; `read` makes a tree of a line's object.

    A malformed line raises ValueError that names ``file:line``.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line.decode("utf-8"), parse_constant=_refuse)
                if not isinstance(data, dict):
                    raise ValueError(f"expected an object, found {type(data).__name__}")
                tree = read(data)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            yield tree


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
