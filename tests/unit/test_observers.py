"""Observers: what is asked, and files that are written beside the run."""

import pytest
import torch.distributed as dist
from trees import random_tree, step_of

from treepo_mcore.observe.metrics import Clock
from treepo_mcore.observe.observer import Observer, Observers, Wish
from treepo_mcore.observe.trees import TreeWriter
from treepo_mcore.tree.jsonl import read_trees


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Asks(Observer):
    def __init__(self, wish):
        self.wish = wish

    def trained(self, step):
        return self.wish


@pytest.mark.parametrize("order", [(Wish.STOP, Wish.SAVE), (Wish.SAVE, Wish.STOP)])
def test_the_greatest_wish_counts(order):
    assert Observers([Asks(wish) for wish in order]).trained(step_of([])) is Wish.STOP
    assert Observers([Asks(order[0])]).sampled(step_of([])) is Wish.NOTHING
    assert Observers().trained(step_of([])) is Wish.NOTHING


def test_trees_are_written_whole_and_behind_the_run(tmp_path):
    trees = [random_tree(seed) for seed in range(3)]
    writer = TreeWriter(tmp_path, 2)
    for number in range(3):
        writer.trained(step_of(trees, number))
    writer.close()
    assert sorted(file.name for file in (tmp_path / "trees").iterdir()) == ["step_000000.jsonl", "step_000002.jsonl"]
    found = list(read_trees(tmp_path / "trees" / "step_000002.jsonl"))
    assert [tree.to_json() for tree in found] == [tree.to_json() for tree in trees]


def test_trees_that_cannot_be_written_end_the_run(tmp_path):
    (tmp_path / "trees").write_text("a file where a folder should be")
    writer = TreeWriter(tmp_path, 1)
    writer.trained(step_of([random_tree(0)]))
    with pytest.raises(FileExistsError):
        writer.close()


def test_a_clock_leaves_nothing_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    told = []
    clock = Clock(told.append)
    for name, seconds in (("push", 1.0), ("rollout", 2.0), ("push", 4.0)):
        with clock.part(name):
            now[0] += seconds
        now[0] += 0.5  # of no part
    assert clock.look() == {"push": 5.0, "rollout": 2.0, "step": 8.5}
    with clock.part("observe"):
        now[0] += 3.0
    assert clock.look() == {"observe": 3.0, "step": 3.0}
    assert told == ["push", "rollout", "push", "observe"]
