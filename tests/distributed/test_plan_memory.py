"""What the planner says of memory, against bytes that a live actor really holds."""

from __future__ import annotations

import pytest
from harness import launch

from treepo_mcore.actor.costs import actor_state, stage_activations, working
from treepo_mcore.config import ActorConfig
from treepo_mcore.model.architecture import read_sizes
from treepo_mcore.model.shards import stages

VOCAB, TOKENS, WITHIN = 2048, 1024, 0.1
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
}
LAYOUTS = {
    1: {"plain": {}, "recompute full": {"recompute": "full"}},
    2: {
        "tp2": {"tp": 2},
        "tp2 sp": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2},
        "dp2 distributed optimizer": {"optimizer": {"distributed": True}},
    },
}


def settings(layout):
    return {"dtype": "float32", "optimizer": {"distributed": False}} | layout


@pytest.mark.parametrize("processes", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_planned_bytes_are_those_of_a_live_actor(model_directory, family, processes):
    directory = model_directory(family, tokenizer=False, **SIZES)
    layouts = {name: settings(layout) for name, layout in LAYOUTS[processes].items()}
    arguments = {"directory": str(directory), "layouts": layouts, "tokens": TOKENS, "vocab": VOCAB}
    sizes = read_sizes(directory)
    wrong = []
    for rank, results in enumerate(launch("plan_memory:measure", processes, arguments)):
        for name, measured in results.items():
            planned = plan(layouts[name], sizes, rank, processes)
            for item, size in planned.items():
                if abs(size / measured[item] - 1) > WITHIN:
                    wrong.append(f"{name}, rank {rank}, {item}: planned {size}, measured {measured[item]}")
    assert not wrong, "\n".join(wrong)


def plan(layout, sizes, rank, processes):
    """Bytes as in `plan_memory.measure`: state, and what an update takes on top at its height."""
    actor = ActorConfig.model_validate(layout)
    stage = stages(actor, sizes.layers)[rank if actor.pp > 1 else 0]
    height = stage_activations(actor, sizes, stage, TOKENS, cpu=True)
    height += sum(working(actor, sizes, stage, TOKENS, cpu=True).values())
    return actor_state(actor, sizes, stage, processes // (actor.tp * actor.pp)) | {"peak": height}
