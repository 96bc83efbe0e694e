"""Write docs/configuration.md from the models, comments and defaults of treepo_mcore/config/.

    python tools/write_configuration_page.py [--check]

--check only compares, and exits 1 when the page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from treepo_mcore.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

A run is one YAML file; `base: other.yaml` in it takes everything from another one first, `${NAME}` stands for an
environment variable, and `key=value` on the command line overrides both. `treepo-mcore config show` prints the result,
`config diff` where two differ. Unknown keys are errors that name the nearest key.
Lengths are in tokens, times in seconds. `rollout.engine.*` reaches every argument of vLLM's `EngineArgs` and
`actor.megatron.*` every field of Megatron's `TransformerConfig`, `OptimizerConfig` and
`DistributedDataParallelConfig`, both checked against the installed classes; keys that the trainer sets itself are
refused with the key to use instead.

This page is written by `tools/write_configuration_page.py`.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(Config, ""))


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    comments = _comments(model)
    rows, below = [], []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            below += list(_section(kind, f"{prefix}{name}."))
        else:
            comment = comments.get(name, "").replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {_kind(field)} | {_default(field)} | {comment} |\n")
    if prefix:
        yield f"\n## `{prefix[:-1]}`\n\n{inspect.getdoc(model)}\n"
    if rows:
        yield "\n| key | type | default | |\n|---|---|---|---|\n" + "".join(rows)
    yield from below


def _kind(field: FieldInfo) -> str:
    text = str(field.annotation)
    if isinstance(field.annotation, type):
        text = field.annotation.__name__
    text = re.sub(r"Annotated\[(.*), BeforeValidator.*\)\]", r"\1", re.sub(r"typing\.|pathlib\.|<class '|'>", "", text))
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | None", text.replace("tuple[int, int]", "int or [low, high]"))
    text = re.sub(r"Literal\[(.*)\]", lambda match: match[1].replace(", ", " \\| "), text)
    return text.replace(" | None", " or null").replace("'", "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "null"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """Field -> its comment: the lines above it and the one behind it."""
    found: dict[str, list[str]] = {}
    waiting: list[str] = []
    field, line = None, -1
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(model)).readline):
        if token.type == tokenize.COMMENT and token.start[0] == line and field:
            found.setdefault(field, []).append(token.string.lstrip("# "))
        elif token.type == tokenize.COMMENT:
            waiting.append(token.string.lstrip("# "))
        elif token.type == tokenize.NAME and token.start[1] == 4 and token.string in model.model_fields:
            field, line = token.string, token.start[0]
            found[field], waiting = waiting, []
        elif token.type == tokenize.NAME and token.start[1] == 4:
            field, waiting = None, []
    return {name: " ".join(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE} is out of date: run python tools/write_configuration_page.py")


if __name__ == "__main__":
    main()
