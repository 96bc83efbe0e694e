"""`treepo-mcore launch`: scripts for many nodes, printed or submitted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Literal

import typer

from treepo_mcore.config import ConfigError
from treepo_mcore.launch.preflight import main
from treepo_mcore.launch.render import SlurmJob, TorchrunJob, render

app = typer.Typer(no_args_is_help=True, help="Print a script that trains on many nodes, or submit it.")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for `train`")]
Nodes = Annotated[int, typer.Option(min=1)]
Gpus = Annotated[int, typer.Option(min=0, help="0: train on CPUs")]
Processes = Annotated[int | None, typer.Option(min=1, help="[default: one per GPU]")]
Python = Annotated[str, typer.Option(help="interpreter on the nodes, or in the container")]
Port = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="where the ranks meet [default: 29500, under Slurm from the job's id]"),
]
Interface = Annotated[str | None, typer.Option(help="network interface by which nodes find each other, e.g. eth0")]
IbHca = Annotated[str | None, typer.Option(help="InfiniBand adapters for NCCL, e.g. mlx5_0,mlx5_1 [default: all]")]
NvLinks = Annotated[int | None, typer.Option(help="preflight: active NVLinks on each GPU, 18 on HGX H100")]
Disk = Annotated[int, typer.Option(help="preflight: GiB free where the run writes")]
Memory = Annotated[int, typer.Option(help="preflight: GiB of host memory available")]


@app.command()
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    processes_per_node: Processes = None,
    job_name: Annotated[str, typer.Option()] = "treepo",
    account: Annotated[str | None, typer.Option()] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str, typer.Option(help="limit of one attempt, as sbatch takes it")] = "04:00:00",
    signal_seconds: Annotated[
        int, typer.Option(help="warning before that limit: a step and a checkpoint must fit in")
    ] = 600,
    exclusive: Annotated[bool, typer.Option(help="whole nodes")] = True,
    container_image: Annotated[str | None, typer.Option(help="pyxis: registry#image:tag or a .sqsh file")] = None,
    container_mounts: Annotated[str | None, typer.Option(help="pyxis: SRC:DST[,SRC:DST]...")] = None,
    python: Python = "python",
    port: Port = None,
    interface: Interface = None,
    ib_hca: IbHca = None,
    nvlinks: NvLinks = None,
    disk_gib: Disk = 100,
    memory_gib: Memory = 64,
    submit: Annotated[bool, typer.Option("--submit", help="hand the script to sbatch instead of printing it")] = False,
) -> None:
    """A batch script: preflight on every node, one task a rank, checkpoint and requeue before the time limit."""
    script = render(
        SlurmJob(
            config=config,
            overrides=tuple(overrides or ()),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            processes_per_node=processes_per_node,
            job_name=job_name,
            account=account,
            partition=partition,
            qos=qos,
            time=time,
            signal_seconds=signal_seconds,
            exclusive=exclusive,
            container_image=container_image,
            container_mounts=container_mounts,
            python=python,
            port=port,
            interface=interface,
            ib_hca=ib_hca,
            nvlinks=nvlinks,
            disk_gib=disk_gib,
            memory_gib=memory_gib,
        )
    )
    if submit:
        if shutil.which("sbatch") is None:
            raise ConfigError("--submit: no sbatch on this machine; print the script and submit it where there is one")
        raise typer.Exit(subprocess.run(["sbatch"], input=script, text=True).returncode)
    print(script, end="")


@app.command()
def torchrun(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    processes_per_node: Processes = None,
    rendezvous: Annotated[
        Literal["static", "c10d"], typer.Option(help="static: the script is given the node's number; c10d: it is not")
    ] = "static",
    head: Annotated[str | None, typer.Option(help="address of the first node")] = None,
    python: Python = "python",
    port: Port = None,
    interface: Interface = None,
    ib_hca: IbHca = None,
    nvlinks: NvLinks = None,
    disk_gib: Disk = 100,
    memory_gib: Memory = 64,
) -> None:
    """A script to run on every node: a look at the node, then torchrun; it saves and ends when signalled."""
    script = render(
        TorchrunJob(
            config=config,
            overrides=tuple(overrides or ()),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            processes_per_node=processes_per_node,
            rendezvous=rendezvous,
            head=head,
            python=python,
            port=port,
            interface=interface,
            ib_hca=ib_hca,
            nvlinks=nvlinks,
            disk_gib=disk_gib,
            memory_gib=memory_gib,
        )
    )
    print(script, end="")


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
def preflight(context: typer.Context) -> None:
    """Look at this node: python -m treepo_mcore.launch.preflight, with the same options."""
    raise typer.Exit(main(context.args))
