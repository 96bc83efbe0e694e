"""On every rank: checkpoints that are written by a thread while training goes on."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import mini_batches, noise
from log_probs import make_actor

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.saver import Keep, Saver
from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.learn.loss import PolicyObjective

EVERYTHING = {"parameters", "gradients", "optimizer"}


def learn(actor: Actor, trees: str) -> None:
    for batch in mini_batches(actor, trees, 5, "tree"):
        actor.set_step(0)
        old = [o[0] + noise(s) for s, o in zip(batch, actor.log_probs(batch), strict=True)]
        actor.update(batch, old, PolicyObjective(actor.config))


def content(actor: Actor) -> dict[str, torch.Tensor]:
    """Weights, float32 weights, moments and steps, as this rank holds them."""
    found = {name: tensor.detach().clone() for name, tensor in actor.tensors.items()}
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for place, group in enumerate(part.optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                found[f"main {place} {number}"] = parameter.detach().clone()
                for name, value in part.optimizer.state[parameter].items():
                    found[f"{name} {place} {number}"] = torch.as_tensor(value).clone()
    return found


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def write_and_train(directory: str, trees: str, out: str, settings: dict[str, Any], offload: bool) -> dict[str, Any]:
    """Save in both forms; the actor learns on while the threads are held up; then load what was saved."""
    folder, found = Path(out), {}
    actor = make_actor(Path(directory), settings)
    learn(actor, trees)
    saver = Saver(folder, Keep(2), timeout_seconds=60)
    for step, form in enumerate(("dp_reshardable", "fully_reshardable"), 1):
        before = content(actor)
        go_on = hold(saver)
        saver.plan(step, actor, {"step": step}, form)
        if offload:
            actor.memory.keep({"parameters"})
        assert saver.planned is not None
        found[f"{form} planned"] = saver.planned.bytes()
        saver.write(actor.memory)
        found[f"{form} part"] = sorted(
            file.name for file in folder.iterdir() if file.name.startswith(f"iter_000000{step}")
        )
        if not offload:
            learn(actor, trees)
            found[f"{form} moved"] = len(differ(before, content(actor))) > 0
        go_on.set()
        saver.wait()
        actor.memory.keep(EVERYTHING)
        newest = checkpoint.newest(folder)
        assert newest is not None
        found[f"{form} newest"] = newest.name
        files = newest.glob(f"__{dist.get_rank()}_*")
        found[f"{form} written"] = sum(file.stat().st_size for file in files)
        other = make_actor(Path(directory), settings)
        checkpoint.load(newest, other)
        found[f"{form} differ"] = differ(before, content(other))
        checkpoint.load(newest, actor)
    return found


def hold(saver: Saver) -> threading.Event:
    """Its thread begins to write when the event is set."""
    event, write = threading.Event(), saver._write
    saver._write = lambda planned: (event.wait(60), write(planned))  # type: ignore[method-assign]
    return event


def hand_on(directory: str, trees: str, out: str, form: Any) -> dict[str, int]:
    """Load the newest checkpoint, or learn where there is none, and save; the sizes of the files."""
    folder, step = Path(out), 1
    actor = make_actor(Path(directory), {})
    if newest := checkpoint.newest(folder):
        checkpoint.load(newest, actor)
        step = int(newest.name.removeprefix("iter_")) + 1
    else:
        learn(actor, trees)
    saver = Saver(folder, Keep(9), timeout_seconds=60)
    saver.plan(step, actor, {}, form)
    saver.write(actor.memory)
    saver.wait()
    return {file.name: file.stat().st_size for file in (folder / f"iter_{step:07d}").iterdir()}


def fail(directory: str, trees: str, out: str) -> str:
    """The last rank cannot write: all ranks are told, and the tracker does not move."""
    actor, folder = make_actor(Path(directory), {}), Path(out)
    learn(actor, trees)
    saver = Saver(folder, Keep(1), timeout_seconds=60)
    saver.plan(1, actor, {}, "dp_reshardable")
    assert saver.planned is not None
    if dist.get_rank() == dist.get_world_size() - 1:
        buckets = saver.planned.writer.write_buckets
        saver.planned.writer.write_buckets = [("/dev/full", name, values) for _, name, values in buckets]
    saver.write(actor.memory)
    with pytest.raises(RuntimeError) as caught:
        saver.wait()
    assert checkpoint.newest(folder) is None
    saver.plan(2, actor, {}, "dp_reshardable")
    saver.write(actor.memory)
    saver.wait()
    assert sorted(file.name for file in folder.iterdir()) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    return str(caught.value)


def _saved_once(directory: str, trees: str, out: str) -> tuple[Actor, Path, Saver]:
    """An actor that has learnt, and the folder with its first checkpoint."""
    actor, folder = make_actor(Path(directory), {}), Path(out)
    learn(actor, trees)
    saver = Saver(folder, Keep(2), timeout_seconds=60)
    saver.plan(1, actor, {}, "dp_reshardable")
    saver.write(actor.memory)
    saver.wait()
    return actor, folder, saver


def fill_the_disk(directory: str, trees: str, out: str) -> str:
    """There is room for one checkpoint: the second is refused on all ranks, and the first stays."""
    actor, folder, saver = _saved_once(directory, trees, out)
    with pytest.raises(RuntimeError) as caught:
        saver.plan(2, actor, {}, "dp_reshardable")
    saver._check_room = lambda planned: None  # type: ignore[method-assign]  # somebody else fills it meanwhile
    saver.plan(2, actor, {}, "dp_reshardable")
    saver.write(actor.memory)
    with pytest.raises(RuntimeError, match="No space left on device"):
        saver.wait()
    newest = checkpoint.newest(folder)
    assert newest is not None
    checkpoint.load(newest, actor)
    return str(caught.value)


def write_protect_the_disk(directory: str, trees: str, out: str) -> str:
    """Behind one checkpoint the file system takes no more: all ranks are told, and the first one loads."""
    actor, folder, saver = _saved_once(directory, trees, out)
    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    dist.barrier()
    with pytest.raises(RuntimeError) as caught:
        saver.plan(2, actor, {}, "dp_reshardable")
    newest = checkpoint.newest(folder)
    assert newest is not None
    checkpoint.load(newest, actor)
    return str(caught.value)


def refuse_a_layout(directory: str, trees: str, out: str) -> str:
    """What two pipeline stages wrote while they ran is not for tensor parallelism."""
    actor, folder = make_actor(Path(directory), {"pp": 2}), Path(out)
    learn(actor, trees)
    saver = Saver(folder, Keep(1), timeout_seconds=60)
    state = {"step": 1, "prompts": {}, "rollout": {}, "optimizer": {}}
    saver.plan(1, actor, state, "dp_reshardable")
    saver.write(actor.memory)
    saver.wait()
    newest = checkpoint.newest(folder)
    assert newest is not None
    layout = checkpoint.read_state(newest)["layout"]
    checkpoint.check_layout(newest, layout, ActorConfig(pp=2))
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_layout(newest, layout, ActorConfig(tp=2))
    return str(caught.value)


def change_rate(directory: str, trees: str, out: str) -> dict[str, Any]:
    """Saved with one learning rate, loaded with another, which is the one that the next update has."""
    folder, rates = Path(out), ({"lr": 1e-3, "min_lr": 1e-4}, {"lr": 5e-4, "min_lr": 0.0})
    actor = make_actor(Path(directory), {"optimizer": rates[0]})
    learn(actor, trees)
    before, saver = content(actor), Saver(folder, Keep(9), timeout_seconds=60)
    found: dict[str, Any] = {"differ": [], "rates": []}
    for step, form in enumerate(("dp_reshardable", "fully_reshardable"), 1):
        saver.plan(step, actor, {}, form)
        saver.write(actor.memory)
        saver.wait()
        other = make_actor(Path(directory), {"optimizer": rates[1]})
        checkpoint.load(folder / f"iter_000000{step}", other)
        found["differ"] += differ(before, content(other))
        other.set_step(0)
        found["rates"].append(other.learning_rate)
    return found
