"""Every preset is a valid configuration."""

from pathlib import Path

import pytest

from treepo_mcore.config import load_config

PRESETS = sorted((Path(__file__).parents[2] / "examples" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_loads(preset):
    config = load_config(preset, ["model.path=somewhere", "data.train=prompts.jsonl"])
    assert config.rollout.tree.response_tokens > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [  # the paper, section 4, and its released script
        ("data.max_prompt_tokens", 1024),
        ("data.overlong_prompts", "drop"),
        ("rollout.temperature", 1.0),
        ("rollout.tree.width", 16),
        ("rollout.tree.segment_tokens", 512),
        ("rollout.tree.max_depth", 14),
        ("rollout.tree.branching.factor", (2, 2)),
        ("rollout.tree.branching.first", (2, 8)),
        ("filter.enabled", True),
        ("filter.max_prompts_factor", 9.0),  # three calls of three times the step's prompts
        ("advantage.estimator", "treepo"),
        ("advantage.aggregation", "average"),
        ("advantage.reject_uniform_subgroups", False),
        ("actor.micro_batch_tokens", 8192),
        ("actor.old_logprobs", "recompute"),
        ("actor.reference", "none"),
        ("actor.optimizer.lr", 1e-6),
        ("actor.optimizer.lr_decay", "constant"),
        ("actor.optimizer.warmup_steps", 10),
        ("actor.optimizer.weight_decay", 0.1),
        ("actor.optimizer.clip_grad", 1.0),
        ("actor.loss.aggregation", "token_mean"),
        ("actor.loss.clip_low", 0.2),
        ("actor.loss.clip_high", 0.28),
        ("actor.loss.dual_clip", 10.0),
        ("actor.loss.entropy_coef", 0.0),
        ("actor.loss.kl_coef", 0.0),
        ("reward.function", "math"),
        ("reward.correct", 1.0),
        ("reward.wrong", -1.0),
        ("reward.timeout", 5.0),
        ("reward.overlong_buffer_tokens", 512),
        ("reward.overlong_penalty", 1.0),
        ("trainer.steps", 450),
        ("trainer.prompts_per_step", 512),
        ("trainer.prompts_per_update", 32),
        ("trainer.eval_every", 10),
        ("trainer.eval_samples", 16),
        ("trainer.save_every", 50),
    ],
)
def test_the_paper_is_the_papers(key, value):
    found = load_config(next(path for path in PRESETS if path.stem == "paper"))
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
