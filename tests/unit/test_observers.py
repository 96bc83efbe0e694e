"""Observers: what is asked, and files that are written beside the run."""

import pytest
import torch.distributed as dist
from trees import random_tree, step_of

from treepo_mcore.config import FilterConfig, RewardConfig
from treepo_mcore.observe.guard import NothingToLearnError, PatienceGuard, RewardError, RewardGuard
from treepo_mcore.observe.metrics import Clock
from treepo_mcore.observe.observer import Observer, Observers, Wish
from treepo_mcore.observe.progress import Progress
from treepo_mcore.observe.trees import TreeWriter
from treepo_mcore.system.placement import colocated
from treepo_mcore.tree.files import read_trees


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
    for index, tree in enumerate(trees):
        tree.meta["number"] = index
    writers = [TreeWriter(tmp_path, 2, colocated(rank, 2, 1)) for rank in range(2)]
    (tmp_path / "trees" / "step_000004").mkdir(parents=True)  # of an attempt that got further
    for writer in writers:
        writer.start(0)
    for number in range(3):
        for writer, own in zip(writers, (trees[1:], trees[:1]), strict=True):
            step = step_of(trees, number)
            step.batch.own = own
            writer.trained(step)
    for writer in writers:
        writer.close()
    assert sorted(file.name for file in (tmp_path / "trees").iterdir()) == ["step_000000", "step_000002"]
    found = list(read_trees(tmp_path / "trees" / "step_000002"))
    assert [tree.to_json() for tree in found] == [tree.to_json() for tree in trees]


def test_trees_that_cannot_be_written_end_the_run(tmp_path):
    (tmp_path / "trees").write_text("a file where a folder should be")
    writer = TreeWriter(tmp_path, 1, colocated(0, 1, 1))
    writer.trained(step_of([random_tree(0)]))
    with pytest.raises(NotADirectoryError):
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


def taught_nothing(number, accuracy, kept=()):
    step = step_of(list(kept), number)
    step.values = {"reward/accuracy": accuracy}
    return step


def test_steps_that_teach_nothing_end_the_run_and_say_why():
    guard = PatienceGuard(FilterConfig(patience=3))
    for number, kept in enumerate([(), (), (random_tree(0),), (), ()]):
        guard.trained(taught_nothing(number, 0.0, kept))
    with pytest.raises(NothingToLearnError, match=r"step 5: .* in 3 steps in a row .* accuracy of 0.000 to 0.250"):
        guard.trained(taught_nothing(5, 0.25))
    for settings in ({"patience": 0}, {"enabled": False, "patience": 1}):
        PatienceGuard(FilterConfig(**settings)).trained(taught_nothing(0, 0.0))


def test_too_many_failed_reward_calls_end_the_run_before_an_update():
    step = step_of([], 4)
    step.batch.counts.rewards, step.batch.counts.failed_rewards = 100, 20
    RewardGuard(RewardConfig()).sampled(step)
    step.batch.counts.failed_rewards = 21
    with pytest.raises(
        RewardError, match=r"step 4: 21 of 100 calls of reward.function failed .* reward.max_failed = 0.2"
    ):
        RewardGuard(RewardConfig()).sampled(step)


def test_a_step_that_teaches_nothing_says_so(capsys):
    step = taught_nothing(0, 0.0)
    step.values |= {"reward/mean": -1.0, "rollout/response_tokens_mean": 3.0, "rollout/tokens_per_second": 5.0}
    step.seconds = {"rollout": 1.0}
    Progress(3).trained(step)
    assert "no informative prompt: nothing was trained" in capsys.readouterr().out
