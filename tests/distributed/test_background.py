"""Checkpoints written by a thread: what they hold, when they have their name, and what happens when writing fails."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.distributed as dist
from harness import launch
from megatron.core import dist_checkpointing
from trees import random_tree

from treepo_mcore.system.placement import init_process_group
from treepo_mcore.tree.files import write_trees

LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "plain optimizer": {"optimizer": {"distributed": False}}}

LONG = (("tp2", True), ("pp2", False), ("plain optimizer", False))


@pytest.fixture
def arguments(model_directory, tmp_path):
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, leaves=7) for seed in range(10)])
    return {
        "directory": str(model_directory("qwen3", tie_word_embeddings=True)),
        "trees": str(tmp_path / "trees.jsonl"),
        "out": str(tmp_path / "checkpoints"),
    }


@pytest.mark.parametrize(
    ("layout", "offload"),
    [("dp2", False), ("dp2", True), *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
)
def test_what_is_saved_is_what_was_there_when_it_was_planned(layout, offload, arguments):
    """Weights, moments and steps, bit for bit, although training went on before a byte was written."""
    for found in launch("background:write_and_train", 2, arguments | {"settings": LAYOUTS[layout], "offload": offload}):
        for step, form in enumerate(("dp_reshardable", "fully_reshardable"), 1):
            assert found[f"{form} part"] == [f"iter_000000{step}.part"]
            assert found[f"{form} newest"] == f"iter_000000{step}"
            assert found.get(f"{form} moved", True)
            assert found[f"{form} differ"] == []
            overhead = 500_000  # of archives and tables; one tensor written too often is millions
            assert found[f"{form} written"] < found[f"{form} planned"] + overhead


def test_replicas_come_and_go(arguments):
    """Saved while two, four and one replicas run: what was learnt before is there, bit for bit."""
    out = arguments["out"]
    for processes, form in ((1, "fully"), (2, "dp"), (4, "dp"), (2, "dp"), (1, "fully")):
        sizes = launch("background:hand_on", processes, arguments | {"form": f"{form}_reshardable"})[0]
        written = [sum(size for name, size in sizes.items() if name.startswith(f"__{r}_")) for r in range(processes)]
        assert max(written) < 1.1 * min(written), written  # each rank writes its share
    init_process_group()
    first, last = (dist_checkpointing.load_plain_tensors(f"{out}/iter_000000{step}") for step in (1, 5))
    dist.destroy_process_group()
    assert first.keys() == last.keys()
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    assert len([name for name in tensors if "exp_avg" in name]) > 10
    assert all(torch.equal(first[name], last[name]) for name in tensors)


def test_a_rank_that_cannot_write_fails_on_all(arguments):
    for told in launch("background:fail", 2, arguments):
        assert "iter_0000001.part: rank 1 on " in told
        assert "No space left on device" in told


def test_a_full_disk_is_told_before_anything_is_written(arguments, small_disk):
    for told in launch("background:fill_the_disk", 2, arguments | {"out": str(small_disk)}):
        assert told.startswith(f"{small_disk}: a checkpoint of 10 MiB, but ")


def test_a_disk_that_became_read_only_is_told_on_all(arguments, small_disk):
    for told in launch("background:write_protect_the_disk", 2, arguments | {"out": str(small_disk)}):
        assert told.startswith(f"checkpoint {small_disk}/iter_0000002.part: rank 0 on ")
        assert "Read-only file system" in told


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB of its own, which only root can have."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs to mount a file system, which this machine does not allow")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_another_layout_is_refused_before_it_is_loaded(arguments):
    for told in launch("background:refuse_a_layout", 2, arguments):
        assert told.startswith("actor.tp, actor.pp, actor.ep, actor.etp: found 2, 1, 1, 1; ")
        assert "loads with 1, 2, 1, 1 alone; `treepo-mcore checkpoint reshard`" in told


def test_the_learning_rate_may_be_another(arguments):
    for found in launch("background:change_rate", 2, arguments):
        assert found == {"differ": [], "rates": [5e-4, 5e-4]}
