"""`treepo-mcore plan`: what a run would do on a cluster that need not be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from treepo_mcore.config import load_config
from treepo_mcore.observe.logs import set_up_logging

app = typer.Typer(no_args_is_help=True, help="What a run would do on a cluster, on paper.")


@app.callback()
def _root() -> None:
    """What a run would do on a cluster, on paper."""


@app.command()
def reshard(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    memory_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s of a GPU's own memory")] = 3350,
    node_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s a GPU and direction inside a node")] = 450,
    network_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s a GPU and direction across nodes")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, with every rank's bytes")] = False,
) -> None:
    """The push of weights from the actor into the engines: bytes, links, staging and time.

    Both sides are built by Megatron's and vLLM's own classes on meta tensors, for every rank of the cluster. The
    model's directory needs no more than its config.json. Bandwidths are line rates; the defaults are those of
    H100 SXM nodes with one port of 400 Gb/s a GPU.
    """
    settings = load_config(config, overrides)
    set_up_logging(settings.run.log_level)
    from treepo_mcore.architecture import read_architecture, resolve_model
    from treepo_mcore.planner.paper import put_on_paper
    from treepo_mcore.planner.reshard import Bandwidths, describe, reshard_report

    directory = resolve_model(settings.model, weights=False)
    job = put_on_paper(settings, read_architecture(directory), directory, nodes, gpus_per_node)
    rates = Bandwidths(memory_bandwidth * 1e9, node_bandwidth * 1e9, network_bandwidth * 1e9)
    report = {"model": directory.name} | reshard_report(job, rates, settings.rollout.push_staging_mb << 20)
    print(json.dumps(report) if as_json else "\n".join([directory.name, *describe(report)]))
