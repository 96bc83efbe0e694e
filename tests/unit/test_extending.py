"""docs/extending.md: its code runs as it stands, and what is wrong with a name is said in one line."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trees import random_tree, step_of

from treepo_mcore.checks import _functions
from treepo_mcore.config import AdvantageConfig, ConfigError, LossConfig, RolloutConfig, parse_config
from treepo_mcore.grow.branching import make_allocation
from treepo_mcore.grow.pruning import PathView, make_pruner
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.learn.correction import find_correction
from treepo_mcore.learn.loss import find_loss
from treepo_mcore.learn.packing import find_packing, pack_trees
from treepo_mcore.named import function_named
from treepo_mcore.observe.observer import Wish
from treepo_mcore.observe.trackers import open_trackers

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
NAMES = {
    "advantage": {"estimator": "page:median_baseline"},
    "actor": {"loss": {"form": "page:cispo"}, "correction": "page:smooth", "packing": "page:one_tree_a_sequence"},
    "rollout": {
        "sampler": "page:fork_once",
        "tree": {"branching": {"allocation": "page:to_the_longest"}, "pruning": {"function": "page:hopeless"}},
    },
    "reward": {"function": "page:even"},
    "run": {"trackers": ["page:Lines"]},
}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's code as a module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    (tmp_path / "page.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "page", raising=False)
    return __import__("page")


def config(tmp_path, **sections):
    run = {"dir": str(tmp_path)} | sections.pop("run", {})
    return parse_config({"model": {"path": "m"}, "data": {"train": "t"}, "run": run, **sections})


def test_every_name_of_the_page_is_accepted(page, tmp_path):
    settings = config(tmp_path, **NAMES)
    _functions(SimpleNamespace(config=settings, learns=True))
    tracker = open_trackers(settings, 0)[0]
    tracker.write(3, {"a": 1})
    tracker.close()
    assert (tmp_path / "lines.txt").read_text() == "[3, 1]\n"
    assert function_named("page:even")("ab", "", "", {}) == 1.0


def test_estimator_and_packing_of_the_page(page):
    trees = [random_tree(seed) for seed in range(3)]
    worth = advantages(trees, AdvantageConfig(estimator="page:median_baseline", whiten="none"))
    rewards = np.array([leaf.reward for leaf in trees[0].leaves])
    assert np.allclose(worth[0].values, rewards - np.median(rewards))
    mine, ours = find_packing("page:one_tree_a_sequence")(trees, worth, 500, 1), pack_trees(trees, worth, 500)
    edges = [torch.cat([sequence.edge_key for sequence in packed]).tolist() for packed in (mine, ours)]
    assert len(mine) == 3
    assert sorted(edges[0]) == sorted(edges[1])


def test_loss_and_correction_of_the_page(page):
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    good, bad = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, -1.0, -0.5])
    form = find_loss("page:cispo")
    form(logp, logp.detach(), good, bad, LossConfig()).sum().backward()
    assert logp.grad.tolist() == [-1.0, 1.0, -1.5]  # where ratios are 1 it is the policy gradient
    factors = find_correction("page:smooth")
    assert factors.level == "token"
    assert factors.factors(torch.tensor([0.0, 1.0]), 2.0).tolist() == pytest.approx([1.0, np.exp(-1)])


def test_shape_allocation_and_pruning_of_the_page(page):
    rollout = RolloutConfig.model_validate({"sampler": "page:fork_once", "tree": {"width": 8}})
    assert sampled_shape(rollout).branching.first == (4, 4)
    allocation = {"branching": {"allocation": "page:to_the_longest"}, "pruning": {"function": "page:hopeless"}}
    tree = RolloutConfig.model_validate({"tree": allocation}).tree
    grown = random_tree(3)
    counts = make_allocation(tree.branching, 0.0)(grown, [1, 2], 5, random.Random(0))
    assert sorted(counts) == [1, 4]
    assert make_pruner(tree.pruning)(PathView(grown, 1)) is False


def test_observer_of_the_page(page):
    step = step_of([])
    step.values = {"reward/accuracy": 1.0}
    assert page.StopWhenSolved().trained(step) is Wish.STOP


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"advantage": {"estimator": "treepoo"}}, "advantage.estimator: expected treepo, .*; did you mean treepo?"),
        ({"actor": {"loss": {"form": "clipp"}}}, "actor.loss.form: expected clip or .*; did you mean clip?"),
        ({"actor": {"packing": "trees"}}, "actor.packing: .*; did you mean tree?"),
        ({"actor": {"correction": "token_is"}}, "actor.correction: .*; did you mean token_tis?"),
        ({"rollout": {"sampler": "flatt"}}, "rollout.sampler: .*; did you mean flat?"),
        ({"rollout": {"tree": {"branching": {"allocation": "evn"}}}}, "branching.allocation: .*; did you mean even?"),
        (
            {"rollout": {"tree": {"pruning": {"function": "hopeless"}}}},
            "pruning.function: expected package.module:name",
        ),
        ({"advantage": {"estimator": "nowhere:f"}}, "advantage.estimator: cannot import 'nowhere:f': ModuleNotFound"),
        ({"advantage": {"estimator": "json:nothing"}}, "advantage.estimator: cannot import 'json:nothing': Attribute"),
        ({"advantage": {"estimator": "json:__doc__"}}, "advantage.estimator: 'json:__doc__' is not callable"),
        (
            {"advantage": {"estimator": "page:cispo"}},
            r"function of \(tree, rewards, config\), found page:cispo\(logp",
        ),
        ({"rollout": {"tree": {"pruning": {"function": "page:cispo"}}}}, r"pruning.function: expected a function of"),
    ],
)
def test_a_name_that_is_wrong_is_one_line(section, message, page, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        _functions(SimpleNamespace(config=config(tmp_path, **section), learns=True))
    assert "\n" not in str(caught.value)


def test_a_tracker_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"run.trackers: expected .*, prometheus or .*; did you mean wandb?"):
        open_trackers(config(tmp_path, run={"trackers": ["wandbb"]}), 0)


def test_an_estimator_that_gives_the_wrong_shape_is_named(page):
    page.wrong = lambda tree, rewards, config: rewards[:-1]
    with pytest.raises(ValueError, match=r"page:wrong gave the shape \(\d+,\), expected"):
        advantages([random_tree(1)], AdvantageConfig(estimator="page:wrong"))
