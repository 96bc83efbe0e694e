"""On every rank: whole runs of the trainer, and checkpoints that change their layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import in_hf, mini_batches, noise
from log_probs import make_actor

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.saver import save
from treepo_mcore.config import ConfigError, parse_config
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.observe.guard import BadNumbersError
from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step
from treepo_mcore.trainer import Trainer

STATE = {"step": 2, "prompts": {}, "rollout": {}, "optimizer": {}}


def train(config: dict[str, Any]) -> dict[str, Any]:
    """A run from beginning, or checkpoint, to end."""
    return Trainer(parse_config(config)).run()


def train_without_a_step(config: dict[str, Any], unlearned: str) -> dict[str, Any]:
    """A run of no steps, and a checkpoint of an actor that never made an update."""
    trainer = Trainer(parse_config(config))
    summary = trainer.run()
    save(Path(unlearned), 1, trainer.policy.actor, {}, keep=1)
    checkpoint.load(Path(unlearned) / "iter_0000001", trainer.policy.actor)
    return summary


def steps(actor: Actor, trees: str, out: Path) -> None:
    """Two updates, from where the optimizer stands; rank 0 saves the weights."""
    metrics = []
    for batch in mini_batches(actor, trees, 5, "tree"):
        actor.set_step(0)
        old = [o[0] + noise(s) for s, o in zip(batch, actor.log_probs(batch), strict=True)]
        metrics.append(actor.update(batch, old, PolicyObjective(actor.config)))
    save_weights(actor, out, metrics)


def save_weights(actor: Actor, out: Path, metrics: Any = None) -> None:
    """In Hugging Face coordinates."""
    named, gap = in_hf(actor, actor.tensors)
    if dist.get_rank() == 0:
        torch.save({"weights": named, "metrics": metrics, "gap": gap}, out)


def change_layout(
    directory: str, first: dict[str, Any], others: dict[str, dict[str, Any]], trees: str, out: str
) -> dict[str, float]:
    """Train under `first`, save, go on; then load under each of `others` and go on from there.

    Returns the seconds that saving and each loading took.
    """
    folder, seconds = Path(out), {}
    actor = make_actor(Path(directory), first)
    steps(actor, trees, folder / "before.pt")
    begin = time.perf_counter()
    save(folder / "checkpoints", 2, actor, STATE, keep=1)
    seconds["save"] = time.perf_counter() - begin
    steps(actor, trees, folder / "after.pt")
    for name, settings in others.items():
        actor = make_actor(Path(directory), settings)
        begin = time.perf_counter()
        found = checkpoint.newest(folder / "checkpoints")
        assert found is not None
        layout = {"form": "fully_reshardable"} | {key: first.get(key, 1) for key in ("tp", "pp", "ep", "etp")}
        optimizer = actor.config.optimizer.model_dump(mode="json")
        assert checkpoint.read_state(found) == STATE | {"layout": layout, "optimizer": optimizer}
        checkpoint.load(found, actor)
        seconds[name] = time.perf_counter() - begin
        save_weights(actor, folder / f"before {name}.pt")
        steps(actor, trees, folder / f"after {name}.pt")
    refuse_a_flipped_bit(folder / "checkpoints", actor)
    return seconds


def refuse_a_flipped_bit(folder: Path, actor: Actor) -> None:
    """Every rank names the file, and nothing is loaded."""
    found = checkpoint.newest(folder)
    assert found is not None
    file = max(found.glob("*.distcp"))
    if dist.get_rank() == 0:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    before = {name: tensor.clone() for name, tensor in actor.tensors.items()}
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(found, actor)
    assert str(caught.value).startswith(f"{file}: not as it was written")
    assert all(torch.equal(tensor, before[name]) for name, tensor in actor.tensors.items())


class Wishes(Observer):
    """Asks for a checkpoint after the first step, for no update in the second, and for the end after the third."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def sampled(self, step: Step) -> Wish:
        self.told.append(f"sampled {step.number}: {len(step.kept)} trees, {len(step.advantages)} advantages")
        return Wish.SKIP if step.number == 1 and dist.get_rank() == 1 else Wish.NOTHING  # on one rank alone

    def trained(self, step: Step) -> Wish:
        self.told.append(f"trained {step.number}: {step.mini_batches}, {len(step.advantages)} advantages")
        if dist.get_rank() == 0:
            return Wish.NOTHING
        return {0: Wish.SAVE, 2: Wish.STOP}.get(step.number, Wish.NOTHING)


def watched(config: dict[str, Any]) -> dict[str, Any]:
    """A run with an observer of its own; what the observer was told and what `run` returned."""
    wishes = Wishes()
    trainer = Trainer(parse_config(config), observers=[wishes])
    return {"summary": trainer.run(), "told": wishes.told}


class Spoilt(Observer):
    """Finds steps 2 and 4 bad, and remembers the weights that every step begins with, and its prompts."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.weights: list[float] = []
        self.prompts: list[list[str]] = []

    def sampled(self, step: Step) -> Wish:
        assert self.trainer is not None
        tensors = self.trainer.policy.actor.tensors.values()
        self.weights.append(sum(float(tensor.double().abs().sum()) for tensor in tensors))
        self.prompts.append(sorted(tree.prompt_id for tree in step.batch.trees))
        return Wish.NOTHING

    def trained(self, step: Step) -> Wish:
        if step.number in (2, 4):
            raise BadNumbersError(f"step {step.number}: spoilt")
        return Wish.NOTHING


def roll_back(config: dict[str, Any]) -> dict[str, Any]:
    """A run that goes back once, and ends with the error the second time."""
    spoilt = Spoilt()
    spoilt.trainer = Trainer(parse_config(config), observers=[spoilt])
    with pytest.raises(BadNumbersError, match="step 4: spoilt"):
        spoilt.trainer.run()
    return {"weights": spoilt.weights, "prompts": spoilt.prompts}


class Asleep(Observer):
    """Rank 1 never comes back from the second step."""

    def sampled(self, step: Step) -> Wish:
        if step.number == 1 and dist.get_rank() == 1:
            time.sleep(600)
        return Wish.NOTHING


def get_stuck(config: dict[str, Any]) -> None:
    """A run with a rank that sleeps."""
    Trainer(parse_config(config), observers=[Asleep()]).run()
