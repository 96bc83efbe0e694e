"""`treepo-mcore checkpoint`: what can be done with a saved checkpoint without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treepo_mcore.actor.sums import differences, read_sums
from treepo_mcore.config import load_config

app = typer.Typer(no_args_is_help=True, help="Saved checkpoints.")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="directory of one: run.dir/checkpoints/iter_0000100")],
) -> None:
    """Say whether every file of a checkpoint is as it was written, by the sums in its integrity.json.

    A line for each file that is not. Exit status 0 when all are, else 1. Training looks at them too before it goes on.
    """
    sums = read_sums(checkpoint)
    found = differences(checkpoint, sums, sums)
    size = sum(file.stat().st_size for name in sums if (file := checkpoint / name).is_file())
    lines = found or [f"{checkpoint}: {len(sums)} files, {size:,} bytes, all as they were written"]
    print("\n".join(lines))
    raise typer.Exit(1 if found else 0)


@app.command()
def reshard(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, which may be run.dir/config.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
) -> None:
    """Write the newest checkpoint of run.dir once more, so that it loads in any layout.

    Those that are saved while a run goes on load with the tensor and pipeline parallelism they were saved with;
    those of a run that stops or ends do already. Started like train, with that parallelism and any number of replicas.
    """
    from treepo_mcore.resharder import reshard_newest

    print(reshard_newest(load_config(config, overrides)), flush=True)
