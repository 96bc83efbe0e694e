"""Settings under which no step could teach anything."""

import pytest

from treepo_mcore.config import ConfigError, parse_config
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.learn.signal import check_signal

WIDE = {"width": 4}
ALONE = {"width": 4, "branching": {"factor": [1, 1]}, "fallback": {"candidates": "none"}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tree": ALONE}, "rollout.tree.branching: a path never forks and none restarts, and filter.enabled"),
        ({"tree": ALONE | {"branching": {"first": [1, 1]}, "max_depth": 1}}, "rollout.tree.branching: a path never"),
        ({"tree": {"width": 1}, "filter": False, "estimator": "segment"}, "advantage.estimator: segment is always 0"),
        ({"tree": {"width": 1}, "filter": False, "estimator": "brownian"}, "advantage.estimator: brownian is always"),
        ({"tree": {"width": 1}, "filter": False, "prompts": 1}, "treepo is always 0"),
        ({"tree": WIDE, "reward": {"correct": 1, "wrong": 1}}, "reward.correct: 1 is not more than reward.wrong = 1"),
        ({"tree": WIDE}, None),
        ({"tree": {"width": 1}, "filter": False}, None),
        ({"tree": {"width": 1}, "filter": False, "estimator": "grpo", "prompts": 1}, None),
        ({"tree": ALONE | {"branching": {"factor": [1, 2]}}}, None),
        ({"tree": ALONE | {"fallback": {}}}, None),
        ({"tree": ALONE, "sampler": "flat"}, None),
    ],
)
def test_settings_under_which_nothing_can_be_learned(settings, words):
    prompts = settings.get("prompts", 8)
    config = parse_config(
        {
            "model": {"path": "m"},
            "data": {"train": "t", "max_prompt_tokens": 16},
            "rollout": {"tree": {"segment_tokens": 16} | settings["tree"], "sampler": settings.get("sampler", "tree")},
            "filter": {"enabled": settings.get("filter", True)},
            "advantage": {"estimator": settings.get("estimator", "treepo")},
            "reward": settings.get("reward", {}),
            "trainer": {"prompts_per_step": prompts, "prompts_per_update": prompts},
        }
    )
    if words is None:
        check_signal(config, sampled_shape(config.rollout))
    else:
        with pytest.raises(ConfigError, match=words):
            check_signal(config, sampled_shape(config.rollout))
