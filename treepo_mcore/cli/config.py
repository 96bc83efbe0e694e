"""`treepo-mcore config`: what a configuration says once everything is filled in, and where two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from treepo_mcore.config import differences, dump_config, load_config

app = typer.Typer(no_args_is_help=True, help="The resolved configuration, and where two of them differ.")

File = Annotated[Path, typer.Argument(help="YAML file, also run.dir/config.yaml of a run")]


@app.command()
def show(
    config: File,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
) -> None:
    """Print the whole configuration as YAML: bases, overrides, environment variables and defaults filled in."""
    print(dump_config(load_config(config, overrides)), end="")


@app.command()
def diff(
    one: File,
    other: File,
    as_json: Annotated[bool, typer.Option("--json", help="one object instead of lines")] = False,
) -> None:
    """Print the keys whose values differ, a line each: key, value in the first file, value in the second.

    Exit status 0 where nothing differs, else 1, as diff has it.
    """
    found = differences(load_config(one), load_config(other))
    if as_json:
        print(json.dumps({key: [a, b] for key, a, b in found}))
    else:
        for key, a, b in found:
            print(f"{key:40} {json.dumps(a):30} {json.dumps(b)}")
    raise typer.Exit(1 if found else 0)
