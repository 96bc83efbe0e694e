"""`treepo-mcore plan`: what a run would do on a cluster that need not be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from treepo_mcore.config import load_config
from treepo_mcore.model.architecture import read_architecture, read_sizes
from treepo_mcore.model.files import resolve_model
from treepo_mcore.observe.logs import set_up_logging


class DefaultGroup(TyperGroup):
    """A first word that names no sub-command belongs to the sub-command `config`: `plan CONFIG ...`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args and args[0] not in self.commands:
            args = ["config", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    help="Predict memory and time of CONFIG on a cluster: plan CONFIG key=value ... --nodes N --gpu h100 ...",
)

Nodes = Annotated[int, typer.Option("--nodes", min=1)]
PerNode = Annotated[int, typer.Option("--gpus-per-node", min=1)]
GpuName = Annotated[str, typer.Option("--gpu", help="a100, h100, h200 or b200")]
NetworkName = Annotated[
    str, typer.Option("--network", help="ib200, ib400, ib800, roce400, eth100, or GB/s of one GPU and direction")
]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="mean prompt; default: a quarter of the longest")]
ResponseTokens = Annotated[int | None, typer.Option(min=1, help="mean answer; default: a quarter of the longest")]
Informative = Annotated[float, typer.Option(min=0.01, max=1, help="share of prompts that the filter keeps")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of tables")]


@app.command("config")
def plan_config(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = 8,
    gpu: GpuName = "h100",
    network: NetworkName = "ib400",
    prompt_tokens: PromptTokens = None,
    response_tokens: ResponseTokens = None,
    informative: Informative = 0.6,
    as_json: Json = False,
) -> None:
    """Memory of a GPU and time of a step by phase, and warnings; exit status 1 when it does not fit."""
    from treepo_mcore.plan.hardware import make_cluster
    from treepo_mcore.plan.plan import plan_json, plan_run
    from treepo_mcore.plan.report import print_plan
    from treepo_mcore.plan.workload import assume

    settings = load_config(config, overrides)
    cluster = make_cluster(gpu, network, nodes, gpus_per_node)
    assumed = assume(settings, prompt_tokens, response_tokens, informative)
    plan = plan_run(settings, read_sizes(resolve_model(settings.model, weights=False)), cluster, assumed)
    if as_json:
        print(json.dumps(plan_json(plan), indent=1))
    else:
        print_plan(plan, Console(width=None if Console().is_terminal else 120))
    if not plan.fits:
        raise typer.Exit(1)


@app.command()
def suggest(
    model: Annotated[Path, typer.Option("--model", help="directory with a config.json")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = 8,
    gpu: GpuName = "h100",
    network: NetworkName = "ib400",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="mean prompt; the longest is four times that")] = 256,
    response_tokens: Annotated[int, typer.Option(min=1, help="mean answer; the longest is four times that")] = 1024,
    informative: Informative = 0.6,
    best: Annotated[int, typer.Option(min=1, help="layouts to show")] = 3,
    as_json: Json = False,
) -> None:
    """Search layouts, show the best, and why their neighbours lose; exit status 1 when none fits."""
    from treepo_mcore.plan.hardware import make_cluster
    from treepo_mcore.plan.suggest import (
        base_config,
        print_suggestions,
        starting_point,
        suggest_layouts,
        suggestions_json,
    )
    from treepo_mcore.plan.workload import assume

    given = starting_point(str(model), prompt_tokens, response_tokens, overrides or [])
    base = base_config(given)
    sizes = read_sizes(resolve_model(base.model, weights=False))
    cluster = make_cluster(gpu, network, nodes, gpus_per_node)
    assumed = assume(base, prompt_tokens, response_tokens, informative)
    found = suggest_layouts(given, sizes, cluster, assumed, best)
    if as_json:
        print(json.dumps(suggestions_json(found), indent=1))
    else:
        print_suggestions(found, Console(width=None if Console().is_terminal else 120))
    if not found.plans or not found.plans[0].fits:
        raise typer.Exit(1)


@app.command()
def reshard(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")] = None,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = 8,
    gpu: GpuName = "h100",
    network: NetworkName = "ib400",
    as_json: Json = False,
) -> None:
    """The push of weights from the actor into the engines: bytes, links, staging and time.

    Both sides are built by Megatron's and vLLM's own classes on meta tensors, for every rank of the cluster. The
    model's directory needs no more than its config.json. Bandwidths are line rates.
    """
    settings = load_config(config, overrides)
    set_up_logging(settings.run.log_level)
    from treepo_mcore.plan.hardware import find_gpu, find_network
    from treepo_mcore.plan.paper import put_on_paper
    from treepo_mcore.plan.reshard import describe, reshard_report

    hardware = find_gpu(gpu), find_network(network, gpus_per_node)
    directory = resolve_model(settings.model, weights=False)
    job = put_on_paper(settings, read_architecture(directory), directory, nodes, gpus_per_node)
    report = {"model": directory.name} | reshard_report(job, *hardware, settings.rollout.push_staging_mb << 20)
    print(json.dumps(report) if as_json else "\n".join([directory.name, *describe(report)]))
