"""On every rank: the converter with a command line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import in_hf, mini_batches
from log_probs import make_actor
from push import Allocations, step
from safetensors.torch import save_file
from torch import Tensor

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.saver import save
from treepo_mcore.weights.hf import Gatherer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def run(commands: list[list[str]]) -> None:
    """One after the other, in groups of their own."""
    from megatron.core import parallel_state

    for command in commands:
        parallel_state.destroy_model_parallel()
        sys.argv = [str(TOOL), *command]
        runpy.run_path(str(TOOL), run_name="__main__")


def train_and_run(directory: str, settings: dict[str, Any], trees: str, out: str, command: list[str]) -> None:
    """An optimizer step and a checkpoint of all there is, as in a run, in `out`; then the command.

    The weights are also written to `out`/weights.safetensors, gathered from the actor.
    """
    actor = make_actor(Path(directory), settings)
    step(actor, mini_batches(actor, trees, 4, "tree")[0])
    save(Path(out), 1, actor, {"step": 1}, keep=1)
    weights, _ = in_hf(actor, actor.tensors)
    check_gathered_on_one_rank(actor, weights)
    if dist.get_rank() == 0:
        save_file(weights, Path(out) / "weights.safetensors")
    run([command])


def check_gathered_on_one_rank(actor: Actor, weights: dict[str, Tensor]) -> None:
    """Rank 1 gets every tensor, and has one and a share of it at a time; the others only ever have their share."""
    count = 0
    with Allocations() as made:
        gatherer = Gatherer(actor.arch, actor.pieces, actor.tensors, torch.float32)
        for name in gatherer.shapes:
            full = gatherer.get(name, to=1)
            if full is not None:
                assert torch.equal(full, weights[name]), name
                count += 1
            del full
    share = max(piece.numel for piece in actor.pieces) * 4
    if dist.get_rank() == 1:
        assert count == len(weights)
        share = 2 * max(tensor.nbytes for tensor in weights.values())
    else:
        assert count == 0
    assert 0 < made.peak <= share + 8, made.peak  # a barrier takes a byte
