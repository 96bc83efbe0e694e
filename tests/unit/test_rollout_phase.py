"""A whole rollout phase around a fake engine: what the tail cuts comes again, or not."""

import pytest
import torch.distributed as dist
from rollout_fake_engine import EOS_TOKEN, FakeEngine, FakeTokenizer, make_config, make_prompts

from treepo_mcore.actor.parallel import Grid
from treepo_mcore.data.prompts import PromptStream
from treepo_mcore.rollout.rollout import Rollout

GRID = Grid(rank=0, world=1, tp=1, tp_rank=0, pp=1, pp_rank=0, dp=1, dp_rank=0, engines=1, engine=0, engine_rank=0)


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def slow_last(request, position):
    """Prompts 8 and 9 of a step run to the longest length, the others end after two tokens."""
    return EOS_TOKEN if int(request.id.split(":")[0]) < 8 and position >= 1 else 5 + position % 7


@pytest.mark.parametrize(
    ("unfinished", "expected"),
    [("carry", ["p8", "p9", "p10", "p11"]), ("drop", ["p10", "p11", "p12", "p13"])],
)
def test_unfinished_prompts(unfinished, expected):
    config = make_config(
        {"tail_steps": 12, "unfinished": unfinished},
        filter={"enabled": False},
        trainer={"prompts_per_step": 10, "prompts_per_update": 10},
    )
    stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
    rollout = Rollout(config, GRID, FakeEngine(slow_last), FakeTokenizer(), None)
    trees, counts = rollout.collect(stream, 0)
    assert [tree.prompt_id for tree in trees] == [f"p{i}" for i in range(8)]
    assert counts.unfinished_prompts == 2
    assert [prompt.id for prompt in stream.peek(4)] == expected


def test_a_phase_without_a_tree_is_an_error():
    config = make_config({"tail_steps": 0}, trainer={"prompts_per_step": 4, "prompts_per_update": 4})
    stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
    with pytest.raises(RuntimeError, match=r"no prompt was finished; see rollout\.tail_steps"):
        Rollout(config, GRID, FakeEngine(slow_last), FakeTokenizer(), None).collect(stream, 0)
