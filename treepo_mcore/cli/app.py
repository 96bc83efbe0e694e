"""The command `treepo-mcore`. Heavy imports wait until the environment is prepared and the configuration is read."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from treepo_mcore.cli import checkpoint as checkpoint_command
from treepo_mcore.cli import config as config_command
from treepo_mcore.cli import launch, plan, trees
from treepo_mcore.cli.compare import compare
from treepo_mcore.cli.health import health
from treepo_mcore.cli.report import report
from treepo_mcore.cli.study import study
from treepo_mcore.config import ConfigError, load_config
from treepo_mcore.observe.logs import set_up_logging
from treepo_mcore.system.environment import prepare_environment
from treepo_mcore.system.signals import STOPPED, StopRequest
from treepo_mcore.system.time_limit import seconds_of

if TYPE_CHECKING:
    from treepo_mcore.trainer import Trainer

OTHERS_WAIT_SECONDS = 10

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(config_command.app, name="config")
app.add_typer(checkpoint_command.app, name="checkpoint")
app.add_typer(trees.app, name="trees")
app.add_typer(plan.app, name="plan")
app.add_typer(launch.app, name="launch")
app.command()(study)
app.command()(report)
app.command()(compare)
app.command()(health)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as many as you like")]


TimeLimit = Annotated[
    str, typer.Option(help="of this job, as sbatch takes it: it saves in time and exits with status 75")
]


@app.callback()
def _root() -> None:
    """Tree-structured reinforcement learning with Megatron-Core and vLLM."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check all that can be checked without the cluster, in this process alone")
    ] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="with --dry-run: of the cluster; 1 unless told")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="with --dry-run; 8 unless told")] = None,
    time_limit: TimeLimit = "UNLIMITED",
) -> None:
    """Train a policy, on every process of: torchrun --nproc-per-node N -m treepo_mcore train CONFIG [key=value]...

    SIGUSR1 or SIGTERM to any rank: all finish the step, save, and exit with status 75; the same command continues.
    """
    settings = load_config(config, overrides)
    set_up_logging(settings.run.log_level)
    if dry_run:
        from treepo_mcore.plan.dry_run import dry_run as on_paper

        print("\n".join(on_paper(settings, nodes or 1, gpus_per_node or 8)), flush=True)
        return
    if nodes or gpus_per_node:
        raise ConfigError("--nodes, --gpus-per-node: only with --dry-run; torchrun says how many processes train")
    stop = StopRequest(seconds_of(time_limit, "--time-limit"))
    stop.listen()
    from treepo_mcore.trainer import Trainer

    _run(Trainer(settings, stop))


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    time_limit: TimeLimit = "UNLIMITED",
) -> None:
    """Teach a model by example: the answer column of data.train is what it is to say. Started, stopped and continued as
    train is; trainer.prompts_per_update rows a step.
    """
    settings = load_config(config, overrides)
    set_up_logging(settings.run.log_level)
    stop = StopRequest(seconds_of(time_limit, "--time-limit"))
    stop.listen()
    from treepo_mcore.supervised import SupervisedTrainer

    _run(SupervisedTrainer(settings, stop))


@app.command("eval")
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Answer the held-out prompts with the newest checkpoint of run.dir, or the model where there is none.

    Started like train, on every process of torchrun or alone. Prints one JSON object, which is also in run.dir's
    eval.json; nothing else in run.dir changes.
    """
    settings = load_config(config, overrides)
    set_up_logging(settings.run.log_level)
    if not settings.held_out:
        raise ConfigError("data.eval: found no held-out prompts, which are what eval answers")
    from treepo_mcore.evaluator import evaluate_newest

    _print(evaluate_newest(settings))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one object instead of the table")] = False,
) -> None:
    """Say what this machine has for a run, what of it is used, and what the rest costs.

    Exit status 0 when a run can start here, else 1.
    """
    from treepo_mcore.system import doctor as examination

    facts = examination.examine()
    print(json.dumps(examination.as_json(facts), indent=1) if as_json else examination.table(facts))
    raise typer.Exit(0 if examination.can_start(facts) else 1)


def _run(trainer: Trainer) -> None:
    summary = trainer.run()
    _print(summary)
    if "stopped" in summary:
        sys.exit(STOPPED)


def _print(result: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)


def main() -> None:
    """Entry point; a `ConfigError` becomes one line and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any text can be shown, on any terminal
    prepare_environment()
    try:
        app()
    except ConfigError as error:
        _fail(error)


def _fail(error: ConfigError) -> NoReturn:
    """Rank 0 speaks. The others usually found the same: they give it time, and torchrun ends them meanwhile."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHERS_WAIT_SECONDS)
    print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
