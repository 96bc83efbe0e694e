"""`treepo-mcore report`: what a run left in its directory, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treepo_mcore.config import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs (run.dir); several are drawn side by side")],
    out: Annotated[Path | None, typer.Option(help="file; default: report.html in the first directory")] = None,
    trees: Annotated[int, typer.Option(min=0, help="of a saved step, so many can be opened")] = 24,
) -> None:
    """Write one self-contained HTML page: charts over steps, seconds by phase, when outcomes are decided, and trees.

    Trees are those of the first run's first and last saved step. Words come from the tokenizer of run.dir/policy or of
    model.path; where both are gone, token ids stand in their place. Prints the file's name.
    """
    from treepo_mcore.report.page import page
    from treepo_mcore.report.run import read_run

    found = [read_run(folder) for folder in runs]
    file = out or runs[0] / "report.html"
    if not file.parent.is_dir():
        raise ConfigError(f"--out: {file.parent}: no such directory")
    file.write_text(page(found, trees), encoding="utf-8")
    print(file)
