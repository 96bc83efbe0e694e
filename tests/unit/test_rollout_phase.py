"""A whole rollout phase, and an evaluation, around a fake engine."""

from dataclasses import replace

import pytest
import torch.distributed as dist
from rollout_fake_engine import (
    EOS_TOKEN,
    FakeEngine,
    FakeRewards,
    FakeTokenizer,
    hazard_draw,
    make_config,
    make_prompts,
)

from treepo_mcore.actor.parallel import Grid
from treepo_mcore.data.prompts import PromptStream
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout.evaluation import majority, sample
from treepo_mcore.rollout.rollout import Rollout
from treepo_mcore.tree.sampler import stable_seed

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


def test_shuffled_rewards_keep_their_scores():
    rewards = FakeRewards(lambda text, prompt: stable_seed(text) % 1000 / 1000)
    reward = {"function": "m:f", "overlong_buffer_tokens": 16, "overlong_penalty": 0.5}

    def leaves(shuffle):
        config = make_config(
            {}, reward=reward | {"shuffle": shuffle}, trainer={"prompts_per_step": 4, "prompts_per_update": 4}
        )
        stream = PromptStream(make_prompts(12), seed=0, shuffle=False)
        trees, _ = Rollout(config, GRID, FakeEngine(hazard_draw(0.1)), FakeTokenizer(), rewards).collect(stream, 0)
        return [(leaf.reward, leaf.score, leaf.correct) for tree in trees for leaf in tree.leaves]

    plain, shuffled = leaves(False), leaves(True)
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


def boxing_tokenizer():
    """Whose answers are boxed: the number of their tokens; without a box where that is odd."""
    tokenizer = FakeTokenizer()
    tokenizer.decode = lambda tokens: f"\\boxed{{{len(tokens)}}}" if len(tokens) % 2 == 0 else "nothing"
    return tokenizer


def test_evaluation_with_several_samples():
    """Against the same sums taken from the answers themselves; half of the prompts ask for 2."""
    prompts = [replace(prompt, answer=str(2 + 2 * (i % 2))) for i, prompt in enumerate(make_prompts(60))]
    config = make_config({}, trainer={"eval_samples": 5})
    engine, tokenizer = FakeEngine(hazard_draw(0.3)), boxing_tokenizer()
    with RewardPool(config.reward) as rewards:
        rollout = Rollout(config, GRID, engine, tokenizer, rewards)
        values = rollout.evaluate(prompts)
        assert rollout.evaluate(prompts[::-1]) == values  # draws belong to prompts
    lengths = [len(answer) for answer in sample(FakeEngine(hazard_draw(0.3)), prompts, 5, 20, 0)]
    assert len({request.seed for request in engine.submitted}) == 300
    expected = {"eval/accuracy": 0.0, "eval/majority": 0.0, "eval/best": 0.0}
    for i, prompt in enumerate(prompts):
        mine = lengths[5 * i : 5 * i + 5]
        boxed = [length for length in mine if length % 2 == 0]
        right = mine.count(int(prompt.answer))
        expected["eval/accuracy"] += right / 300
        expected["eval/best"] += (right > 0) / 60
        expected["eval/majority"] += bool(boxed and max(boxed, key=boxed.count) == int(prompt.answer)) / 60
    assert values == pytest.approx(expected)
    assert 0 < values["eval/accuracy"] < values["eval/majority"] < values["eval/best"] < 1


def test_evaluation_with_a_custom_function_has_scores_and_no_majority():
    config = make_config({}, trainer={"eval_samples": 4}, reward={"function": "m:f"})
    rewards = FakeRewards(lambda text, prompt: 0.75 if prompt == "prompt 1" else -0.25)
    rollout = Rollout(config, GRID, FakeEngine(hazard_draw(0.3)), FakeTokenizer(), rewards)
    assert rollout.evaluate(make_prompts(4)) == {"eval/accuracy": 0.25, "eval/score": 0.0, "eval/best": 0.25}


def test_evaluation_with_one_sample_is_greedy():
    config = make_config({})
    engine, tokenizer = FakeEngine(hazard_draw(0.3)), boxing_tokenizer()
    engine.greedy = lambda prompts, max_tokens: [[1, 2] if prompt == [3] else [1] * 4 for prompt in prompts]
    prompts = [replace(prompt, tokens=[i], answer="2") for i, prompt in enumerate(make_prompts(8))]
    with RewardPool(config.reward) as rewards:
        assert Rollout(config, GRID, engine, tokenizer, rewards).evaluate(prompts) == {"eval/accuracy": 0.125}
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("answers", "winner"),
    [(["1", "2", "2"], 1), (["2", "1", "1", "2"], 0), ([None, None, "1"], 2), ([None, None], None)],
)
def test_majority(answers, winner):
    assert majority(answers) == winner


def test_a_phase_without_a_tree_is_an_error():
    config = make_config({"tail_steps": 0}, trainer={"prompts_per_step": 4, "prompts_per_update": 4})
    stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
    with pytest.raises(RuntimeError, match=r"no prompt was finished; see rollout\.tail_steps"):
        Rollout(config, GRID, FakeEngine(slow_last), FakeTokenizer(), None).collect(stream, 0)
