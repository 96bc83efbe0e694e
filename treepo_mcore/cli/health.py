"""`treepo-mcore health`: what a run's metrics say of known failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def health(
    run: Annotated[Path, typer.Argument(help="directory of a run (run.dir), ended or under way")],
    as_json: Annotated[bool, typer.Option("--json", help="one object a finding")] = False,
) -> None:
    """Print what is found in the newest steps, and since when, as a run tells it on its terminal.

    Exit status 1 where anything is found. docs/watching.md explains.
    """
    from treepo_mcore.observe.health import LEAST, history, look
    from treepo_mcore.report.run import read_run

    rows = read_run(run).steps
    since = {finding.name: row["step"] for row, fresh in history(rows) for finding in fresh}
    found = look(rows)
    for finding in found:
        if as_json:
            print(json.dumps(finding._asdict() | {"since_step": since[finding.name]}))
        else:
            print(f"since step {since[finding.name] + 1}: {finding.name}: {finding.evidence}\n  {finding.advice}")
    if not found and not as_json:
        print(f"nothing found in {len(rows)} steps" if len(rows) >= LEAST else f"{len(rows)} steps, {LEAST} are needed")
    raise typer.Exit(1 if found else 0)
