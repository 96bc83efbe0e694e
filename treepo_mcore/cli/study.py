"""`treepo-mcore study`: arms and seeds, one after the other, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of a study, as studies/*.yaml")],
    out: Annotated[Path | None, typer.Option(help="JSON of the results; default: studies/results/NAME.json")] = None,
    runs: Annotated[Path | None, typer.Option(help="folder of the runs' files; default: runs/study/NAME")] = None,
    max_runs: Annotated[int | None, typer.Option(min=0, help="stop after so many runs; 0: only the report")] = None,
) -> None:
    """Run what is missing of a study, keep the results as they come, and print a table; the same command goes on.

    Beside the results a page (.html) shows the table and the accuracies over seconds and tokens.
    """
    from treepo_mcore.study.definition import prepare, read_study
    from treepo_mcore.study.page import page
    from treepo_mcore.study.report import markdown
    from treepo_mcore.study.runs import Results, run_all

    definition = read_study(file)
    results = Results(out or file.parent / "results" / f"{file.stem}.json", definition, grows=max_runs != 0)
    if max_runs != 0:
        prepare(definition)
    run_all(definition, results, runs or Path("runs/study") / file.stem, max_runs)
    if results.runs:
        print(markdown(definition, results.runs), end="")
        results.file.with_suffix(".html").write_text(page(definition, results.runs))
