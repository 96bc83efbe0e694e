"""`treepo-mcore compare`: two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compare(
    one: Annotated[Path, typer.Argument(help="directory of a run (run.dir)")],
    other: Annotated[Path, typer.Argument(help="directory of another, with the same held-out sets")],
    as_json: Annotated[bool, typer.Option("--json", help="one object instead of the table")] = False,
) -> None:
    """Print steps, held-out values, seconds, and the keys of the configuration that differ."""
    from treepo_mcore.report.compare import compare as side_by_side
    from treepo_mcore.report.compare import table
    from treepo_mcore.report.run import read_run

    found = side_by_side(read_run(one), read_run(other))
    print(json.dumps(found, indent=1) if as_json else table(found))
