"""Every preset is a valid configuration."""

from pathlib import Path

import pytest

from treepo_mcore.config import load_config

PRESETS = sorted((Path(__file__).parents[2] / "examples" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_loads(preset):
    config = load_config(preset, ["model.path=somewhere", "data.train=prompts.jsonl"])
    assert config.rollout.tree.response_tokens > 0


def test_the_paper_is_there():
    tree = load_config(next(path for path in PRESETS if path.stem == "paper")).rollout.tree
    assert (tree.width, tree.segment_tokens, tree.max_depth, tree.branching.factor) == (16, 512, 14, (2, 2))
